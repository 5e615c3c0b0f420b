"""Rounds that reach over their end: weights and controls that clients keep, and a plain loop that does the same."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from federating import CLIENTS, plan, quiet
from kilotune.codec.dense import Dense
from kilotune.codec.fragments import Fragments
from kilotune.core.errors import IncompatibleError
from kilotune.core.types import TensorUpdate, WireContext
from kilotune.engine.composing.compose import compose
from kilotune.engine.composing.recipe import StreamingSection
from kilotune.engine.files import read_tensors
from kilotune.engine.model.base import load_base
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rounds.streaming import OwnWeights
from kilotune.engine.rounds.tally import outer_step
from kilotune.engine.session import federate
from kilotune.optimizer.sgd import SGD
from kilotune.parametrization._direct import DirectTrainable

NAMES = ["layers.0.w", "layers.1.w", "layers.2.w", "norm"]
PART = {"layers.0.w": 0, "layers.1.w": 1, "layers.2.w": 0, "norm": 1}  # dealt out in turn over two fragments
SIZE, STEPS, LR, OUTER, MOMENTUM = 6, 4, 0.1, 0.7, 0.9
OPTIMA = torch.randn((3, len(NAMES), SIZE), generator=torch.Generator().manual_seed(3))


def gradient(client, name, value):
    return (1 + NAMES.index(name)) / 4 * (value - OPTIMA[client, NAMES.index(name)])


def by_hand(rounds, overlap, mixing):
    """Streaming DiLoCo as a loop over a common state x, clients' own y and one Nesterov buffer per tensor."""
    x = {name: torch.zeros(SIZE) for name in NAMES}
    own = [{name: torch.zeros(SIZE) for name in NAMES} for _ in range(3)]
    buffers = {name: torch.zeros(SIZE) for name in NAMES}
    for number in range(1, rounds + 1):
        for client, y in enumerate(own):
            for step in range(STEPS):
                for name in NAMES:
                    if step == overlap and number > 1 and PART[name] == (number - 2) % 2:
                        y[name] = (1 - mixing) * x[name] + mixing * y[name]
                for name in NAMES:
                    y[name] = y[name] - LR * gradient(client, name, y[name])
        for name in (name for name in NAMES if PART[name] == (number - 1) % 2):
            outer = torch.stack([x[name] - y[name] for y in own]).mean(0)
            buffers[name] = MOMENTUM * buffers[name] + outer
            x[name] = x[name] - OUTER * (outer + MOMENTUM * buffers[name])
    return x


def through_the_parts(rounds, overlap, mixing):
    """The same through the parts, in the worker's order."""
    codec = Fragments(count=2, codec=Dense(dtype="fp32"))
    settings = SimpleNamespace(streaming=StreamingSection(overlap=overlap, mixing=mixing))
    composed = SimpleNamespace(uplink=codec, downlink=codec, recipe=settings)
    params = {name: nn.Parameter(torch.zeros(SIZE), requires_grad=False) for name in NAMES}
    trainable, kept, states = DirectTrainable(nn.Module(), params), [{} for _ in range(3)], {}
    rule, shapes = SGD(lr=OUTER, momentum=MOMENTUM, nesterov=True), dict.fromkeys(NAMES, (SIZE,))
    for number in range(1, rounds + 1):
        context, read = WireContext(number, 0, shapes), []
        for client in range(3):
            trainable.begin(0)
            own = OwnWeights(composed, trainable, kept[client], number)
            own.resume({})
            for step in range(STEPS):
                own.before_step(step)
                for name in NAMES:
                    trainable.move(name, -LR * gradient(client, name, trainable.wire[name]))
            own.keep()
            read.append(codec.decode(codec.encode(trainable.update(), context, {}), context).tensors)
            trainable.rollback()
        mean = {name: torch.stack([sent[name] for sent in read]).mean(0) for name in codec.travels(NAMES, number)}
        payload = codec.encode(outer_step(rule, TensorUpdate(mean), states), context, {})
        trainable.apply(codec.expand(codec.decode(payload, context), context), 0)
    return dict(trainable.wire)


@pytest.mark.parametrize(("overlap", "mixing"), [(0, 0.0), (0, 0.5), (2, 0.0), (2, 0.5)])
def test_fragments_that_land_late_and_in_part_walk_as_the_papers_loop(overlap, mixing):
    """Kills: own weights lost between rounds; a fragment that lands twice or never; momentum of tensors that stay;
    a share of the common state where the client's own is meant. Bound: float32 sums of a few dozen terms."""
    expected = by_hand(7, overlap, mixing)
    for name, value in through_the_parts(7, overlap, mixing).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-5)


def test_every_tensor_travels_once_within_a_cycle():
    """Kills: tensors without a layer left behind; fragments of neighbouring layers."""
    codec = Fragments(count=3)
    parts = [codec.travels([*NAMES, "layers.7.w"], number) for number in (1, 2, 3)]
    assert parts == [["layers.0.w", "layers.7.w"], ["layers.1.w", "norm"], ["layers.2.w"]]
    assert codec.travels(NAMES, 4) == codec.travels(NAMES, 1)


class Killed(BaseException):
    """Stands for kill -9."""


def whole_and_cut(base, data, folder, name):
    """Three rounds, undisturbed in `folder`/whole; the digests of these and of three that were cut in the third."""
    recipe = plan(base, data, name, "rounds=3", "batch_size=2", "evaluation.limit=1")
    whole = federate(recipe, folder / "whole", quiet)["digest"]

    def dying(event):
        if event["event"] == "client" and event.get("round") == 3 and event["client"] == "bob":
            raise Killed

    with pytest.raises(Killed):
        federate(recipe, folder / "cut", dying)
    return recipe, whole, federate(recipe, folder / "cut", quiet)["digest"]


def kept_by(folder, client):
    return read_tensors(folder / "whole" / "clients" / client / "state-00003.safetensors")[0]


def test_controls_survive_a_kill_and_every_replica_follows_the_servers(base, data, tmp_path):
    """Kills: a control that restarts from zero, or moves on twice for one round; a client that never hears itself; a
    replica that forgets what rounds have told everybody, or loses it with a checkpoint. Bound: what fp16 rounds."""
    recipe, whole, cut = whole_and_cut(base, data, tmp_path, "scaffold")
    assert cut == whole
    server, _ = read_tensors(tmp_path / "whole" / "state" / "server-00003.safetensors")
    ledger = Ledger.load(tmp_path / "whole")
    replica, late = (Replica(load_base(str(base), writable=True), recipe) for _ in range(2))
    replica.replay((record.round, payload) for record, payload in ledger.since(0))
    replica.save(tmp_path / "checkpoint.safetensors", ledger.head)
    late.load(tmp_path / "checkpoint.safetensors")
    for name in replica.shapes:
        held, own = server[f"optimizer/{name}/own"], [kept_by(tmp_path, c)[f"optimizer/{name}/own"] for c in CLIENTS]
        assert held.any()
        torch.testing.assert_close(torch.stack(own).mean(0), held, rtol=0, atol=1e-3 * float(held.abs().max()))
        followed = replica.public[name]["own"]
        torch.testing.assert_close(followed, held, rtol=0, atol=1e-3 * float(held.abs().max()))
        assert torch.equal(late.public[name]["own"], followed)


def test_own_weights_survive_a_kill(base, data, tmp_path):
    """Kills: weights of the client's own that restart from the common ones, or move on twice for one round."""
    _, whole, cut = whole_and_cut(base, data, tmp_path, "streaming_diloco")
    assert cut == whole
    kept = {client: kept_by(tmp_path, client) for client in CLIENTS}
    names = [name for name in kept["ada"] if name.startswith("weights/base_model")]
    assert names
    for tensors in kept.values():
        assert int(tensors["weights//round"]) == 3
    assert not any(torch.equal(kept["ada"][name], kept["bob"][name]) for name in names)


@pytest.mark.parametrize(
    ("name", "settings", "found"),
    [
        ("scaffold", ["server_optimizer={name: sgd, lr: 1.0}"], "Use server_optimizer: controlled_averaging, or"),
        ("one_bit_adam", ["optimizer={name: sgd, lr: 1.0}"], "Use optimizer: shared_momentum, or server_optimizer"),
        ("one_bit_adam", ["parametrization=subspace", "basis=tiled"], "Use --set basis.refresh=run."),
        ("scaffold", ["keep_optimizer=false"], "Use keep_optimizer: true."),
        ("scaffold", ["schedule={name: uniform, clients_per_round: 2}"], "participation: got 1, but the schedule"),
        ("scaffold", ["optimizer={name: adamw}"], "Use optimizer: scaffold, or server_optimizer: sgd."),
        ("scaffold", ["defences.norm_factor=2"], "Use --set defences.norm_factor=1000."),
        ("scaffold", ["uplink={name: residual, codec: sign}"], "Use the codec inside the residual."),
        ("fedprox", ["server_optimizer={name: proximal}"], "server_optimizer 'proximal' is a rule for clients."),
        ("co2", ["optimizer={name: co2}"], "optimizer 'co2' is a rule for servers."),
        ("co2", ["defences.gate=0.5"], "Use it without defences.gate."),
        ("streaming_diloco", ["downlink=dense"], "Use fragments with one count for both."),
        ("streaming_diloco", ["streaming.overlap=5"], "expected less than local_steps (5)."),
        ("kilotune", ["streaming.mixing=0.5"], "Use parametrization: full or peft."),
    ],
)
def test_parts_that_do_not_reach_over_rounds_together_are_refused(name, settings, found):
    """Kills: a recipe that runs and silently computes something else."""
    with pytest.raises(IncompatibleError) as caught:
        compose(name, "federate", settings)
    assert any(found in problem for problem in caught.value.problems), caught.value.problems
