"""Attacks: what clients that lie do to the final loss, with the defences and without; on a tiny model.

    python benchmarks/attacks.py                      # a table
    python benchmarks/attacks.py --format json        # {"clean", "attacks": [{name, defended, undefended, ..}], ..}
    python benchmarks/attacks.py --protocol seeds     # one protocol of three

Ten simulated clients learn a small language whose words are partly random; two of the ten lie by one plan. A run is

- clean: the plain mean with `defences: {enabled: false}` and nobody lying;
- undefended: the same with the two liars. The refusal of NaN by the codecs `dense` and `seed_scalar` is a defence and
  switched off as well; `coefficients` has no word for NaN, so there that one attack travels as `dense` numbers;
- defended: the recipe `robust_*` as shipped (guard and robust aggregation), with the two liars.

What each liar sends is said at `ATTACKS`. Liars that send numbers of ordinary size also claim a million rows, which an
undefended server believes: two reversed updates of ten only take back a quarter of what the other eight bring, and
nobody who wants to wreck a run would be so modest.

Rounds and rates are such that the three protocols end near the same clean loss, still on their way down. So the top
level's `clean`, that of the first protocol, is a yardstick for every attack; each attack also holds the `clean` of its
own protocol, by which `within_5_percent`, |defended / clean - 1| <= 0.05, is judged. `wrecked` says that the undefended
run ended above the loss at which half of the clean run's gain on the base is lost. Losses are cut at `LOSS_CAP`, which
also stands for a model that is not finite; a run whose server cannot go on is judged by the model it had come to
(`undefended_rounds` says after how many rounds).
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kilotune  # noqa: F401 - before torch, so that its arithmetic does not depend on the number of threads

# isort: split
import numpy as np
import torch

from common import environment
from kilotune.core.errors import KilotuneError
from kilotune.core.rng import stream
from kilotune.core.types import SeedUpdate, TensorUpdate, Update, WireContext
from kilotune.engine.composing.compose import build, override, read
from kilotune.engine.composing.plan import Plan
from kilotune.engine.flower.local import LocalExchange
from kilotune.engine.flower.messages import Handler, Reply, Request
from kilotune.engine.model.base import Base, load_base
from kilotune.engine.model.evaluation import EvaluationReport
from kilotune.engine.rounds.federation import Federation
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.session import encode_rows, evaluator, header, split_rows
from kilotune.engine.simulation import PackedRows, Simulation

LOSS_CAP = 100.0
BIAS = 1.5  # in root mean squares of the update
STALE = 20  # times the old answer: as it was, its direction is still a good one where the basis stays the same
TARGET = 0.05
CLIENTS, LIARS = 10, 2
CLAIMED = 10**6
LARGEST_FP16 = 65504.0
FIRST_STEP = 25  # where the first block's step, an fp16 number, lies in a payload of coefficients (docs/wire.md)
QUESTIONS = ("what", "which", "who")
LAW = {"red": 0.4, "green": 0.3, "blue": 0.15, "up": 0.08, "down": 0.04, "left": 0.03}
STOP = 0.4  # after every word but the first

SHARED = ["batch_size=8", "evaluation.generate=false", "evaluation.limit=40", "data.max_length=48", "threads=1"]
SHARED += ["keep_contributions=never", "data.template=plain", "micro_batch_tokens=512"]
PROTOCOLS: dict[str, tuple[str, list[str], str]] = {
    "coefficients": (
        "robust_coefficients",
        ["rounds=5", "basis.size=128", "local_steps=2", "optimizer.lr=0.045"],
        "aggregation={name: mean, weighting: examples}",
    ),
    "seeds": (
        "robust_seeds",
        ["rounds=6", "basis.size=64", "local_steps=6", "optimizer.lr=0.2", "estimator.epsilon=0.03"],
        "aggregation={name: seed_sum, weighting: examples}",
    ),
    "lora": (
        "robust_lora",
        ["rounds=5", "local_steps=2", "optimizer.lr=0.006"],
        "aggregation={name: mean, weighting: examples}",
    ),
}
"""Protocol -> (robust recipe, its settings for the tiny model, what makes it the plain mean)."""

Lie = Callable[[Plan, Replica, Request, Reply, dict[Any, Any]], Reply]
"""(plan, the replica, request, honest reply, what this liar and its friends remember) -> what is sent."""


# -- lies -------------------------------------------------------------------------------------------------------------


def _values(update: Update, change: Callable[[np.ndarray], np.ndarray]) -> Update:
    """The update with all its numbers, laid end to end, changed."""
    if isinstance(update, SeedUpdate):
        return SeedUpdate(update.indices, change(update.coefs).astype(np.float32), update.groups)
    changed = change(np.concatenate([tensor.numpy().reshape(-1) for tensor in update.tensors.values()]))
    sizes = [tensor.numel() for tensor in update.tensors.values()]
    parts = torch.from_numpy(changed.astype(np.float32)).split(sizes)
    return TensorUpdate({n: part.reshape(t.shape) for part, (n, t) in zip(parts, update.tensors.items(), strict=True)})


def changing(change: Callable[[np.ndarray, dict[Any, Any]], np.ndarray]) -> Lie:
    """Numbers of the honest update, changed; the dictionary is what the liars share in this round."""

    def lie(plan: Plan, replica: Replica, request: Request, reply: Reply, memory: dict[Any, Any]) -> Reply:
        number = int(request.body["round"])
        shared, context = memory.setdefault(number, {}), replica.context(number)
        honest = plan.uplink.decode(reply.payloads[0], context)
        sent = _values(honest, lambda numbers: change(numbers, shared))
        return replace(reply, payloads=(_encoded(plan, sent, context),))

    return lie


def _encoded(plan: Plan, update: Update, context: WireContext) -> bytes:
    """A payload that holds these numbers; NaN is written into a finished one, since no encoder writes it."""
    tables = [update.coefs] if isinstance(update, SeedUpdate) else [t.numpy() for t in update.tensors.values()]
    half = getattr(plan.uplink, "dtype", "") == "fp16"
    if any(np.isnan(table).any() for table in tables):
        payload = bytearray(plan.uplink.encode(_values(update, np.nan_to_num), context, {}))
        if plan.uplink.method_name() == "coefficients":
            payload[FIRST_STEP : FIRST_STEP + 2] = np.array([np.nan], "<f2").tobytes()
        elif tables[0].size:
            number = np.array([np.nan], "<f2" if half else "<f4").tobytes()
            payload[-len(number) :] = number
        return bytes(payload)
    if half:  # as large as it can say
        update = _values(update, lambda numbers: np.clip(numbers, -LARGEST_FP16, LARGEST_FP16))
    return plan.uplink.encode(update, context, {})


def _huge(numbers: np.ndarray, shared: dict[Any, Any]) -> np.ndarray:
    return np.where(np.arange(numbers.size) % 2, -1e6, 1e6)


def _biased(numbers: np.ndarray, shared: dict[Any, Any]) -> np.ndarray:
    size = BIAS * np.sqrt(np.mean(np.square(numbers, dtype=np.float64)))
    against = shared.setdefault(numbers.size, -np.sign(numbers))  # the first liar's; pairs may be fewer
    return numbers + size * against


def stale(plan: Plan, replica: Replica, request: Request, reply: Reply, memory: dict[Any, Any]) -> Reply:
    """The liar's answer to the first round in every later one, larger."""
    number = int(request.body["round"])
    context = replica.context(number)
    if number == 1:
        memory[request.body["client"]] = plan.uplink.decode(reply.payloads[0], context)
        return reply
    old = _values(memory[request.body["client"]], lambda numbers: STALE * numbers)
    return replace(reply, payloads=(_encoded(plan, old, context),))


def duplicated(plan: Plan, replica: Replica, request: Request, reply: Reply, memory: dict[Any, Any]) -> Reply:
    """One payload from all liars of a round: the first one's, reversed."""
    turned = reverse(plan, replica, request, reply, memory)
    kept = memory[int(request.body["round"])].setdefault("payload", turned.payloads[0])
    return replace(reply, payloads=(kept,))


reverse = changing(lambda numbers, shared: -numbers)

ATTACKS: dict[str, tuple[Lie, bool]] = {
    "NaN": (changing(lambda numbers, shared: np.full_like(numbers, np.nan)), False),
    "+-1e6": (changing(_huge), False),  # by turns
    "sign-flipped": (reverse, True),
    "stale": (stale, True),
    "duplicated": (duplicated, True),
    "small bias": (changing(_biased), True),
}
"""Name -> (the lie, whether a million rows are claimed too)."""


def lying(
    honest: Handler, lie: Lie, claims: bool, plan: Plan, replica: Replica, memory: dict[Any, Any], name: str
) -> Handler:
    """A client's handler that lies about its training."""

    def handler(request: Request) -> Reply:
        reply = honest(request)
        if request.kind != "train" or reply.error is not None:
            return reply
        told = replace(request, body={**request.body, "client": name})
        reply = lie(plan, replica, told, reply, memory)
        return replace(reply, body={**reply.body, "num_examples": CLAIMED}) if claims else reply

    return handler


# -- runs -------------------------------------------------------------------------------------------------------------


def rows(path: Path) -> Path:
    """A small language: an answer is words drawn by one law, and ends by chance; every client has rows of all of it."""
    words, law, lines = list(LAW), list(LAW.values()), []
    for client in range(CLIENTS):
        rng = stream(client, "attacks")
        for n in range(36):
            length = int(rng.geometric(STOP))
            row = {
                "instruction": QUESTIONS[int(rng.integers(len(QUESTIONS)))],
                "input": "",
                "output": " ".join(words[i] for i in rng.choice(len(words), min(length, 6), p=law)),
                "client": f"c{client}",
                "split": "test" if n < 4 else "train",
            }
            lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_base(folder: Path) -> Path:
    """A Llama of one layer and a tokenizer of whole words, saved as a model folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<end>", "<unk>", *QUESTIONS, *LAW])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(str(folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.2,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
        )
        LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


@dataclass(frozen=True)
class Run:
    """Losses before and after, and what a round cost."""

    before: float
    after: float
    rounds: int
    seconds: float
    guard_seconds: float
    refused: int


class Ground:
    """Base and rows on disk; every run starts from the base's own weights."""

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        """`tell` hears of the guard's verdicts, and of what ends a run."""
        self.folder, self._tell = folder, tell
        self.shared = [*SHARED, f"base={tiny_base(folder / 'base')}", f"data.path={rows(folder / 'rows.jsonl')}"]

    def plan(self, protocol: str, *settings: str) -> Plan:
        recipe, own, _ = PROTOCOLS[protocol]
        return build(override(read(recipe), [*self.shared, *own, *settings]), "federate")

    def run(self, plan: Plan, attack: str | None = None) -> Run:
        """One federation, whole."""
        events: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            federation = self._federation(plan, Path(output), attack, events.append)
            try:
                federation.run()
            except KilotuneError as error:  # what the liars left cannot be trained on or sent
                self._tell(f"{error}")
                federation.evaluate(len(federation.ledger))
        for event in events:
            if event["event"] == "guard":
                self._tell(json.dumps(event))
        losses = [event["overall"]["loss"] for event in events if event["event"] == "evaluation"]
        done = [event for event in events if event["event"] == "round"]
        return Run(
            losses[0],
            LOSS_CAP if losses[-1] is None else min(losses[-1], LOSS_CAP),
            len(done),
            sum(event["seconds"] for event in done) / max(1, len(done)),
            sum(event["guard_seconds"] for event in done) / max(1, len(done)),
            sum(len(event["refused"]) for event in events if event["event"] == "guard"),
        )

    def _federation(self, plan: Plan, output: Path, attack: str | None, emit: Callable[..., None]) -> Federation:
        base: Base = load_base(plan.recipe.base, writable=True)
        ledger = Ledger.open(output, header(plan, base))
        shares, replica = split_rows(plan, alone=False), Replica(base, plan)
        measure = evaluator(plan, lambda event: None)

        def encode(members: list[Any], client: str) -> list[Any]:
            return encode_rows(plan, base, members, client, lambda event: None)

        held_out = encode(shares.held_out, "")
        simulation = Simulation(
            replica, ledger, PackedRows(shares.clients), encode, measure, output, lambda event: None
        )
        handlers = simulation.handlers()
        memory: dict[Any, Any] = {}
        for name in sorted(handlers)[:: CLIENTS // LIARS][:LIARS] if attack is not None else ():
            handlers[name] = lying(handlers[name], *ATTACKS[attack or ""], plan, replica, memory, name)

        def evaluate(state: Replica) -> EvaluationReport:
            return measure(state, held_out)

        return Federation(plan, replica, ledger, LocalExchange(handlers), output, emit, evaluate, shared=True)


@contextmanager
def believing_codecs() -> Iterator[None]:
    """Codecs that decode NaN and infinity like any other number."""
    modules: list[Any] = [importlib.import_module(f"kilotune.codec.{name}") for name in ("dense", "seed_scalar")]
    kept = [(module, module.check_finite) for module in modules]
    try:
        for module, _ in kept:
            module.check_finite = lambda *words: None
        yield
    finally:
        for module, check in kept:
            module.check_finite = check


def measured(ground: Ground, protocol: str, names: list[str], show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """One protocol: clean, and every attack with and without the defences."""
    robust, bare = ground.plan(protocol), [PROTOCOLS[protocol][2], "defences.enabled=false"]
    clean, quiet = ground.run(ground.plan(protocol, *bare)), ground.run(robust)
    half_lost, rounds = (clean.before + clean.after) / 2, []
    for name in names:
        defended = ground.run(robust, name)
        speaking = ["uplink={name: dense}"] if (protocol, name) == ("coefficients", "NaN") else []
        with believing_codecs():
            undefended = ground.run(ground.plan(protocol, *bare, *speaking), name)
        rounds.append(
            {
                "name": f"{protocol}: {name}",
                "protocol": protocol,
                "clean": round(clean.after, 4),
                "defended": round(defended.after, 4),
                "undefended": round(undefended.after, 4),
                "within_5_percent": abs(defended.after / clean.after - 1) <= TARGET,
                "wrecked": undefended.after > half_lost,
                "refused": defended.refused,
                "undefended_rounds": undefended.rounds,
            }
        )
        show(rounds[-1])
    return {
        "base": round(clean.before, 4),
        "clean": round(clean.after, 4),
        "defended_clean": round(quiet.after, 4),
        "half_lost": round(half_lost, 4),
        "round_seconds": round(quiet.seconds, 4),
        "guard_seconds": round(quiet.guard_seconds, 4),
        "guard_share": round(quiet.guard_seconds / quiet.seconds, 4),
        "attacks": rounds,
    }


# -- output -----------------------------------------------------------------------------------------------------------


def _line(row: dict[str, Any]) -> None:
    verdict = ("" if row["within_5_percent"] else "  MISSED") + ("" if row["wrecked"] else "  not wrecked")
    numbers = "".join(f"{row[key]:12.3f}" for key in ("clean", "defended", "undefended"))
    print(f"{row['name']:28s}{numbers}{row['refused']:9d}{verdict}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--protocol", nargs="+", choices=tuple(PROTOCOLS), default=list(PROTOCOLS))
    parser.add_argument("--attack", nargs="+", choices=tuple(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--verdicts", action="store_true", help="also what the guard decided, on standard error")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = args.format == "text"

    def tell(line: str) -> None:
        if args.verdicts:
            print(line, file=sys.stderr)

    if text:
        print(f"{'attack':28s}{'clean':>12s}{'defended':>12s}{'undefended':>12s}{'refused':>9s}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ground, show = Ground(Path(folder), tell), _line if text else lambda row: None
        found = {name: measured(ground, name, args.attack, show) for name in args.protocol}
    content = {
        "clean": found[args.protocol[0]]["clean"],
        "attacks": [row for part in found.values() for row in part.pop("attacks")],
        "protocols": found,
        "setting": {"clients": CLIENTS, "liars": LIARS, "claimed_rows": CLAIMED, "loss_cap": LOSS_CAP},
        "seconds": round(time.monotonic() - started, 1),
        "environment": environment(),
    }
    if args.output is not None:
        args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not text:
        print(json.dumps(content))
        return
    for name, part in found.items():
        print(
            f"{name}: base {part['base']:.3f}, wrecked above {part['half_lost']:.3f}, defended without liars "
            f"{part['defended_clean']:.3f}; defences {part['guard_seconds'] * 1e3:.1f} ms of a round of "
            f"{part['round_seconds'] * 1e3:.0f} ms ({part['guard_share']:.1%})"
        )


if __name__ == "__main__":
    main()
