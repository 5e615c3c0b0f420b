"""A client process without a model, for the tests: echo_client.py JOIN_FILE.

Says on stdout what it does. A request with `gate` is answered only after a line on stdin.
"""

import sys
from pathlib import Path

from kilotune.engine.flower.client import serve
from kilotune.engine.flower.keys import read_join_file
from kilotune.engine.flower.messages import Reply, Request

calls = 0


def handle(request: Request) -> Reply:
    """Count the call and send back the reversed payload, cut to `size`."""
    global calls
    calls += 1
    print(f"handling {request.kind} {request.body.get('round')}", flush=True)
    if request.body.get("gate"):
        sys.stdin.readline()
    if request.body.get("fail"):
        raise ValueError("asked to fail")
    payload = request.payloads[0][::-1] if request.payloads else b""
    return Reply({"calls": calls, "round": request.body.get("round", -1)}, (payload[: request.body.get("size", 0)],))


join = read_join_file(Path(sys.argv[1]))
serve(join, handle, 30.0, lambda text: print(text, flush=True))
print("finished", flush=True)
