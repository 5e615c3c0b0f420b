"""Attacks: what clients that lie do to the final loss, with the defences and without; on a tiny model.

    python benchmarks/attacks.py                      # a table
    python benchmarks/attacks.py --format json        # {"clean", "attacks": [{name, defended, undefended, ..}]}

Ten simulated clients learn a small language; two of them lie from the second round on. Three protocols: coefficients
of seeded directions, pairs of seed and scalar, LoRA's tensors. For each the same attack meets

- defended: the recipe `robust_*` as shipped (guard and robust aggregation);
- guarded: the plain mean behind the guard, what every recipe has by default;
- undefended: the plain mean with `defences: {enabled: false}`; there the refusal of NaN by `dense` and `seed_scalar`
  is switched off as well, because it is a defence. `coefficients` cannot hold NaN: its decoder refuses the payload.

`clean` is the plain mean with nobody lying. Names with "claims" also report a million rows. A loss is cut at
`LOSS_CAP` nats; a model that is not finite any more counts as that.
"""

import argparse
import importlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kilotune  # noqa: F401 - before torch, so that its arithmetic does not depend on the number of threads
from common import environment
from kilotune.core.errors import FederationError
from kilotune.core.rng import stream
from kilotune.core.types import SeedUpdate, TensorUpdate, Update
from kilotune.engine.compose import Plan, build, override, read
from kilotune.engine.evaluation import EvaluationReport
from kilotune.engine.federation import Federation
from kilotune.engine.flower.local import LocalExchange
from kilotune.engine.flower.messages import Handler, Reply, Request
from kilotune.engine.ledger import Ledger
from kilotune.engine.models import Base, load_base
from kilotune.engine.replica import Replica
from kilotune.engine.session import encode_rows, evaluator, header, split_rows
from kilotune.engine.simulation import PackedRows, Simulation

LOSS_CAP = 100.0
CLIENTS, LIARS, ROUNDS = 10, 2, 8
CLAIMED = 10**6
LARGEST_FP16 = 65504.0
FIRST_STEP = 25  # where the first block's step, an fp16 number, lies in a payload of coefficients (docs/wire.md)
WORDS = ("red", "blue", "green", "up", "down", "left", "right", "one", "two", "three")
SHARED = ["batch_size=8", "evaluation.generate=false", "evaluation.limit=40", "data.max_length=48", "threads=1"]
SHARED += [f"rounds={ROUNDS}", "keep_contributions=never", "data.template=plain", "micro_batch_tokens=512"]
PROTOCOLS: dict[str, tuple[str, list[str], list[str]]] = {
    "coefficients": (
        "robust_coefficients",
        ["basis.size=512", "local_steps=3", "optimizer.lr=0.1"],
        ["aggregation={name: mean, weighting: examples}"],
    ),
    "seeds": (
        "robust_seeds",
        ["basis.size=64", "local_steps=6", "optimizer.lr=0.01", "estimator.epsilon=0.03"],
        ["aggregation={name: seed_sum, weighting: examples}", "shared_directions=false"],
    ),
    "lora": (
        "robust_lora",
        ["local_steps=3", "optimizer.lr=0.1"],
        ["aggregation={name: mean, weighting: examples}"],
    ),
}
"""Protocol -> (robust recipe, its settings for the tiny model, what makes it the plain mean)."""

Lie = Callable[[Plan, Replica, Request, Reply, dict[str, Any]], Reply]
"""(plan, the replica, request, honest reply, what this liar and its friends remember) -> what is sent."""


# -- lies -------------------------------------------------------------------------------------------------------------


def _values(update: Update, change: Callable[[np.ndarray], np.ndarray]) -> Update:
    if isinstance(update, SeedUpdate):
        return SeedUpdate(update.indices, change(update.coefs).astype(np.float32), update.groups)
    return TensorUpdate({n: torch.from_numpy(change(t.numpy()).astype(np.float32)) for n, t in update.tensors.items()})


def changing(change: Callable[[np.ndarray, dict[str, Any]], np.ndarray]) -> Lie:
    """Numbers of the honest update, changed."""

    def lie(plan: Plan, replica: Replica, request: Request, reply: Reply, memory: dict[str, Any]) -> Reply:
        context = replica.context(int(request.body["round"]))
        honest = plan.uplink.decode(reply.payloads[0], context)
        sent = _values(honest, lambda numbers: change(numbers, memory))
        return replace(reply, payloads=(_encoded(plan, sent, context),))

    return lie


def _encoded(plan: Plan, update: Update, context: Any) -> bytes:
    """A payload that holds these numbers; NaN is written into a finished one, since no encoder writes it."""
    spoilt = _values(update, np.isnan)
    if _any(spoilt):
        payload = bytearray(plan.uplink.encode(_values(update, np.nan_to_num), context, {}))
        width = 4 if plan.uplink.method_name() == "seed_scalar" else 2
        place = FIRST_STEP if plan.uplink.method_name() == "coefficients" else len(payload) - width
        payload[place : place + width] = np.array([np.nan], f"<f{width}").tobytes()
        return bytes(payload)
    if getattr(plan.uplink, "dtype", "") == "fp16":  # as large as it can say
        update = _values(update, lambda numbers: np.clip(numbers, -LARGEST_FP16, LARGEST_FP16))
    return plan.uplink.encode(update, context, {})


def _any(update: Update) -> bool:
    if isinstance(update, SeedUpdate):
        return bool(update.coefs.any())
    return any(bool(tensor.any()) for tensor in update.tensors.values())


def stale(plan: Plan, replica: Replica, request: Request, reply: Reply, memory: dict[str, Any]) -> Reply:
    """The answer to the first round that this liar lied in, ever again."""
    kept = memory.setdefault(("first", request.body["client"]), reply.payloads[0])
    return replace(reply, payloads=(kept,))


def duplicated(plan: Plan, replica: Replica, request: Request, reply: Reply, memory: dict[str, Any]) -> Reply:
    """The answer of the first liar of the round, from all of them."""
    kept = memory.setdefault(("shared", request.body["round"]), reply.payloads[0])
    return replace(reply, payloads=(kept,))


def _bias(numbers: np.ndarray, memory: dict[str, Any]) -> np.ndarray:
    """All liars push all numbers the same way, by as much as they usually differ."""
    return numbers + float(np.sqrt(np.mean(np.square(numbers, dtype=np.float64))))


ATTACKS: dict[str, tuple[Lie, bool]] = {
    "nan": (changing(lambda numbers, memory: np.full_like(numbers, np.nan)), False),
    "+1e6": (changing(lambda numbers, memory: np.full_like(numbers, 1e6)), False),
    "-1e6": (changing(lambda numbers, memory: np.full_like(numbers, -1e6)), False),
    "flip x10": (changing(lambda numbers, memory: -10 * numbers), False),
    "flip": (changing(lambda numbers, memory: -numbers), False),
    "flip, claims": (changing(lambda numbers, memory: -numbers), True),
    "stale": (stale, False),
    "stale, claims": (stale, True),
    "duplicated": (duplicated, False),
    "duplicated, claims": (duplicated, True),
    "small bias": (changing(_bias), False),
    "small bias, claims": (changing(_bias), True),
}
"""Name -> (the lie, whether a million rows are claimed too)."""


def lying(
    honest: Handler, lie: Lie, claims: bool, plan: Plan, replica: Replica, memory: dict[str, Any], name: str
) -> Handler:
    """A client's handler that lies about its training."""

    def handler(request: Request) -> Reply:
        reply = honest(request)
        if request.kind != "train" or reply.error is not None or int(request.body["round"]) < 2:
            return reply
        told = replace(request, body={**request.body, "client": name})
        reply = lie(plan, replica, told, reply, memory)
        return replace(reply, body={**reply.body, "num_examples": CLAIMED}) if claims else reply

    return handler


# -- runs -------------------------------------------------------------------------------------------------------------


def rows(path: Path) -> Path:
    """A small language: a word is answered by one of three words and a last one; every client has all of it."""
    lines = []
    for client in range(CLIENTS):
        rng = stream(client, "attacks")
        for n in range(28):
            word = int(rng.integers(len(WORDS)))
            answer = f"{WORDS[0] if word < 6 else WORDS[word % 3]} {WORDS[9]}"
            row = {"instruction": WORDS[word], "output": answer, "client": f"c{client}"}
            lines.append(json.dumps({**row, "input": "", "split": "test" if n < 4 else "train"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_base(folder: Path) -> Path:
    """A Llama of one layer and a tokenizer of whole words, saved as a model folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(str(folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
        )
        LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


class Ground:
    """Base and rows, loaded once; every run starts from the base's own weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shared = [*SHARED, f"base={tiny_base(folder / 'base')}", f"data.path={rows(folder / 'rows.jsonl')}"]

    def plan(self, protocol: str, *settings: str) -> Plan:
        recipe, own, _ = PROTOCOLS[protocol]
        return build(override(read(recipe), [*self.shared, *own, *settings]), "federate")

    def run(self, plan: Plan, attack: str | None) -> dict[str, Any]:
        """Final loss, and what the rounds cost."""
        events: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            federation = self._federation(plan, Path(output), attack, events.append)
            try:
                loss = federation.run()["after"].overall.loss
            except FederationError:  # nobody can train on what the liars left
                loss = federation.evaluate(len(federation.ledger)).overall.loss
        done = [event for event in events if event["event"] == "round"]
        return {
            "loss": min(loss, LOSS_CAP) if math.isfinite(loss) else LOSS_CAP,
            "rounds": len(done),
            "round_seconds": sum(e["seconds"] for e in done) / max(1, len(done)),
            "guard_seconds": sum(e["guard_seconds"] for e in done) / max(1, len(done)),
            "refused": sum(len(e["refused"]) for e in events if e["event"] == "guard"),
        }

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
        memory: dict[str, Any] = {}
        for name in sorted(handlers)[:: CLIENTS // LIARS][:LIARS] if attack is not None else ():
            handlers[name] = lying(handlers[name], *ATTACKS[attack or ""], plan, replica, memory, name)

        def evaluate(state: Replica) -> EvaluationReport:
            return measure(state, held_out)

        return Federation(plan, replica, ledger, LocalExchange(handlers), output, emit, evaluate, shared=True)


@contextmanager
def believing_codecs() -> Iterator[None]:
    """Codecs that decode NaN and infinity like any other number."""
    modules = [importlib.import_module(f"kilotune.codec.{name}") for name in ("dense", "seed_scalar")]
    kept = [(module, module.check_finite) for module in modules if hasattr(module, "check_finite")]
    try:
        for module, _ in kept:
            module.check_finite = lambda *words: None
        yield
    finally:
        for module, check in kept:
            module.check_finite = check


def measured(ground: Ground, protocol: str, names: list[str]) -> dict[str, Any]:
    """One protocol: clean, and every attack three times."""
    plain = PROTOCOLS[protocol][2]
    robust, guarded = ground.plan(protocol), ground.plan(protocol, *plain)
    bare = ground.plan(protocol, *plain, "defences.enabled=false")
    clean, quiet = ground.run(guarded, None), ground.run(robust, None)
    rounds = []
    for name in names:
        defended, behind = ground.run(robust, name), ground.run(guarded, name)
        with believing_codecs():
            undefended = ground.run(bare, name)
        rounds.append(
            {
                "name": f"{protocol}: {name}",
                "defended": round(defended["loss"], 4),
                "guarded": round(behind["loss"], 4),
                "undefended": round(undefended["loss"], 4),
                "clean": round(clean["loss"], 4),
                "within_5_percent": defended["loss"] <= 1.05 * clean["loss"],
                "wrecked_without": undefended["loss"] > 1.05 * clean["loss"],
                "refused": defended["refused"],
                "rounds_without": undefended["rounds"],
            }
        )
        print_row(rounds[-1])
    cost = {key: round(quiet[key], 5) for key in ("round_seconds", "guard_seconds")}
    cost["fraction"] = round(quiet["guard_seconds"] / quiet["round_seconds"], 4)
    return {"clean": clean["loss"], "robust_clean": quiet["loss"], "cost": cost, "attacks": rounds}


# -- output -----------------------------------------------------------------------------------------------------------

print_row: Callable[[dict[str, Any]], None] = lambda row: None  # noqa: E731 - replaced for a terminal


def _line(row: dict[str, Any]) -> None:
    numbers = "".join(f"{row[key]:12.3f}" for key in ("clean", "defended", "guarded", "undefended"))
    print(f"{row['name']:34s}{numbers}{row['refused']:9d}", flush=True)


def main() -> None:
    global print_row
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--protocol", nargs="*", choices=tuple(PROTOCOLS), default=list(PROTOCOLS))
    parser.add_argument("--attack", nargs="*", choices=tuple(ATTACKS), default=list(ATTACKS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.format == "text":
        print_row = _line
        print(f"{'attack':34s}{'clean':>12s}{'defended':>12s}{'guarded':>12s}{'undefended':>12s}{'refused':>9s}")
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder))
        found = {name: measured(ground, name, args.attack) for name in args.protocol}
    content = {
        "clean": {name: round(part["clean"], 4) for name, part in found.items()},
        "attacks": [row for part in found.values() for row in part["attacks"]],
        "cost": {name: part["cost"] for name, part in found.items()},
        "robust_clean": {name: round(part["robust_clean"], 4) for name, part in found.items()},
        "setting": {"clients": CLIENTS, "liars": LIARS, "rounds": ROUNDS, "loss_cap": LOSS_CAP},
        "environment": environment(),
    }
    if args.output is not None:
        args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if args.format == "json":
        print(json.dumps(content))
    else:
        for name, part in found.items():
            cost = part["cost"]
            print(f"{name}: defences {cost['guard_seconds'] * 1e3:.1f} ms a round, {cost['fraction']:.1%}")


if __name__ == "__main__":
    main()
