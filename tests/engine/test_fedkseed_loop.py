"""FedKSeed against its published loop: weights perturbed and restored in place, every direction added on its own."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from federating import plan, quiet, write_rows
from kilotune.codec.seed_scalar import SeedScalar
from kilotune.core.noise import noise
from kilotune.engine.model.base import load_base
from kilotune.engine.model.tuned import from_ledger
from kilotune.engine.rounds.bounds import sender_number
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rows.batches import micro_batches
from kilotune.engine.session import encode_rows, federate, split_rows
from kilotune.engine.training.step import BatchObjective

K, ROUNDS, STEPS, RATE, EPSILON = 8, 2, 4, 4e-3, 1e-2
CLINC = Path(__file__).parents[3] / "shared" / "data" / "clinc150.jsonl.gz"


class PublishedLoop:
    """The arithmetic of the published client and server, in float32, over this repository's noise."""

    def __init__(self, recipe, losses) -> None:
        self.base = load_base(recipe.recipe.base, writable=True)
        self.weights = {name: param.data for name, param in sorted(self.base.parameters().items())}
        self.start = {name: weight.clone() for name, weight in self.weights.items()}
        self.root, self.losses = recipe.root(1), losses(self.base)
        self.sums = np.zeros(K)  # a_k, by which the server remembers everything

    def add(self, k: int, amount: float) -> None:
        for name, weight in self.weights.items():
            z = torch.from_numpy(noise("gaussian", self.root, k, name, 0, weight.numel())).view(weight.shape)
            weight.add_(z, alpha=amount)

    @torch.no_grad()
    def rebuild(self) -> None:
        for name, weight in self.weights.items():
            weight.copy_(self.start[name])
        for k in np.flatnonzero(self.sums):
            self.add(int(k), -RATE * self.sums[k])

    @torch.no_grad()
    def steps(self, client: str, indices: np.ndarray) -> list[float]:
        """The scalars a client sends for the directions it has drawn."""
        scalars = []
        for k in map(int, indices):
            self.add(k, EPSILON)
            plus = self.losses[client]()
            self.add(k, -2 * EPSILON)
            minus = self.losses[client]()
            self.add(k, EPSILON)
            scalars.append((plus - minus) / (2 * EPSILON))
            self.add(k, -RATE * scalars[-1])
        return scalars


def made_rows(path):
    """Of three clients, one of which has fewer."""
    lines = write_rows(path).read_text().splitlines()
    path.write_text("\n".join(lines[5:]) + "\n")


def real_rows(path):
    """The shortest rows of three clients, each with another number of them."""
    with gzip.open(CLINC, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in sorted(file, key=len)]
    chosen = []
    for client, count in {"utility": 3, "home": 2, "work": 1}.items():
        for split, most in (("train", count), ("test", 1)):
            chosen += [row for row in rows if (row["client"], row["split"]) == (client, split)][:most]
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen))


REAL = pytest.param(
    real_rows,
    marks=[pytest.mark.shared, pytest.mark.skipif(not CLINC.exists(), reason="there is no shared data folder")],
)


@pytest.mark.parametrize("write", [made_rows, REAL])
def test_rounds_are_those_of_the_published_loop(base, tmp_path, monkeypatch, write):
    """Kills: signs, rates, noise or weights of the clients other than published; steps from stale weights."""
    data = tmp_path / "rows.jsonl"
    write(data)
    settings = (
        f"rounds={ROUNDS}",
        f"local_steps={STEPS}",
        "batch_size=100",
        "data.max_length=512",
        f"basis.size={K}",
        "defences.enabled=false",
    )
    recipe = plan(base, data, "fedkseed", *settings, f"optimizer.lr={RATE}", f"estimator.epsilon={EPSILON}")
    sent, encode = {}, SeedScalar.encode

    def noting(codec, update, context, state):
        sent[context.round, context.sender] = update
        return encode(codec, update, context, state)

    monkeypatch.setattr(SeedScalar, "encode", noting)
    federate(recipe, tmp_path / "run", quiet)
    rows = split_rows(recipe, alone=False).clients

    def losses(loaded):
        def loss(members):
            examples = encode_rows(recipe, loaded, members, "", quiet)
            batches = micro_batches(examples, recipe.recipe, loaded.model, loaded.tokenizer.pad_token_id)
            objective = BatchObjective(loaded.model, batches)
            return lambda: sum(float(part()) for part in objective.parts())

        return {name: loss(members) for name, members in rows.items()}

    loop = PublishedLoop(recipe, losses)
    shares = {name: len(members) / sum(map(len, rows.values())) for name, members in rows.items()}
    for number in range(1, ROUNDS + 1):
        heard = np.zeros(K)
        for name in rows:
            ours = sent[number, sender_number(name)]
            loop.rebuild()
            scalars = loop.steps(name, ours.indices)
            np.testing.assert_allclose(-ours.coefs / RATE, scalars, rtol=1e-3, atol=1e-3)
            np.add.at(heard, ours.indices, shares[name] * np.array(scalars))
        loop.sums += heard
    loop.rebuild()
    weights = from_ledger(Ledger.load(tmp_path / "run"), None).state()
    moved = sum(float((weights[name] - loop.start[name]).square().sum()) for name in loop.weights) ** 0.5
    apart = sum(float((weights[name] - value).square().sum()) for name, value in loop.weights.items()) ** 0.5
    assert moved > 0.01
    assert apart <= 1e-3 * moved
