"""Overlap: seconds of a round over slow links, with clients that work ahead and with ones that wait.

    python benchmarks/overlap.py --output runs/overlap --format json
    python benchmarks/overlap.py --tiny --kbits 40      # a model of 2 layers
    python benchmarks/overlap.py --recipe co2           # all steps ahead instead of all but one

A server and two clients are processes over TLS, the links those of faulty_network.py. Both kinds of clients take turns.
Ends with 0 only if all runs end with the same weights.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from common import environment
from demo import prepare_base
from faulty_network import FaultyNetwork
from federation import save_tiny, write_rows
from processes import KILOTUNE, enrol, federate, lead_through

NAMES = ["c00000", "c00001"]
SETTINGS = ["data.max_length=64", "data.system=", "evaluation.generate=false", "evaluation.limit=2", "deadline_s=1800"]
TINY = ["threads=1", "batch_size=128"]
REAL = ["base=smollm2-135m", "batch_size=4"]
STREAMING = "streaming_diloco"
KINDS = {"ahead": KILOTUNE, "waiting": [sys.executable, __file__, "--wait"]}


def main() -> None:
    if sys.argv[1:2] == ["--wait"]:
        wait(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=(STREAMING, "co2"), default=STREAMING)
    parser.add_argument("--output", type=Path, default=Path("runs/overlap"))
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=2, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=5, help="local steps of a round")
    parser.add_argument("--kbits", type=float, default=4000.0, help="kbit/s of each client's link, each way")
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead of SmolLM2-135M")
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True)
    settings = [*SETTINGS, f"rounds={args.rounds}", f"local_steps={args.steps}"]
    if args.recipe == STREAMING:
        settings += [f"streaming.overlap={args.steps - 1}"] + args.tiny * ["uplink.count=2", "downlink.count=2"]
    if args.tiny:
        save_tiny(args.output / "base")
        settings += [*TINY, f"base={args.output / 'base'}"]
    else:
        prepare_base()
        settings += REAL
    write_rows(args.output / "rows.jsonl", len(NAMES), rows=256 if args.tiny else 24)
    runs = [run(args, settings, kind, pair) for pair in range(args.pairs) for kind in KINDS]
    sys.exit(report(args, runs))


def wait(words: list[str]) -> None:
    """`kilotune` with a client that takes no step before it is asked to."""
    from kilotune.cli.main import app
    from kilotune.engine.rounds.worker import Worker

    Worker.ahead = lambda self, asked: None  # type: ignore[method-assign]
    app(words)


def run(args: argparse.Namespace, settings: list[str], kind: str, pair: int) -> dict[str, Any]:
    """A federation of one kind of clients. The first round is not counted: nobody can have worked ahead of it."""
    folder = args.output / f"{kind}-{pair}"
    keys, server, rows = folder / "keys", folder / "server", args.output / "rows.jsonl"
    with FaultyNetwork("127.0.0.1", enrol(keys, NAMES, quiet=True)) as network:
        for name in NAMES:
            lead_through(keys / f"{name}.join", network.link(bits_per_s=1000 * args.kbits).address)
        how = {"recipe": args.recipe, "command": KINDS[kind]}
        summary = federate(keys, rows, NAMES, settings, server, folder / "clients", quiet=True, **how)
    events = [json.loads(line) for line in (server / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = {"round": [], "client": []}
    for event in events:
        if event["event"] in seconds and event.get("round", 0) > 1 and "seconds" in event:
            seconds[event["event"]].append(round(event["seconds"], 3))
    return {"kind": kind, "digest": summary["digest"], "seconds": seconds}


def report(args: argparse.Namespace, runs: list[dict[str, Any]]) -> int:
    """The medians and their ratio; 0 when all weights are equal."""
    result: dict[str, Any] = {
        "recipe": args.recipe,
        "model": "tiny" if args.tiny else "SmolLM2-135M",
        "kbits": args.kbits,
        "steps": args.steps,
    }
    for kind in KINDS:  # seconds of a round, and of a client's computing between request and answer
        for what in ("round", "client"):
            spent = [seconds for one in runs if one["kind"] == kind for seconds in one["seconds"][what]]
            result[f"{kind}_{what}_s"] = round(statistics.median(spent), 3)
    result["ratio"] = round(result["ahead_round_s"] / result["waiting_round_s"], 3)
    result["equal"] = len({one["digest"] for one in runs}) == 1
    text = json.dumps({**result, "runs": runs, "environment": environment()}, indent=2)
    (args.output / "overlap.json").write_text(text + "\n", encoding="utf-8")
    print(text if args.format == "json" else "\n".join(f"{key}: {value}" for key, value in result.items()))
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    main()
