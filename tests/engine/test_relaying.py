"""Peers that add up one another's bytes: every one comes to the same model, which is that of the published loop."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from federating import CLIENTS, content, independent, plan, quiet
from kilotune.core.errors import IncompatibleError
from kilotune.core.noise import stream_key
from kilotune.core.reference import fill
from kilotune.core.rng import derive, stream
from kilotune.engine.afterwards.audit import audit
from kilotune.engine.composing.compose import build
from kilotune.engine.flower.local import LocalExchange
from kilotune.engine.model.base import load_base
from kilotune.engine.rounds.bounds import said_by
from kilotune.engine.rounds.federation import Federation
from kilotune.engine.rounds.identity import HistoryError
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rows.batches import BatchSampler, micro_batches
from kilotune.engine.session import federate, header
from kilotune.engine.training.step import BatchObjective

LR, EPSILON, SIZE, ROUNDS = 0.002, 0.01, 64, 5
SETTINGS = (
    "local_steps=1",
    f"optimizer.lr={LR}",
    f"uplink={{name: one_byte, unit: {LR}, rounding: nearest}}",
    f"downlink.unit={LR}",
    "evaluation.limit=3",
)
HERE = {1: ("ada", "bob"), 2: CLIENTS, 3: ("ada", "cyd"), 4: ("bob", "cyd"), 5: CLIENTS}


class Coming(LocalExchange):
    """Peers come and go, as HERE says."""

    def __init__(self, workers, ledger):
        super().__init__({name: worker.handle for name, worker in workers.items()})
        self._ledger = ledger

    def roster(self):
        return [c for c in super().roster() if c in HERE.get(len(self._ledger) + 1, CLIENTS)]

    def exchange(self, requests, deadline_s=None):
        here = self.roster()
        yield from super().exchange({c: r for c, r in requests.items() if c in here}, deadline_s)


@pytest.fixture(scope="module")
def met(base, data, tmp_path_factory):
    """(plan, workers, the server's replica, ledger, folder) after five rounds in which peers came and went."""
    folder = tmp_path_factory.mktemp("peers")
    recipe = plan(base, data, "just_one_byte", *SETTINGS, f"rounds={ROUNDS}")
    workers = {name: independent(name, recipe, base, folder) for name in CLIENTS}
    loaded = load_base(str(base), writable=True)
    server, ledger = Replica(loaded, recipe), Ledger.open(folder / "server", header(recipe, loaded))
    Federation(recipe, server, ledger, Coming(workers, ledger), folder / "server", quiet).run()
    return recipe, workers, server, ledger, folder


def test_peers_that_came_and_went_all_end_with_one_model(base, met):
    """Late, away, always there, or started again on the bytes it kept. Kills: a sum made by the server alone; a peer
    that goes on without the rounds it missed."""
    recipe, workers, server, ledger, folder = met
    assert [tuple(part.client for part in r.contributions) for r in ledger.records] == list(HERE.values())
    assert {worker.replica.digest() for worker in workers.values()} == {server.digest()}
    assert server.digest() != server.base.digest
    again = independent("bob", recipe, base, folder)
    assert (again.round, again.replica.digest()) == (ROUNDS, server.digest())


# -- the published loop, written down a second time -------------------------------------------------------------------


def number_of(peer: str) -> int:
    return int.from_bytes(hashlib.sha256(peer.encode()).digest()[:4], "little")


def noise(params, scales, root, index):
    """z of one direction: signs of every tensor times a row of the Walsh-Hadamard matrix, times the tensor's rms."""
    row = np.array([(-1.0) ** bin(index & j).count("1") for j in range(SIZE)])
    return {
        name: torch.from_numpy(
            scales[name] * fill("sign", stream_key("sign", root, 0, name), 0, p.numel()) * np.resize(row, p.numel())
        ).reshape(p.shape)
        for name, p in params.items()
    }


def byte_of(value: float) -> int:
    sizes = [0.0] + [math.exp((m - 64) / 8) for m in range(1, 128)]
    m = min(range(128), key=lambda m: abs(sizes[m] - abs(value)))
    return m + 128 * (value < 0 and m > 0)


def value_of(byte: int) -> float:
    size = math.exp((byte % 128 - 64) / 8) if byte % 128 else 0.0
    return -size if byte >= 128 else size


def test_the_bytes_and_the_model_are_those_of_the_plain_loop(base, met):
    """w + eps z, w - eps z, one byte each, and w - lr / sqrt(n) * sum of g z on copies of the weights in float64 steps.

    Kills: another peer's direction; a sign that is turned; n for sqrt(n); a byte of the sum instead of the steps.
    """
    recipe, workers, server, ledger, _ = met
    model = load_base(str(base), writable=True).model
    params = {name: p for name, p in model.named_parameters() if name in server.trainable.state()}
    scales = {name: float(p.double().square().mean().sqrt()) for name, p in params.items()}

    def loss(peer, at, moved):
        rows = workers[peer].train
        sampler = BatchSampler(len(rows), recipe.recipe.batch_size, derive(recipe.recipe.seed, "batches", peer))
        batches = micro_batches([rows[i] for i in sampler.indices(at)], recipe.recipe, model, 0)
        kept = {name: p.data.clone() for name, p in params.items()}
        for name, p in params.items():
            p.data = (p.data.double() + moved[name]).float()
        with torch.no_grad():
            total = sum(float(part()) for part in BatchObjective(model, batches).parts())
        for name, p in params.items():
            p.data = kept[name]
        return total

    for number, here in HERE.items():
        root, steps = recipe.root(number), {}
        for peer in here:
            rng = stream(recipe.recipe.seed, "step", f"{number_of(peer):08x}", number, 0)
            z = noise(params, scales, root, int(rng.integers(SIZE)))
            plus, minus = (loss(peer, number - 1, {n: s * EPSILON * t for n, t in z.items()}) for s in (1, -1))
            steps[number_of(peer)] = (byte_of(-(plus - minus) / (2 * EPSILON)), z)
        rising = sorted(steps)
        sent = b"".join(n.to_bytes(4, "little") for n in rising) + bytes(steps[n][0] for n in rising)
        assert ledger.payload(number)[10:] == sent
        for byte, z in steps.values():
            for name, p in params.items():
                p.data = (p.data.double() + LR / math.sqrt(len(here)) * value_of(byte) * z[name]).float()
    for name, tensor in server.trainable.state().items():
        torch.testing.assert_close(params[name].data, tensor, rtol=0, atol=2e-6)


# -- what the relay cannot do -----------------------------------------------------------------------------------------


def test_a_byte_that_the_relay_altered_is_noticed_by_its_sender_and_by_nobody_else(base, data, tmp_path):
    """Before it applies it. Kills: a sender that trusts the relay; an alarm for what it did send."""
    recipe = plan(base, data, "just_one_byte", *SETTINGS)
    workers = {name: independent(name, recipe, base, tmp_path) for name in CLIENTS}
    loaded = load_base(str(base), writable=True)

    def altered(request):
        reply = workers["bob"].handle(request)
        if request.kind != "train":
            return reply
        return replace(reply, payloads=(reply.payloads[0][:-1] + bytes([reply.payloads[0][-1] ^ 2]),))

    handlers = {name: worker.handle for name, worker in workers.items()} | {"bob": altered}
    ledger = Ledger(header(recipe, loaded))
    relay = Federation(recipe, Replica(loaded, recipe), ledger, LocalExchange(handlers), tmp_path / "s", quiet)
    with pytest.raises(HistoryError, match="round 1 says of client 'bob' what it has not sent"):
        relay.run()
    assert [workers[name].round for name in CLIENTS] == [1, 0, 0]  # ada has gone on, bob stopped the run


def test_directions_follow_from_sender_and_round_and_peers_of_more_steps_are_audited_to_the_bit(base, data, tmp_path):
    """A mixed federation: one peer takes three steps, the others two. Kills: rows that are cut at the recipe's steps;
    contributions that do not recombine; directions that are the same for two peers or two rounds."""
    mixed = ("clients=[{share: 0.3, local_steps: 3}]", "local_steps=2", "keep_contributions=always")
    recipe = plan(base, data, "just_one_byte", *SETTINGS, *mixed)
    summary = federate(recipe, tmp_path / "run", quiet)
    assert audit(tmp_path / "run", None, quiet)["problems"] == []
    ledger = Ledger.load(tmp_path / "run")
    assert [len(ledger.payload(number)) for number in (1, 2)] == [10 + 3 * (4 + 3)] * 2
    assert summary["payload_up_bytes_per_client_round"] == pytest.approx((9 + 8 + 8) / 3, abs=0.06)
    replica = Replica(load_base(str(base)), recipe)
    said = {(peer, number): said_by(peer, replica.context(number)) for peer in CLIENTS for number in (1, 2)}
    drawn = {key: tuple(context.probes(context.sender)) for key, context in said.items() if context.probes}
    assert len(set(drawn.values())) == 6
    assert drawn["ada", 1] == (1087 // 64, 1437 // 64, 3177 // 64)  # docs/wire.md, where M is 64 times as large


WRONG = {
    "defences.enabled=true": "defences.enabled=false",
    "optimizer.lr=auto": "Give a number",
    "aggregation={name: seed_sum, weighting: equal}": "aggregation: relay and downlink: peers",
    "downlink={name: seed_scalar}": "aggregation: relay and downlink: peers",
    "uplink={name: seed_scalar}": "uplink: one_byte",
    f"uplink={{name: peers, unit: {LR}}}": "Use uplink: one_byte",
    "downlink.unit=0.5": "downlink.unit: got 0.5, expected 0.002",
    "aggregation.weighting=examples": "aggregation.weighting=equal",
    "server_optimizer={name: sgd, lr: 0.5}": "server_optimizer.lr: got 0.5",
    "privacy={name: central, clients: 3, clip: 1.0, noise_multiplier: 1.0}": "privacy: local",
    "staleness.max=1": "belongs to its own round",
    "secure_aggregation.enabled=true": "cannot mask uplink 'one_byte'",
}


@pytest.mark.parametrize("change", WRONG)
def test_parts_that_would_come_to_another_sum_are_refused_with_what_works(base, data, change):
    """Kills: a recipe in which peers and server apply different rounds."""
    with pytest.raises(IncompatibleError, match=WRONG[change]):
        build(content(base, data, "just_one_byte", *SETTINGS, change), "federate")


def test_a_server_may_also_add_the_bytes_up_itself(base, data, tmp_path):
    """`one_byte` with an ordinary sum. Kills: a codec that works with one aggregation only."""
    changes = ("aggregation={name: seed_sum, weighting: equal}", "downlink={name: seed_scalar}")
    summary = federate(plan(base, data, "just_one_byte", *SETTINGS, *changes), tmp_path / "run", quiet)
    assert summary["payload_up_bytes_per_client_round"] == 7
    assert summary["digest"] != summary["base_digest"]
