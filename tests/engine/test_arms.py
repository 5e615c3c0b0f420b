"""Arms: devices without some of their units compute less and the same; servers that go on ask for the same."""

import re

import pytest
import torch

from federating import CLIENTS, plan, quiet
from kilotune.core.errors import IncompatibleError, RecipeError, WireError
from kilotune.core.rng import stream
from kilotune.engine.files import read_tensors
from kilotune.engine.model.base import load_base
from kilotune.engine.model.fused import fuse
from kilotune.engine.partial.arms import Learnt, Orders
from kilotune.engine.partial.device import ordered
from kilotune.engine.partial.pruning import blocks_of, kept_before, left, most_important, only, weight_scores, work
from kilotune.engine.rounds.outcome import ServerState
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rounds.tally import Tally
from kilotune.engine.session import federate
from tiny import tiny_batch

ONE_ARM = ("arms.pruning=[0.5]", "arms.ranks=[4]", "parametrization.rank=4", "local_steps=1", "evaluation.limit=2")


@pytest.fixture(scope="module")
def recipe(base, data):
    return plan(base, data, "fedspine")


@pytest.fixture
def trainable(base, recipe):
    """Pairs of rank 4 whose product is not zero."""
    found = Replica(load_base(str(base)), recipe).trainable
    found.begin(7)
    ordered(recipe, {"pruning": 0.0, "rank": 4}).parametrization.narrow(found)
    for name, value in found.wire.items():
        value.add_(torch.from_numpy(stream(0, name).normal(0, 0.1, tuple(value.shape))).float())
    return found


def masked(blocks, kept):
    """Zeros in place of what reads the units that are not kept, in the weights and in the factors."""
    for block in blocks:
        reading = next(side for side in block.sides if side.axis == 1)
        gone = torch.tensor([unit for unit in range(block.units) if unit not in kept[block.name]])
        reading.linear.weight.data = reading.linear.weight.data.clone()
        for param in (reading.linear.weight, reading.layer.lora_A["default"].weight):
            param.data[:, reading.numbers(gone)] = 0


@pytest.mark.parametrize("gradients", [False, True], ids=["module's own forward", "fused forward"])
def test_a_pruned_model_has_the_logits_of_the_masked_dense_one_and_less_to_do(trainable, gradients):
    """Kills: a row without its column; heads split from their keys; factors of other units than their weights; units
    that are masked but computed."""
    model, batch = trainable.model, tiny_batch()
    fuse(model)
    blocks = blocks_of(model)
    assert [block.units for block in blocks] == [2, 64] * 2
    kept = most_important(blocks, kept_before(blocks, {}), {}, 0.5)
    with torch.set_grad_enabled(gradients):
        dense = model(input_ids=batch.input_ids).logits
        with only(trainable, blocks, kept):
            shapes = {side.path.split(".")[-1]: tuple(side.linear.weight.shape) for b in blocks for side in b.sides}
            pruned = model(input_ids=batch.input_ids).logits
        masked(blocks, kept)
        wanted = model(input_ids=batch.input_ids).logits
    torch.testing.assert_close(pruned, wanted, rtol=0, atol=1e-5)
    assert (pruned - dense).abs().max() > 1e-2
    half = {"q_proj": (16, 32), "k_proj": (8, 32), "v_proj": (8, 32), "o_proj": (32, 16)}
    assert shapes == half | {"gate_proj": (32, 32), "up_proj": (32, 32), "down_proj": (32, 32)}
    head = 2 * 300 * 32
    assert work(model, blocks, 0.5, 4) - head == (work(model, blocks, 0.0, 4) - head) / 2 + 3 * 4 * 32 * 7


def test_the_units_of_least_worth_go_and_none_comes_back(trainable):
    """Kills: the most important that goes; a ratio rounded up; a device that grows again when asked for less."""
    blocks = blocks_of(trainable.model)
    feed = blocks[1]
    worth = sum(
        side.linear.weight.data.double().square().movedim(side.axis, 0).reshape(64, -1).sum(1) for side in feed.sides
    )
    first = most_important(blocks, kept_before(blocks, {}), {}, 0.3)
    assert set(first[feed.name].tolist()) == set(worth.argsort()[19:].tolist())
    torch.testing.assert_close(weight_scores(feed).double(), worth, rtol=1e-5, atol=0)
    scores = {f"score/{block.name}": torch.arange(float(block.units)) for block in blocks}
    second = most_important(blocks, first, scores, 0.5)
    assert second[feed.name].tolist() == first[feed.name].tolist()[-32:]
    assert all(torch.equal(second[b.name], most_important(blocks, second, scores, 0.1)[b.name]) for b in blocks)
    assert [left(64, 0.9), left(2, 0.4), left(2, 0.5), left(10, 0.3), left(1, 0.9)] == [7, 2, 1, 7, 1]


def test_units_that_no_device_has_never_move_and_the_others_do(base, data, tmp_path):
    """Kills: zeros averaged into what is left out; a device that forgets between rounds what it has removed."""
    few = plan(base, data, "fedspine", *ONE_ARM)
    start = {name: p.data.clone() for name, p in load_base(str(base)).parameters().items()}
    federate(few, tmp_path, quiet)
    states = [read_tensors(tmp_path / "clients" / c / f"state-{n:05d}.safetensors")[0] for c in CLIENTS for n in (1, 2)]
    replica = Replica(load_base(str(base)), few)
    ledger_payloads = sorted((tmp_path / "payloads").glob("*.bin"))
    replica.replay((n, path.read_bytes()) for n, path in enumerate(ledger_payloads, 1))
    for block in blocks_of(replica.model):
        kept = {tuple(state[f"units/kept/{block.name}"].tolist()) for state in states}
        assert len(kept) == 1  # by the weights of the base, all devices remove the same in round 1, and keep to it
        stays = torch.tensor(kept.pop())
        assert len(stays) == block.units / 2
        gone = torch.tensor([unit for unit in range(block.units) if unit not in stays])
        for side in block.sides:
            before = start[side.path.removeprefix("base_model.model.") + ".weight"]
            now = side.linear.weight.data
            for units, moved in ((gone, False), (stays, True)):
                pair = [w.index_select(side.axis, side.numbers(units)) for w in (before, now)]
                assert torch.equal(*pair) != moved


GROUP = {"ada": 0, "bob": -1, "cyd": -1}.__getitem__


def answer(orders: Orders, client: str) -> float:
    """Tell of a round whose gain grows with the rank; cyd's machine takes five times as long."""
    asked = orders.of(client)
    gain = 0.1 + asked["rank"] / 100
    orders.note(client, {**asked, "loss_first": 2.0, "loss": 2.0 - gain, "seconds": 5.0 if client == "cyd" else 1.0})
    return gain


@pytest.fixture(scope="module")
def replica(base, recipe):
    return Replica(load_base(str(base)), recipe)


def test_a_server_that_goes_on_asks_for_the_same_and_for_no_less_pruning(replica, tmp_path):
    """Kills: arms that hang on what a process remembers; pruning that is taken back."""
    state, pruned = ServerState(tmp_path), dict.fromkeys(CLIENTS, 0.0)
    orders = Orders(replica.plan, replica, state.arms, simulated=True)
    for number in range(1, 16):
        resumed = ServerState(tmp_path)
        if number > 1:
            resumed.load(number - 1, Tally())
        again = Orders(replica.plan, replica, resumed.arms, simulated=True)
        for server in (orders, again):
            server.give(CLIENTS, GROUP)
        for client in CLIENTS:
            assert orders.of(client) == again.of(client)
            assert orders.of(client)["pruning"] >= pruned[client]
            pruned[client] = orders.of(client)["pruning"]
            answer(orders, client)
        orders.settle(CLIENTS)
        state.save(number, Tally())
    assert max(pruned.values()) > 0


def test_who_is_late_earns_less_by_work_in_a_simulation_and_by_the_clock_where_devices_are_real(replica):
    """Kills: wall-clock time that decides what a simulation comes to; a slow device rewarded as a fast one."""
    model = replica.model
    four, eight = (work(model, blocks_of(model), 0.0, rank) for rank in (4, 8))
    for simulated, ada, cyd in ((True, 3.0, eight / four), (False, 1.0, 5.0)):
        state = {}
        orders = Orders(replica.plan, replica, state, simulated)
        orders.give(CLIENTS, GROUP)
        assert [orders.of(client)["rank"] for client in CLIENTS] == [4, 4, 8]
        gains = {client: answer(orders, client) for client in CLIENTS}
        orders.settle(CLIENTS)
        classes = Learnt.of(state).classes
        assert classes["0"]["recent"] == pytest.approx([gains["ada"] / ada])
        assert classes["-1"]["recent"] == pytest.approx([gains["bob"], gains["cyd"] / cyd])


def test_a_killed_server_goes_on_to_the_same_digest(base, data, tmp_path):
    """Kills: units or arms that are lost with the process; a round's answers counted twice."""
    few = plan(base, data, "fedspine", *ONE_ARM, "arms.ranks=[2,4]")

    class Killed(BaseException):
        pass

    def dying(event):
        if event["event"] == "client" and event["round"] == 2 and event["client"] == "bob":
            raise Killed

    with pytest.raises(Killed):
        federate(few, tmp_path / "cut", dying)
    whole = federate(few, tmp_path / "whole", quiet)
    assert federate(few, tmp_path / "cut", quiet)["digest"] == whole["digest"]


def test_a_device_follows_only_arms_of_its_recipe(base, data, recipe):
    """Kills: a server that has devices remove what the recipe does not allow."""
    assert ordered(recipe, {"pruning": 0.3, "rank": 16}).parametrization.rank == 16
    for asked in ({"pruning": 0.4, "rank": 16}, {"pruning": 0.3, "rank": 5}, {}):
        with pytest.raises(WireError, match=re.escape("expected one of [0.0, 0.1, 0.2, 0.3, 0.5]")):
            ordered(recipe, asked)
    plain = plan(base, data, "flora")
    assert ordered(plain, {"pruning": 0.5, "rank": 1}) is plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["arms.pruning=[0.0,0.95]"], "arms.pruning.1: got 0.95, expected less than or equal to 0.9."),
        (["arms.prunning=[0.5]"], "arms.prunning: no such key. Did you mean"),
        (["arms.pruning=[0.5,0.1]"], "arms.pruning: got [0.5, 0.1], expected values that rise, at least one."),
        (["arms.ranks=[]"], "arms.ranks: got [], expected values that rise, at least one."),
        (["parametrization.rank=16"], "arms.ranks: got 32 as the largest, expected parametrization.rank = 16."),
        (["aggregation={name: flora_stack}"], "Use parametrization: lora_merged with aggregation: kept_units."),
        (["defences.norm_factor=2.0"], "expected at least 3.7: an honest update grows"),
        (["secure_aggregation.enabled=true"], "which secure_aggregation hides"),
        (["adapt_steps=true"], "Use --set adapt_steps=false."),
        (["staleness.max=1"], "Use --set staleness.max=0."),
        (["keep_optimizer=true"], "Use --set keep_optimizer=false."),
        (["clients=[{share: 0.5, rank: 4}]"], "Remove clients.rank and every"),
        (["arms={}"], "clients.slowness: has no effect without arms."),
    ],
)
def test_what_does_not_fit_the_arms_says_what_does(base, data, changes, message):
    with pytest.raises((IncompatibleError, RecipeError), match=re.escape(message)):
        plan(base, data, "fedspine", *changes)
