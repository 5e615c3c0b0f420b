"""Asking a server, as an enrolled client, for its clock and versions: what `kilotune doctor` compares."""

import http.client
import json
import ssl
import time
from dataclasses import dataclass
from typing import Any

from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from kilotune.engine.flower.certificates import load_private, public_pem
from kilotune.engine.flower.gate import ABOUT
from kilotune.engine.flower.keys import JoinFile, key_id
from kilotune.engine.flower.tls import client_context

LARGEST = 1 << 16


@dataclass(frozen=True)
class About:
    """The answer: HTTP status, facts (None unless 200), and this machine's clock in the middle of the exchange."""

    status: int
    facts: dict[str, Any] | None
    clock: float


def ask(join: JoinFile, timeout_s: float) -> About:
    """Raises OSError (ssl errors among them) or http.client.HTTPException when there is no answer."""
    host, _, port = join.server.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    context = client_context(join)
    if isinstance(context, ssl.SSLContext):
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, int(port), timeout=timeout_s, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
    header = {FLEET_HTTP_PUBLIC_KEY_HEADER: key_id(public_pem(load_private(join.key)))}
    try:
        started = time.time()
        connection.request("POST", ABOUT, body=b"", headers=header)
        response = connection.getresponse()
        body = response.read(LARGEST)
        clock = (started + time.time()) / 2
    finally:
        connection.close()
    try:
        facts = json.loads(body) if response.status == 200 else None
    except ValueError:
        facts = None
    return About(response.status, facts if isinstance(facts, dict) else None, clock)
