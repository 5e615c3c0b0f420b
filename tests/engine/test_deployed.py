"""Real server and client processes over TLS on loopback: same digest as in process, whatever is killed when."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from federating import CLIENTS, plan, quiet
from kilotune.engine.afterwards.measure import replay
from kilotune.engine.session import federate
from ports import free_port

pytestmark = pytest.mark.processes

SETTINGS = ["rounds=6", "local_steps=2", "batch_size=4", "basis.size=64", "data.max_length=64", "deadline_s=240"]
SETTINGS += ["evaluation.generate=false", "basis.refresh=run", "keep_optimizer=true"]  # so that clients have a memory
PATIENCE_S = 240


class Deployment:
    """A server and its clients, each a process that can be killed and started again."""

    def __init__(self, folder: Path, base: Path, data: Path) -> None:
        self.folder = folder
        self.settings = [f"base={base}", *SETTINGS]
        self.data = data
        self.processes: dict[str, subprocess.Popen] = {}
        port = str(free_port())
        enrol = [word for name in CLIENTS for word in ("--client", name)]
        self._run("server", "init", str(folder / "keys"), "--port", port, *enrol).wait(timeout=PATIENCE_S)

    def _run(self, *words: str) -> subprocess.Popen:
        log = open(self.folder / f"{words[0]}.log", "ab")  # noqa: SIM115 - the process keeps it
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-m", "kilotune", *words], stdout=log, stderr=log, env=environment)

    def start(self, name: str) -> None:
        """Start, or start again, the server or a client."""
        sets = [word for setting in self.settings for word in ("--set", setting)]
        if name == "server":
            words = ["server", "run", "kilotune", "--keys", str(self.folder / "keys")]
        else:
            join = self.folder / "keys" / f"{name}.join"
            words = ["client", str(join), "--data", str(self.data), "--only", name, "--wait", str(PATIENCE_S)]
        self.processes[name] = self._run(*words, "--output", str(self.folder / name), *sets)

    def kill(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def events(self) -> Iterator[dict]:
        """The server's events as they are written, until it ends; an error when none comes for PATIENCE_S."""
        path, seen, deadline = self.folder / "server" / "metrics.jsonl", 0, time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            ended = self.processes["server"].poll() is not None
            lines = path.read_text().split("\n")[:-1] if path.exists() else []
            for line in lines[seen:]:
                yield json.loads(line)
                deadline = time.monotonic() + PATIENCE_S
            seen = len(lines)
            if ended and self.processes["server"].poll() is not None:
                return
            time.sleep(0.02)  # the pause of a poll; what is waited for is the file's content
        raise TimeoutError((self.folder / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def undisturbed(base, data, tmp_path_factory):
    """The same federation in one process."""
    return federate(plan(base, data, "kilotune", *SETTINGS), tmp_path_factory.mktemp("one") / "run", quiet)


def run(folder: Path, base: Path, data: Path, watch: Callable[[Deployment, dict], None]) -> dict:
    deployment = Deployment(folder, base, data)
    try:
        for name in ("server", *CLIENTS):
            deployment.start(name)
        for event in deployment.events():
            watch(deployment, event)
        assert deployment.processes["server"].returncode == 0, (folder / "server.log").read_text()[-3000:]
        for name in CLIENTS:
            assert deployment.processes[name].wait(timeout=60) == 0, (folder / "client.log").read_text()[-3000:]
    finally:
        deployment.stop()
    return json.loads((folder / "server" / "summary.json").read_text())


def test_four_processes_over_tls_end_where_one_process_ends(base, data, tmp_path, undisturbed):
    """Kills: a second code path for deployment; a client that ends with other weights; uncounted bytes."""
    summary = run(tmp_path, base, data, lambda deployment, event: None)
    assert summary["digest"] == undisturbed["digest"]
    assert summary["client_digests"] == dict.fromkeys(CLIENTS, summary["digest"])
    assert replay(tmp_path / "server", None, quiet)["digest"] == summary["digest"]
    up = summary["payload_up_bytes_per_client_round"] * summary["rounds"]
    for traffic in summary["socket"].values():
        assert traffic["up_bytes"] > up
        assert traffic["idle_up_bytes"] > 0


def killer(moments: list[tuple[str, str, int]]) -> Callable[[Deployment, dict], None]:
    """Kill and restart `victim` when an event of a kind appears for a round; each moment once."""
    waiting = list(moments)

    def watch(deployment: Deployment, event: dict) -> None:
        for moment in list(waiting):
            victim, kind, number = moment
            if event["event"] == kind and event.get("round") == number:
                waiting.remove(moment)
                deployment.kill(victim)
                deployment.start(victim)
                return

    watch.waiting = waiting  # type: ignore[attr-defined]
    return watch


def test_a_server_killed_at_five_points_ends_with_the_same_digest(base, data, tmp_path, undisturbed):
    """Kills: a round counted twice or lost; clients that cannot come back; state that lived in memory."""
    watch = killer(
        [
            ("server", "evaluation", 0),
            ("server", "client", 1),
            ("server", "round", 2),
            ("server", "client", 4),
            ("server", "round", 5),
        ]
    )
    summary = run(tmp_path, base, data, watch)
    assert watch.waiting == []
    assert summary["digest"] == undisturbed["digest"]
    assert summary["ledger_head"] == undisturbed["ledger_head"]


def test_a_client_killed_at_five_points_ends_with_the_same_digest(base, data, tmp_path, undisturbed):
    """Kills: moments that restart from zero; a memory that advances twice for a round asked twice."""
    watch = killer(
        [
            ("bob", "evaluation", 0),
            ("bob", "client", 1),
            ("bob", "round", 2),
            ("bob", "client", 4),
            ("bob", "round", 5),
        ]
    )
    summary = run(tmp_path, base, data, watch)
    assert watch.waiting == []
    assert summary["digest"] == undisturbed["digest"]
    assert summary["client_digests"] == dict.fromkeys(CLIENTS, summary["digest"])
