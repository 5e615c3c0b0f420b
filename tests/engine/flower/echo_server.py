"""A server process for the tests: echo_server.py KEYS_FOLDER. One round of two clients per line on stdin."""

import json
import sys
from pathlib import Path

from kilotune.engine.flower.keys import load_server_keys
from kilotune.engine.flower.messages import Request
from kilotune.engine.flower.server import start_server

keys = load_server_keys(Path(sys.argv[1]))
exchange = start_server(keys, keys.host, keys.port)
print("listening", flush=True)
for line in sys.stdin:
    request = Request("train", json.loads(line), (b"payload",))
    replies = exchange.exchange(dict.fromkeys(keys.clients, request), 60.0)
    print(json.dumps({name: reply.body for name, reply in replies}), flush=True)
