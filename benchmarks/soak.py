"""The soak: a server and eight clients over TLS for twenty minutes on a network and machines that fail.

    python benchmarks/soak.py --output runs/soak --minutes 20

Processes are killed with -9 and started again; at any time 30 % of the links are down; one link has 5 kbit/s; one
client lies. Then the network heals, three more rounds bring everybody together, the liar is withdrawn and a short
private federation is run. Ends with 0 only if every line of the report holds.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from faulty_network import FaultyNetwork, Link
from federation import save_tiny, write_rows
from processes import KILOTUNE, client_words, enrol, lead_through, start

NAMES = [f"c{n:05d}" for n in range(8)]
LIAR, SLOW = NAMES[3], NAMES[5]
SLOT_S, DOWN_FRAC = 10.0, 0.3
KILL_S = (10.0, 30.0)  # between two kills
FOREVER, LAST = 1_000_000, 3
PATIENCE_S = 300
MODEL = ["data.max_length=64", "data.system=", "batch_size=2", "local_steps=1", "basis.size=64", "threads=1"]
MODEL += ["evaluation.generate=false", "evaluation.limit=8"]
SETTINGS = [*MODEL, "deadline_s=12", "min_clients=3", "keep_contributions=always"]


def main() -> None:
    if sys.argv[1:2] == ["--lie"]:
        lie(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/soak"))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="of kills and links")
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True)
    save_tiny(args.output / "base")
    write_rows(args.output / "rows.jsonl", len(NAMES), rows=24)
    port = enrol(args.output / "keys", NAMES, quiet=True)
    with FaultyNetwork("127.0.0.1", port) as network:
        links = {n: network.link(seed=i, bits_per_s=5000.0 if n == SLOW else None) for i, n in enumerate(NAMES)}
        soak = Soak(args.output, links, random.Random(args.seed))
        try:
            soak.suffer(60 * args.minutes)
            soak.heal()
        finally:
            soak.stop()
    sys.exit(report(soak))


class Soak:
    """The processes, and what was done to them."""

    def __init__(self, folder: Path, links: dict[str, Link], rng: random.Random) -> None:
        self.folder, self.links, self._rng = folder, links, rng
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.kills: Counter[str] = Counter()
        self.restarts: Counter[str] = Counter()  # of processes that ended by themselves
        self.last_rounds = FOREVER
        self.codes: dict[str, int] = {}
        for name, link in links.items():
            lead_through(folder / "keys" / f"{name}.join", link.address)

    def start(self, name: str) -> None:
        sets = [f"base={self.folder / 'base'}", *SETTINGS, f"rounds={self.last_rounds}"]
        words = [*KILOTUNE, "server", "run", "kilotune", "--keys", str(self.folder / "keys"), "--wait-for", "3"]
        words += ["--output", str(self.folder / "server")]
        if name != "server":
            command = [sys.executable, __file__, "--lie"] if name == LIAR else KILOTUNE
            place = self.folder / "keys", name, self.folder / "rows.jsonl", self.folder / name
            words = [*command, *client_words(*place, PATIENCE_S)]
        words += ["--format", "json", *(word for setting in sets for word in ("--set", setting))]
        self.processes[name] = start(words, self.folder / f"{name}.log", self.folder / f"{name}.json")

    def suffer(self, seconds: float) -> None:
        """Kill, cut and start again until the time is over."""
        for name in ("server", *NAMES):
            self.start(name)
        now = time.monotonic()
        end, slot, kill = now + seconds, now + SLOT_S, now + self._rng.uniform(*KILL_S)
        while (now := time.monotonic()) < end:
            time.sleep(0.5)
            self._raise_the_dead()
            if now >= slot:
                slot = now + SLOT_S
                for link in self.links.values():
                    link.close() if self._rng.random() < DOWN_FRAC else link.open()
            if now >= kill:
                kill = now + self._rng.uniform(*KILL_S)
                victim = self._rng.choice(["server", *NAMES])
                self.processes[victim].kill()
                self.processes[victim].wait()
                self.kills[victim] += 1
                self.start(victim)

    def heal(self) -> None:
        """Links come back, the server is asked to stop, and started for the last rounds and the farewell."""
        for link in self.links.values():
            link.open()
        server = self.processes["server"]
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=PATIENCE_S)
        done = len((self.folder / "server" / "ledger.jsonl").read_bytes().splitlines()) - 1
        self.last_rounds = done + LAST
        self._raise_the_dead()
        end = time.monotonic() + PATIENCE_S
        while self._ended("server") != 0 and time.monotonic() < end:
            time.sleep(0.5)
            self._raise_the_dead(also_clients=False)
        for name in ("server", *NAMES):
            try:
                self.codes[name] = self.processes[name].wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.codes[name] = -1

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def _ended(self, name: str) -> int | None:
        return self.processes[name].poll()

    def _raise_the_dead(self, also_clients: bool = True) -> None:
        """A server that had too few answers ends with one line and is started again, as a service manager would."""
        for name in ("server", *NAMES) if also_clients else ("server",):
            if self._ended(name) is not None and not (self.last_rounds < FOREVER and self._ended(name) == 0):
                self.restarts[name] += 1
                self.start(name)
            elif name == "server" and also_clients and self._ended(name) == 0:
                self.start(name)  # stopped as asked


# -- the liar ---------------------------------------------------------------------------------------------------------


def lie(words: list[str]) -> None:
    """`kilotune client` whose updates are turned round, blown up, or those of an earlier round."""
    from kilotune.cli.main import app
    from kilotune.core.types import TensorUpdate
    from kilotune.engine import deployed
    from kilotune.engine.flower.messages import Reply, Request
    from kilotune.engine.rounds.worker import Worker

    class Liar(Worker):
        before: tuple[bytes, ...] = ()

        def handle(self, request: Request) -> Reply:
            reply = super().handle(request)
            if request.kind != "train" or reply.error is not None:
                return reply
            number = int(request.body["round"])
            if number % 3 == 0 and self.before:
                return replace(reply, payloads=self.before)
            codec, context = self.replica.plan.uplink, self.replica.context(number)
            honest = codec.decode(reply.payloads[0], context)
            assert isinstance(honest, TensorUpdate), "the soak's recipe sends coefficients"
            factor = -10.0 if number % 3 == 1 else 1e6
            false = TensorUpdate({name: tensor * factor for name, tensor in honest.tensors.items()})
            self.before = (codec.encode(false, context, {}),)
            return replace(reply, payloads=self.before)

    deployed.Worker = Liar  # type: ignore[misc]
    app(words)


# -- what has to hold -------------------------------------------------------------------------------------------------


def report(soak: Soak) -> int:
    """Write soak.md and soak.json; 0 when everything holds."""
    from kilotune.engine.operations.runview import reason_class
    from kilotune.engine.rounds.ledger import Ledger

    server = soak.folder / "server"
    ledger = Ledger.load(server)  # refuses a broken chain, a missing payload, a round that is there twice
    summary = read(server / "summary.json")
    ends = {name: read(soak.folder / f"{name}.json") for name in NAMES}
    events = [json.loads(line) for line in (server / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    refusals = Counter(reason_class(event["why"]) for event in events if event.get("why") and "status" in event)
    clipped = sum(event["clipped_norms"] > 0 for event in events if event["event"] == "guard")
    removed, epsilon, budget = withdrawal(soak.folder), *private(soak.folder)
    holds = {
        "every round stands in the ledger exactly once": [r.round for r in ledger.records]
        == list(range(1, soak.last_rounds + 1)),
        "all clients hold the server's weights": bool(summary)
        and {end.get("digest") for end in ends.values()} == {summary["digest"]},
        "all processes ended with 0": set(soak.codes.values()) == {0},
        "the liar was refused or cut": any(e.get("client") == LIAR and "why" in e for e in events) or clipped > 0,
        "the liar's part was withdrawn and its certificate fits": removed,
        "epsilon stayed within its budget": epsilon is not None and epsilon <= budget,
    }
    figures = {
        "rounds": len(ledger),
        "kills": sum(soak.kills.values()),
        "kills_of_the_server": soak.kills["server"],
        "restarts_of_processes_that_ended": dict(soak.restarts),
        "exit_codes": soak.codes,
        "rounds_with_clipped_updates": clipped,
        "up_bytes": sum(link.up_bytes for link in soak.links.values()),
        "down_bytes": sum(link.down_bytes for link in soak.links.values()),
        "connections": sum(link.connections for link in soak.links.values()),
        "epsilon": epsilon,
        "digest": summary.get("digest"),
    }
    content = {"holds": holds, "figures": figures, "refusals": dict(refusals)}
    (soak.folder / "soak.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    lines = ["# Soak", "", *(f"- {'yes' if held else '**NO**'}: {what}" for what, held in holds.items()), ""]
    for title, table in (("figure", figures), ("refusal", refusals)):
        lines += [f"| {title} | |", "|---|---|", *(f"| {key} | {value} |" for key, value in table.items()), ""]
    (soak.folder / "soak.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    return 0 if all(holds.values()) else 1


def withdrawal(folder: Path) -> bool:
    """The liar leaves the finished run, and the certificate is checked."""
    new = folder / "withdrawn"
    words = [str(folder / "server"), LIAR, "--output", str(new), "--keys", str(folder / "keys")]
    done = command("withdraw", *words)
    return done is not None and command("withdraw", "--verify", str(done["certificate"]), "--run", str(new)) is not None


def private(folder: Path) -> tuple[float | None, float]:
    """Epsilon and budget of a short federation with noise, a run of its own: it may not keep what clients sent."""
    sets = [f"base={folder / 'base'}", f"data.path={folder / 'rows.jsonl'}", *MODEL, "rounds=4", "partition=null"]
    sets += [f"privacy.clients={len(NAMES)}"]
    words = [word for setting in sets for word in ("--set", setting)]
    done = command("federate", "private_central", *words, "--output", str(folder / "private"))
    return (None, 0.0) if done is None else (float(done["privacy"]["epsilon"]), float(done["privacy"]["budget"]))


def command(*words: str) -> dict[str, Any] | None:
    """What a command of kilotune prints; None when it fails."""
    done = subprocess.run([*KILOTUNE, *words, "--format", "json"], stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def read(path: Path) -> dict[str, Any]:
    """A file of JSON; nothing when a process has not written it."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content


if __name__ == "__main__":
    main()
