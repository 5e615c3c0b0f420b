"""A gate before an application that only reads, to knock at without a network."""

import asyncio

from kilotune.engine.flower.gate import PUSH, Gate
from kilotune.engine.flower.keys import init_server, key_id
from kilotune.engine.flower.tls import CERTIFICATE
from kilotune.engine.flower.traffic import Meter, Wire

PORT = 5


class Door:
    """A gate before an application that reads the whole body and says so."""

    def __init__(self, folder, largest=1000, certified=True):
        self.keys = init_server(folder, "127.0.0.1", 1, ["anna", "bert"])
        self.now = 100.0
        self._loop = asyncio.new_event_loop()
        self.meter = Meter(lambda name: None)
        self.meter.wires[PORT] = Wire()
        self.read = []
        args = (self._app, self.keys.clients, self.meter, lambda name: True, lambda name: None)
        self.gate = Gate(*args, lambda name: largest, certified, lambda: self.now)

    def close(self):
        self._loop.close()

    async def _app(self, scope, receive, send):
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            if not message.get("more_body"):
                break
        self.read.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    def knock(self, body=b"", path=PUSH, headers=(), name="anna", certificate="anna", length=None, method="POST"):
        """The status, or None when the request was broken off."""
        said = str(len(body) if length is None else length).encode()
        own = [(b"flwr-public-key", key_id(self.keys.clients[name]).encode()), (b"content-length", said)]
        state = {} if certificate is None else {CERTIFICATE: (certificate, self.keys.clients[certificate])}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [*(own if length != b"" else own[:1]), *headers],
            "client": ("127.0.0.1", PORT),
            "state": state,
        }
        chunks = [body[at : at + 400] for at in range(0, len(body), 400)] or [b""]
        messages = [{"type": "http.request", "body": c, "more_body": c is not chunks[-1]} for c in chunks]
        answers = []

        async def receive():
            return messages.pop(0)

        async def send(message):
            answers.append(message)

        self._loop.run_until_complete(self.gate(scope, receive, send))
        return answers[0]["status"] if answers else None
