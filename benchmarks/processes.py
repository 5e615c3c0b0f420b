"""A server and its clients as processes of their own, over TLS on loopback."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

KILOTUNE = [sys.executable, "-m", "kilotune"]
WAIT_S = 900  # how long a client tries to reach its server
LEAVE_S = 120  # how long a client may take to end after its server has


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def enrol(keys: Path, names: list[str], quiet: bool = False) -> int:
    """Keys of a server and a join file per client; returns the port they name."""
    port = free_port()
    words = [*KILOTUNE, "server", "init", str(keys), "--port", str(port)]
    words += [word for name in names for word in ("--client", name)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL if quiet else None)
    return port


def lead_through(join: Path, address: str) -> Path:
    """The join file with another way to the same server."""
    fields = json.loads(join.read_text(encoding="utf-8"))
    join.write_text(json.dumps(fields | {"server": address}), encoding="utf-8")
    return join


def client_words(keys: Path, name: str, data: Path, output: Path, wait_s: float = WAIT_S) -> list[str]:
    """What follows `kilotune` for a client that sees its own rows of a file only."""
    words = ["client", str(keys / f"{name}.join"), "--only", name, "--data", str(data)]
    return [*words, "--wait", str(wait_s), "--output", str(output)]


def start(words: list[str], log: Path, told: Path | None = None) -> subprocess.Popen[bytes]:
    """A process with one thread, whose stderr is added to `log` and whose stdout is `told`, or nobody's."""
    with open(log, "ab") as stderr, open(told or os.devnull, "wb") as stdout:
        return subprocess.Popen(words, stdout=stdout, stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})


def federate(
    keys: Path,
    data: Path,
    names: list[str],
    settings: list[str],
    server: Path,
    clients: Path,
    quiet: bool = False,
    timeout_s: float | None = None,
    recipe: str = "kilotune",
    command: list[str] = KILOTUNE,
) -> dict[str, Any]:
    """The summary of a run of these enrolled clients; ends this process with the server's code when that fails.

    Clients write into `clients`/NAME, and what they say into client-NAME.log beside it; `quiet`: what the server says
    is not shown. `command`: what a client is run with.
    """
    clients.mkdir(parents=True, exist_ok=True)
    sets = [word for setting in settings for word in ("--set", setting)]
    with ExitStack() as stack:
        running = []
        for name in names:
            words = [*command, *client_words(keys, name, data, clients / name), "--recipe", recipe, *sets]
            client = start(words, clients.parent / f"client-{name}.log")
            stack.callback(client.wait)
            stack.callback(client.kill)
            running.append(client)
        words = [*KILOTUNE, "server", "run", recipe, "--keys", str(keys), "--output", str(server)]
        said = subprocess.DEVNULL if quiet else None
        done = subprocess.run(
            [*words, *sets, "--format", "json"], stdout=subprocess.PIPE, stderr=said, timeout=timeout_s, text=True
        )
        if done.returncode:
            sys.exit(done.returncode)
        for client in running:
            client.wait(timeout=LEAVE_S)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary
