"""The slow link: the demo's federation, every client behind a link of 5 kbit/s in each direction.

    python benchmarks/slow_link.py --output runs/slow_link
    python benchmarks/slow_link.py --tiny          # a model of 2 layers, to see the network alone

The links are those of faulty_network.py. Prints bytes, connections and the seconds that pieces waited for the rate, and
ends with 0 only if all rounds are done and every client holds the server's weights.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from demo import SETTINGS, household_rows, prepare_base
from faulty_network import FaultyNetwork, Link
from federation import TINY, save_tiny, write_rows
from processes import enrol, federate, lead_through

DEADLINE_S = 1800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/slow_link"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--kbits", type=float, default=5.0, help="kbit/s of every link, each way")
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead of SmolLM2-135M")
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True)
    data, names, settings = prepared(args)
    started = time.monotonic()
    summary, links = run(args, data, names, settings)
    sys.exit(report(args, summary, links, time.monotonic() - started))


def prepared(args: argparse.Namespace) -> tuple[Path, list[str], list[str]]:
    """Rows, clients and settings of the demo, or of a tiny model."""
    data = args.output / "rows.jsonl"
    if args.tiny:
        save_tiny(args.output / "base")
        write_rows(data, args.clients)
        return data, [f"c{n:05d}" for n in range(args.clients)], [f"base={args.output / 'base'}", *TINY]
    _, names = household_rows(data, args.clients)
    prepare_base()
    return data, names, SETTINGS


def run(
    args: argparse.Namespace, data: Path, names: list[str], settings: list[str]
) -> tuple[dict[str, Any], dict[str, Link]]:
    """Server and clients as processes; returns the server's summary and what went over the links."""
    keys = args.output / "keys"
    port = enrol(keys, names)
    settings = [*settings, f"rounds={args.rounds}", f"deadline_s={DEADLINE_S}"]
    with FaultyNetwork("127.0.0.1", port) as network:
        links = {name: network.link(bits_per_s=1000 * args.kbits) for name in names}
        for name, link in links.items():
            lead_through(keys / f"{name}.join", link.address)
        return federate(keys, data, names, settings, args.output, args.output / "clients"), links


def report(args: argparse.Namespace, summary: dict[str, Any], links: dict[str, Link], seconds: float) -> int:
    """What it cost; 0 when it came to the end it should."""
    digests = summary["client_digests"]
    equal = set(digests) == set(links) and set(digests.values()) == {summary["digest"]}
    complete = summary["rounds"] == args.rounds
    rows = {
        name: {
            "up_bytes": link.up_bytes,
            "down_bytes": link.down_bytes,
            "connections": link.connections,
            "waited_s": round(link.waited_s, 1),
        }
        for name, link in links.items()
    }
    print(f"\n{args.rounds} rounds over a proxy of {args.kbits:g} kbit/s each way per client: {seconds:.0f} s")
    for name, row in rows.items():
        print(
            f"  {name:12s} {row['up_bytes'] / 1000:7.1f} kB up {row['down_bytes'] / 1000:7.1f} kB down, "
            f"{row['connections']} connections, pieces waited {row['waited_s']:.1f} s"
        )
    print(f"all clients hold the server's weights: {'yes' if equal else 'NO'} ({summary['digest'][:16]})")
    result = {
        "kbits": args.kbits,
        "rounds": summary["rounds"],
        "seconds": round(seconds, 1),
        "links": rows,
        "equal": equal,
    }
    (args.output / "slow_link.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if equal and complete else 1


if __name__ == "__main__":
    main()
