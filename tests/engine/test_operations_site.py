"""The site as an ASGI application, without sockets: who may ask, what is answered, what a browser may do with it."""

import asyncio
import base64
import hashlib
import json
import re

import pytest

from kilotune.engine.operations import site as module
from kilotune.engine.operations.runview import RunView
from kilotune.engine.operations.site import DISK_LOW_BYTES, Site

TOKEN = "0123456789abcdef0123456789abcdef-Token"
READS = ("/state", "/events", "/health", "/metrics")


class Served:
    """A site and what it was asked to do."""

    def __init__(self, *, open_reads=True, hosts=None, free=10 * DISK_LOW_BYTES):
        self.view = RunView({"title": "wards", "recipe": "ab12"}, 4, ("ada", "bob"))
        self.stops, self.free = 0, free
        self.site = Site(
            self.view,
            TOKEN,
            self._stop,
            lambda: {"disk_free_bytes": self.free, "peak_rss_bytes": 1e6},
            open_reads=open_reads,
            hosts=hosts,
        )

    def _stop(self):
        self.stops += 1

    def ask(self, path, method="GET", token=None, host="127.0.0.1:9464", scheme="Bearer"):
        """(status, headers, body) of one request by a client that goes away at once."""
        headers = [(b"host", host.encode())]
        if token is not None:
            headers.append((b"authorization", f"{scheme} {token}".encode()))
        sent = []

        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        asyncio.run(self.site(scope, receive, send))
        named = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], named, b"".join(m.get("body", b"") for m in sent[1:])


@pytest.mark.parametrize("path", READS)
def test_elsewhere_than_on_loopback_every_read_takes_the_token(path):
    """Kills: a path that was forgotten; a token compared by its beginning; a scheme that is not looked at."""
    served = Served(open_reads=False)
    assert served.ask(path)[0] == 401
    assert served.ask(path)[1]["www-authenticate"].startswith("Bearer")
    for wrong in (TOKEN[:-1], TOKEN + "x", TOKEN.lower(), "", "é"):
        assert served.ask(path, token=wrong)[0] == 403, wrong
    assert served.ask(path, token=TOKEN, scheme="Basic")[0] == 403
    assert served.ask(path, token=TOKEN)[0] == 200


@pytest.mark.parametrize("path", READS)
def test_on_loopback_reads_are_free(path):
    assert Served().ask(path)[0] == 200


def test_the_one_action_takes_the_token_everywhere_and_happens_once():
    """Kills: a stop without a token on loopback; a second click that ends the run at once."""
    served = Served()
    assert served.ask("/stop", "POST")[0] == 401
    assert served.ask("/stop", "POST", token="x" * 40)[0] == 403
    assert served.ask("/stop", "GET", token=TOKEN)[0] == 405
    assert served.stops == 0
    assert served.ask("/stop", "POST", token=TOKEN)[0] == 202
    assert served.ask("/stop", "POST", token=TOKEN)[0] == 202
    assert served.stops == 1


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_else_can_be_done(method):
    served = Served()
    for path in ("/", *READS):
        assert served.ask(path, method, token=TOKEN)[0] == 405
    assert served.ask("/start", method, token=TOKEN)[0] == 404
    assert served.stops == 0


def test_a_foreign_name_that_leads_to_loopback_is_refused():
    """Kills: a page on another site that rebinds its own name to 127.0.0.1 and reads along."""
    served = Served(hosts=frozenset({"localhost", "127.0.0.1", "::1"}))
    for host, status in (
        ("127.0.0.1:9464", 200),
        ("LOCALHOST", 200),
        ("[::1]:9464", 200),
        ("evil.example:9464", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ):
        assert served.ask("/state", host=host)[0] == status, host


def test_the_page_may_run_its_own_script_and_style_and_nothing_else():
    """Kills: 'unsafe-inline'; a host in the policy; a script that the policy does not allow, so that nothing runs."""
    status, headers, body = Served().ask("/")
    text = body.decode()
    assert status == 200
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert not re.search(r"unsafe|https?:|\*", headers["content-security-policy"])
    assert " style=" not in text
    assert not re.search(r"\son\w+=", text)
    outside = set(re.findall(r"https?://[^\s\"']+", text)) - {"http://www.w3.org/2000/svg"}
    assert outside == set()
    assert "innerHTML" not in text


@pytest.mark.parametrize("path", ["/", *READS, "/nothing"])
def test_every_answer_has_the_headers_and_none_has_the_token(path):
    """Kills: an error page without them; a secret in a page, a state or a message."""
    served = Served()
    served.view.fold({"event": "status", "text": "waiting"})
    _, headers, body = served.ask(path, token=TOKEN)
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers
    assert TOKEN not in body.decode() + json.dumps(headers)


def test_health_is_503_while_the_last_round_failed_or_the_disk_is_full():
    """Kills: a probe that is always happy; a failure that a later good round does not clear."""
    served = Served()
    status, _, body = served.ask("/health")
    assert (status, json.loads(body)["status"], json.loads(body)["round"]) == (200, "ok", 0)
    served.view.fold({"event": "rejected", "round": 1, "why": "above the gate"})
    served.view.fold({"event": "round", "round": 1})
    status, _, body = served.ask("/health")
    assert (status, json.loads(body)["status"]) == (503, "failing")
    assert "above the gate" in json.loads(body)["problems"][0]
    served.view.fold({"event": "round", "round": 2})
    assert served.ask("/health")[0] == 200
    served.free = DISK_LOW_BYTES - 1
    status, _, body = served.ask("/health")
    assert (status, json.loads(body)["problems"]) == (503, ["the disk is full"])


def test_events_carry_the_whole_state_each_time_it_changes(monkeypatch):
    """Kills: a stream that repeats itself, misses the last state, or never ends when the server does."""
    monkeypatch.setattr(module, "TICK_S", 0.001)
    served = Served()
    got = []

    async def watch():
        async def receive():
            await asyncio.Event().wait()

        async def send(message):
            body = message.get("body", b"")
            if not body.startswith(b"data: "):
                return
            got.append(json.loads(body.removeprefix(b"data: ")))
            if len(got) < 3:
                served.view.fold({"event": "round", "round": len(got)})
            elif len(got) == 3:
                served.view.fold({"event": "end", "digest": "cafe"})
                served.site.closing = True

        scope = {"type": "http", "method": "GET", "path": "/events", "headers": []}
        await asyncio.wait_for(served.site(scope, receive, send), 20)

    asyncio.run(watch())
    assert [state["round"] for state in got] == [0, 1, 2, 2]
    assert got[-1]["facts"]["weights"] == "cafe"
    last = json.loads(served.ask("/state")[2])
    assert got[-1] | {"now": 0} == last | {"now": 0}


def test_a_page_that_goes_away_ends_its_stream_and_makes_room(monkeypatch):
    """Kills: streams that pile up until nobody gets in."""
    monkeypatch.setattr(module, "MAX_STREAMS", 1)
    served = Served()
    for _ in range(3):
        assert served.ask("/events")[0] == 200
    monkeypatch.setattr(module, "MAX_STREAMS", 0)
    assert served.ask("/events")[0] == 503
