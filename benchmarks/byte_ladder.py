"""The byte ladder: every federated recipe on the same rows, clients and compute; quality against bytes and rounds.

    python benchmarks/byte_ladder.py --data FOLDER --output runs/ladder             # everything that is missing
    python benchmarks/byte_ladder.py --data FOLDER --rows ni --recipes kilotune fedkseed references
    python benchmarks/byte_ladder.py --data FOLDER --model tiny --rounds 2 --local-steps 2   # does it work at all?

FOLDER holds clinc150, ni_core, ni_unseen and banking77 (.jsonl.gz). A finished run is one JSON file, named by
everything that decides its figures, and is not repeated; an interrupted one goes on where it was; one that fails is a
line with its error and is tried again by the next call. After each run the page is written anew, from all files there
are of this setting, and beside it a JSON file with the figures of every run on it: a new checkout goes on from those.
To measure one again remove its line there; to measure all, write the --page elsewhere. What is held equal, and how,
stands on that page: `METHOD`, below.
"""

import argparse
import gzip
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from math import ceil
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from common import environment, figure, fresh, run_recipe
from kilotune.core.errors import KilotuneError
from ladder_figure import curves, scatter, sheet
from ladder_page import Point, Rungs, loss_of

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan

HERE = Path(__file__).parent
REFERENCES = "references"
DIALS = {
    "kilotune": {
        "M 2048": ("basis.size=2048", "optimizer.lr=3.0e-2"),
        "M 32768": ("basis.size=32768", "optimizer.lr=1.7e-2"),
    },
    "fedavg_full": {"fp32": ("uplink.dtype=fp32", "downlink.dtype=fp32")},  # the upper end
}
PASSES = 3  # a step with backprop: one pass forward, and one back that costs two
# What the page shows of a run, and so what is kept beside the page.
SHOWN = ("label", "before", "after", "rounds", "up", "down", "bytes", "peak_rss_bytes", "curve")

HOW = "Written by `make ladder`, which runs what byte_ladder.json beside this page does not have."
METHOD = """
Every federated recipe on the same rows and the same clients, with the same local compute.

- **Which.** Every shipped recipe with `rounds`. Those with `privacy: central` are made for a hundred clients and more;
  here their noise has to hide each of {clients}, so their losses say nothing of what they come to among many.
- **Compute.** A client makes {rounds} rounds x {local_steps} steps of {batch_size} rows, whatever the recipe says. A
  step with backprop counts as three forward passes (the way back costs two). Clients with forward passes alone may
  spend as many in all: a step is two, each measurement of the rate (`lr: auto`) eleven. A recipe that sends every
  gradient (`local_steps: 1`) keeps doing so, in {local_steps} times as many rounds. What a part counts in rounds (a
  warm-up) is scaled with the rounds.
- **Dial.** The default is there with a quarter and with four times its coefficients, too (`M`), all weights also in
  fp32.
- **Bytes.** All payloads of one client over the whole run, up and down.
- **Rates.** Each recipe's own; the default's schedule, numbers and bits were chosen on clinc150 and ni, not on
  banking77 (docs/log.md).
  "lr x 3" and the like: the best of a small grid, found with another seed (other batches, noise and held-out rows);
  with forward passes alone also the rate that `lr: auto` measures.
- **References.** *alone*: LoRA (`local_lora`) on one client's rows, as many steps; mean over the clients.
  *centralised*: LoRA on all rows, as many steps, each with as many rows as all clients have in theirs. All runs are
  measured on the same held-out rows.
- **Frontier (\\*).** No other protocol has a lower loss for as many bytes or fewer.
- **Rows.** `clinc150`: the first clients of the file, one domain each, no label shared. `ni`: rows of ni_core with at
  most 480 characters (34 of its 48 tasks), dealt out to the clients by task, measured on as short rows of ni_unseen (27
  other tasks). `banking77_dirichlet_*`: clients drawn by Dirichlet over the intents.
"""


@dataclass(frozen=True)
class Source:
    """Where rows come from, and who owns them."""

    file: str
    held_out: str = ""  # file of the held-out rows; none: the clients' own
    alpha: float | None = None  # clients drawn by Dirichlet(alpha) over the answers; None: as `dealt` says
    dealt: bool = False  # the file's clients dealt out to so many; False: the first of them
    longest: int | None = None  # characters of a row at most


ROWS = {
    "clinc150": Source("clinc150"),
    "ni": Source("ni_core", held_out="ni_unseen", dealt=True, longest=480),
    "banking77_dirichlet_0.1": Source("banking77", alpha=0.1),
    "banking77_dirichlet_1.0": Source("banking77", alpha=1.0),
}


@dataclass(frozen=True)
class Setting:
    """What all runs of a ladder have in common."""

    model: str
    clients: int
    rounds: int
    local_steps: int
    batch_size: int
    limit: int  # held-out rows
    every: int  # rounds between evaluations


@dataclass(frozen=True)
class Job:
    """One run: a recipe with changes; what only says where things lie (`places`) does not decide its figures."""

    row: str
    label: str
    recipe: str
    changes: tuple[str, ...]
    places: tuple[str, ...]
    setting: Setting

    @property
    def path(self) -> Path:
        """Its JSON file, below the output folder."""
        from kilotune.engine.composing.compose import override, read

        content = override(read(self.recipe), list(self.changes)) | {"title": "", "source": ""}
        facts = json.dumps([content, asdict(self.setting)], sort_keys=True)
        name = self.label.replace(", ", "-").replace(" ", "_")
        return Path(self.row) / f"{name}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clinc150.jsonl.gz and the others")
    parser.add_argument("--rows", nargs="*", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--recipes", nargs="*", help=f"these in this order, or '{REFERENCES}'; none: the page")
    parser.add_argument("--tuned", action="store_true", help="also with the best rate of --grid")
    parser.add_argument("--grid", type=float, nargs="+", default=[0.3, 1.0, 3.0], help="factors of a recipe's rate")
    parser.add_argument("--model", choices=("tiny", "smollm2-135m"), default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--local-steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--limit", type=int, default=24, help="held-out rows, spread evenly over the clients")
    parser.add_argument("--every", type=int, help="rounds between evaluations; default: half of --rounds")
    parser.add_argument("--output", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--page", type=Path, help="default: docs/byte_ladder.md; with the tiny model in --output")
    args = parser.parse_args()
    if unknown := set(args.recipes or ()) - {REFERENCES, *federated()}:
        parser.error(f"--recipes: got {', '.join(sorted(unknown))}, expected of {REFERENCES}, {', '.join(federated())}")
    ladder = Ladder(args)
    for row in args.rows:
        for name in [REFERENCES, *ladder.own] if args.recipes is None else args.recipes:
            if name == REFERENCES or name in ladder.own:
                ladder.climb(row, name)
    ladder.write_page()


# -- the same for all -------------------------------------------------------------------------------------------------


def federated() -> list[str]:
    """The recipes of the ladder (`METHOD`, "Which"); one that cannot be read belongs to it, so that it is told."""
    from kilotune.engine.composing.compose import read, shipped

    def belongs(name: str) -> bool:
        try:
            content = read(name)
        except KilotuneError:
            return True
        return bool(content.get("rounds"))

    return [name for name in shipped() if belongs(name)]


@cache
def same_compute(recipe: str, setting: Setting, changes: tuple[str, ...]) -> tuple[str, ...]:
    """The changes that give each client of a recipe the compute of everybody else. Raises RecipeError."""
    from kilotune.engine.composing.compose import compose, for_group, override, read

    own = compose(recipe, "federate", list(changes))
    rounds, steps = setting.rounds, setting.local_steps
    if own.recipe.local_steps == 1:
        rounds, steps = forward_steps(own, setting, 1) if own.estimator.forward_only else rounds * steps, 1
    elif own.estimator.forward_only:
        steps = forward_steps(own, setting, rounds)
    content, stretch = override(read(recipe), list(changes)), rounds / (own.recipe.rounds or 1)
    sets = [*changes, f"rounds={rounds}", f"local_steps={steps}", f"batch_size={setting.batch_size}"]
    sets.append(f"evaluation.every={setting.every * rounds // setting.rounds}")
    sets += [f"{path}={max(1, round(number * stretch))}" for path, number in counted_in_rounds(content)]
    groups = [dict(group) for group in content.get("clients", ())]
    for index, group in enumerate(groups):
        follower = for_group(own, index)
        if follower.estimator.forward_only:
            group["local_steps"] = forward_steps(follower, setting, rounds)
        elif "local_steps" in group:
            group["local_steps"] = steps
        if "batch_size" in group:
            group["batch_size"] = setting.batch_size
    sets += ["clients=" + json.dumps(groups)] if groups else []
    if own.partition is not None:
        sets.append("partition=null")  # the ladder's rows have their owners
    if hasattr(own.privacy, "clients"):
        sets.append(f"privacy.clients={setting.clients}")
    compose(recipe, "federate", sets)
    return tuple(sets)


def counted_in_rounds(content: dict[str, Any], path: str = "") -> Iterator[tuple[str, int]]:
    """(place, number) of every `rounds` or `warmup` of a part."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from counted_in_rounds(value, f"{path}{key}.")
        elif path and key in ("rounds", "warmup") and isinstance(value, int):
            yield path + key, value


def forward_steps(plan: "Plan", setting: Setting, rounds: int) -> int:
    """Steps a round of two forward passes for the price of the others' steps, measurements of the rate included."""
    from kilotune.estimator.zeroth_order import NUM_PROBES

    allowed = PASSES * setting.rounds * setting.local_steps

    def passes(steps: int) -> int:
        probes = ceil(rounds * steps / getattr(plan.estimator, "probe_every", 1)) if plan.optimizer.lr == "auto" else 0
        return int(2 * rounds * steps + (1 + 2 * NUM_PROBES) * probes)

    return max((n for n in range(1, allowed) if passes(n) <= allowed), default=1)


def write_rows(data: Path, source: Source, clients: int, target: Path) -> list[str]:
    """One file of training rows, each with its owner, and held-out rows; returns the owners."""
    from kilotune.core.rng import stream
    from kilotune.partition.dirichlet import Dirichlet

    rows = read_rows(data, source.file, source.longest)
    train, held_out = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    if source.alpha is not None:
        method = Dirichlet(alpha=source.alpha, num_clients=clients, field="output")
        parts = method.split(train, stream(0, "partition"))
        train = [{**train[i], "client": name} for name, part in parts.items() for i in part]
    elif source.dealt:
        names = sorted({row["client"] for row in train})
        train = [{**row, "client": f"client{names.index(row['client']) % clients}"} for row in train]
    owners = sorted({row["client"] for row in train})[:clients]
    train = [row for row in train if row["client"] in owners]
    if source.held_out:
        held_out = read_rows(data, source.held_out, source.longest)
    elif source.alpha is None:
        held_out = [row for row in held_out if row["client"] in owners]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in [*train, *held_out]), encoding="utf-8")
    return owners


def read_rows(data: Path, name: str, longest: int | None) -> list[dict[str, str]]:
    """The rows of a file that are not too long."""
    with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = ("instruction", "input", "output")
    return [row for row in rows if longest is None or sum(len(row[text]) for text in texts) <= longest]


# -- runs -------------------------------------------------------------------------------------------------------------


class Ladder:
    """All runs of one setting: those that are there and those that are missing."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.output, self.base = args, args.output, args.model
        args.every = args.every or max(1, args.rounds // 2)
        self.setting = Setting(**{field.name: getattr(args, field.name) for field in fields(Setting)})
        if args.model == "tiny":
            from federation import save_tiny

            self.base = str(self.output / "tiny")
            save_tiny(Path(self.base))
        self.page = args.page or (HERE.parent / "docs" if args.model != "tiny" else self.output) / "byte_ladder.md"
        beside = self.page.with_suffix(".json")
        self.kept: dict[str, dict[str, Any]] = json.loads(beside.read_text("utf-8")) if beside.exists() else {}
        self.owners: dict[str, list[str]] = {}
        for row, source in ROWS.items():
            if row in args.rows or row in self.kept or (self.output / row).exists():
                self.owners[row] = write_rows(args.data, source, args.clients, self.output / row / "rows.jsonl")
        self.own: dict[str, tuple[str, ...]] = {}  # recipe -> its changes
        self.broken: dict[str, str] = {}
        for name in federated():
            try:
                self.own[name] = same_compute(name, self.setting, ("seed=0",))
            except Exception as error:  # whatever is wrong with one recipe, the others are run
                self.broken[name] = f"{type(error).__name__}: {error}"
                print(f"{name}: {self.broken[name]}", flush=True)

    def climb(self, row: str, name: str) -> None:
        """All runs of one recipe on one set of rows."""
        jobs = self.references(row) if name == REFERENCES else [*self.plain(row, name), *self.grid(row, name)]
        for job in jobs:
            self.run(job)
        if name != REFERENCES and (best := self.tuned(row, name)):
            self.run(best)

    def plain(self, row: str, name: str) -> list[Job]:
        """A recipe as it is, and with its dial elsewhere."""
        jobs = [self.job(row, name, name, self.own[name])]
        for word, more in DIALS.get(name, {}).items():
            jobs.append(self.job(row, f"{name}, {word}", name, same_compute(name, self.setting, ("seed=0", *more))))
        return jobs

    def job(self, row: str, label: str, recipe: str, changes: tuple[str, ...]) -> Job:
        """A run on these rows."""
        places = (f"base={self.base}", f"data.path={self.output / row / 'rows.jsonl'}", "data.system=")
        told = (f"evaluation.limit={self.setting.limit}", "evaluation.max_new_tokens=12")
        return Job(row, label, recipe, changes, (*places, *told), self.setting)

    def references(self, row: str) -> list[Job]:
        """LoRA on each client's rows alone, and last on all of them."""
        steps, rows, owners = self.setting.rounds * self.setting.local_steps, self.setting.batch_size, self.owners[row]
        jobs = {f"alone {name}": (f"data.only={name}", f"batch_size={rows}") for name in owners}
        jobs["centralised"] = (f"batch_size={rows * len(owners)}",)
        return [self.job(row, label, "local_lora", (f"steps={steps}", *more)) for label, more in jobs.items()]

    def grid(self, row: str, recipe: str) -> list[Job]:
        """The rates to try, with another seed; none where the recipe measures its rate itself."""
        from kilotune.engine.composing.compose import compose

        if not self.args.tuned:
            return []
        plan = compose(recipe, "federate")
        if plan.optimizer.lr == "auto":
            return []
        # A recipe that sends every gradient has its rate on the server.
        key = "server_optimizer" if plan.recipe.local_steps == 1 else "optimizer"
        rates = {f"lr x {f:g}": [f"{key}.lr={getattr(plan, key).lr * f:.6g}"] for f in self.args.grid}
        if plan.estimator.forward_only:
            rates["measured lr"] = ["optimizer.lr=auto", "estimator.clip=3"]
        jobs = []
        for word, more in rates.items():
            with suppress(KilotuneError):  # not every recipe can measure its rate
                changes = same_compute(recipe, self.setting, ("seed=1", *more))
                jobs.append(self.job(row, f"{recipe}, {word}", recipe, changes))
        return jobs

    def tuned(self, row: str, recipe: str) -> Job | None:
        """The best of the grid with the ladder's seed; None before the grid is complete, or where nothing is better."""
        tried = [(job, self.found(job)) for job in self.grid(row, recipe)]
        if not tried or not all(result for _, result in tried):
            return None
        best = min(tried, key=lambda pair: loss_of(pair[1]))[0]
        changes = tuple("seed=0" if change == "seed=1" else change for change in best.changes)
        return None if best.label.endswith(" x 1") else self.job(row, best.label, recipe, changes)

    def found(self, job: Job) -> dict[str, Any]:
        """Its figures; empty when it was not run."""
        path = self.output / job.path
        if not path.exists():
            return dict(self.kept.get(job.row, {}).get(path.stem, {}))
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def failed(self, job: Job) -> str:
        """The last line of its error; empty when it did not fail."""
        path = (self.output / job.path).with_suffix(".log")
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def run(self, job: Job) -> None:
        """Make the run unless it is there; what it leaves is one JSON file, or its errors."""
        if self.found(job):
            return
        path = self.output / job.path
        folder, log = path.with_suffix(""), path.with_suffix(".log")
        print(f"{job.row} {job.label} ...", flush=True)
        try:
            with errors_to(log):
                summary = run_recipe(job.recipe, [*job.places, *job.changes], folder)
        except subprocess.CalledProcessError as error:
            print(f"{job.row} {job.label}: exit {error.returncode}: {self.failed(job)}", flush=True)
        else:
            facts = {key: getattr(job, key) for key in ("row", "label", "recipe", "changes")}
            content = facts | {"setting": asdict(job.setting), **kept_figures(summary, folder)}
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(content | {"environment": environment()}, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
            fresh(folder)  # ledgers of whole weights are gigabytes
            log.unlink(missing_ok=True)
            print(figure(f"{job.row} {job.label}", summary), flush=True)
        self.write_page()

    # -- the page -----------------------------------------------------------------------------------------------------

    def write_page(self) -> None:
        """The tables as Markdown, and beside it the figure and the runs' figures."""
        sections: list[str] = []
        panels: list[str] = []
        runs: dict[str, dict[str, dict[str, Any]]] = {}
        for row in self.owners:
            rungs = self.rungs(row)
            if rungs.points:
                runs[row] = {**self.shown(self.references(row)), **self.shown(self.jobs(row))}
                sections += ["", f"## {row}", "", *rungs.lines()]
                panels += [scatter(f"{row}: loss by bytes", rungs), curves(f"{row}: loss by rounds", rungs)]
        facts = "; ".join(f"{key} {value}" for key, value in environment().items())
        setting = ", ".join(f"{key} {value}" for key, value in asdict(self.setting).items())
        text = METHOD.format(**asdict(self.setting)).strip()
        seen = f"![Loss by bytes]({self.page.stem}.svg)" if panels else "Nothing was run in this setting yet."
        lines = ["# The byte ladder", "", HOW, text, "", seen]
        self.page.parent.mkdir(parents=True, exist_ok=True)
        content = "\n".join([*lines, *sections, "", f"Setting: {setting}.", "", f"<sub>{facts}</sub>"]) + "\n"
        self.page.write_text(content, encoding="utf-8")
        if panels:
            self.page.with_suffix(".svg").write_text(sheet(panels), encoding="utf-8")
        write_runs(self.page.with_suffix(".json"), runs)

    def shown(self, jobs: list[Job]) -> dict[str, dict[str, Any]]:
        """What the page shows of those runs that there are."""
        found = {job.path.stem: self.found(job) for job in jobs}
        return {name: {key: run[key] for key in SHOWN if key in run} for name, run in found.items() if run}

    def jobs(self, row: str) -> list[Job]:
        """All runs of the table."""
        return [job for name in self.own for job in (*self.plain(row, name), self.tuned(row, name)) if job]

    def rungs(self, row: str) -> Rungs:
        """What there is of one set of rows."""
        points: list[Point] = []
        errors, missing = dict(self.broken), list[str]()
        for job in self.jobs(row):
            if result := self.found(job):
                points.append(Point(job.label, job.recipe, result))
            elif why := self.failed(job):
                errors[job.label] = why
            else:
                missing.append(job.label)
        points.sort(key=lambda point: (point.bytes, point.loss))
        return Rungs(points, self._lines_across(row, points), errors, missing, self.setting.rounds)

    def _lines_across(self, row: str, points: list[Point]) -> dict[str, tuple[float, float | None]]:
        """Loss and exact match of the base, and of those runs without a federation that there are."""
        *alone, centralised = map(self.found, self.references(row))
        results = [result for result in (*alone, centralised, *(point.result for point in points)) if result]
        if not results:
            return {}
        found = {"base": (results[0]["before"]["loss"], results[0]["before"]["exact_match"])}
        if all(alone):
            found["alone"] = (mean(map(loss_of, alone)), mean(result["after"]["exact_match"] for result in alone))
        if centralised:
            found["centralised"] = (loss_of(centralised), centralised["after"]["exact_match"])
        return found


@contextmanager
def errors_to(path: Path) -> Iterator[None]:
    """Standard error of this process and those it starts goes into a file."""
    kept = os.dup(2)
    try:
        with open(path, "wb") as file:
            os.dup2(file.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def write_runs(path: Path, runs: dict[str, dict[str, dict[str, Any]]]) -> None:
    """JSON of every set of rows, a line for each run; the file is whole at any time."""
    rows = []
    for row, records in runs.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(record)}" for name, record in records.items()]
        rows.append(f" {json.dumps(row)}: {{\n" + ",\n".join(lines) + "\n }")
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    partial.replace(path)


def kept_figures(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What is kept of a run."""
    from kilotune.engine.runfolder import RunFolder

    events = RunFolder(folder).events()
    content = {"before": summary["eval"]["before"], "after": summary["eval"]["after"]}
    content |= {key: summary[key] for key in ("rounds", "clients", "seconds", "peak_rss_bytes", "digest")}
    if summary["command"] == "federate":
        part = mean(e["clients"] for e in events if e["event"] == "round") / summary["clients"]
        up, down = (summary[f"payload_{way}_bytes_per_client_round"] for way in ("up", "down"))
        content |= {"up": up, "down": down, "bytes": round((up + down) * summary["rounds"] * part)}
    seen = {e["round"]: e["overall"]["loss"] for e in events if e["event"] == "evaluation" and "round" in e}
    return {**content, "curve": sorted(seen.items())}


if __name__ == "__main__":
    main()
