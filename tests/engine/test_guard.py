"""The guard: each defence by itself, and what liars can do to a whole run with and without it."""

import hashlib
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from federating import plan, quiet, write_rows
from kilotune.core.errors import IncompatibleError, WireError
from kilotune.core.rng import stream
from kilotune.core.types import SeedUpdate, TensorUpdate
from kilotune.engine.afterwards.measure import replay
from kilotune.engine.composing.clashes import warnings
from kilotune.engine.composing.compose import build
from kilotune.engine.model.base import load_base
from kilotune.engine.rounds import guard as guard_module
from kilotune.engine.rounds.book import Book
from kilotune.engine.rounds.bounds import coefficient_limit, loss_cap
from kilotune.engine.rounds.guard import Guard, Mark, Verdict, bounded, capped, lower_median, norm_of
from kilotune.engine.rounds.ledger import Contribution, Ledger, Record
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rounds.tally import Answer, outer_step
from kilotune.engine.rounds.worker import pairs
from kilotune.engine.session import federate
from kilotune.engine.training.step import StepReport
from lying import changed, claiming, prepared, times

SEEDS = ("optimizer={name: sgd, lr: 0.002}", "lr_schedule=linear")


def guards(events: list[dict]) -> list[dict]:
    return [event for event in events if event["event"] == "guard"]


# -- the parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 10, 37])
@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0])
def test_no_client_weighs_more_than_its_cap_and_the_others_keep_their_shares(count, factor):
    """Kills: a cap that holds before weights are divided by their new sum, but not after."""
    shares = [float(share) for share in stream(count, "shares").integers(1, 10, count) ** 5]
    fair = capped(shares, factor)
    weights = np.array(fair) / sum(fair)
    assert weights.max() <= max(factor / count, 1 / count) * (1 + 1e-9)
    for share, kept in zip(shares, fair, strict=True):
        assert kept == share or factor == 1.0 or (kept < share and kept == max(fair))
    equal = [7.0] * count
    assert capped(equal, factor) == equal


def test_the_norm_is_that_of_the_sums_per_direction():
    """Kills: the norm of a list of pairs in which a direction is named twice."""
    update = SeedUpdate(np.array([3, 1, 3, 1]), np.array([2.0, 5.0, 1.0, -5.0], np.float32))
    assert norm_of(update) == 3.0
    grouped = SeedUpdate(np.array([3, 3]), np.array([3.0, 4.0], np.float32), np.array([0, 1]))
    assert norm_of(grouped) == 5.0
    tensors = {"b": torch.full((2, 3), 2.0), "a": torch.tensor([5.0])}
    assert norm_of(TensorUpdate(tensors)) == 7.0


def test_of_two_clients_the_larger_is_held_to_the_smaller():
    """Kills: a median that one liar of two doubles as it likes."""
    assert lower_median([1e6, 1.0]) == 1.0
    assert lower_median([3.0, 1.0, 2.0]) == 2.0


@pytest.fixture(scope="module")
def loaded(base):
    """The base, which nobody here moves."""
    return load_base(str(base))


def checked(recipe, loaded, update, **facts) -> Mark:
    replica = Replica(loaded, recipe)
    answer = replace(Answer("ada", 5, 2.0, 10, "00"), **facts)
    return Guard(recipe, replica, {}).check(1, -1, answer, update, 1.0)


@pytest.mark.parametrize(
    ("indices", "coefs", "why"),
    [
        ([1, 2], [0.1, math.nan], "not finite"),
        ([1, 2], [0.1, math.inf], "not finite"),
        ([1, 64], [0.1, 0.1], "outside 0 .. 63"),
        ([-1, 2], [0.1, 0.1], "outside 0 .. 63"),
        ([1, 2, 3], [0.1, 0.1, 0.1], "3 pairs, expected at most 2"),
        ([1, 2], [0.1, 1e6], "no loss can give more than"),
        ([1, 2], [0.1, -1e6], "no loss can give more than"),
    ],
)
def test_pairs_that_no_honest_client_sends_are_refused(base, data, loaded, indices, coefs, why):
    """Kills: each line of the schema and the physical bound."""
    recipe = plan(base, data, "fedkseed", "optimizer.lr=0.01")
    update = SeedUpdate(np.array(indices), np.array(coefs, np.float32))
    with pytest.raises(WireError, match=why):
        checked(recipe, loaded, update)


def test_tensors_of_another_table_and_a_loss_that_is_none_are_refused(base, data, loaded):
    recipe = plan(base, data, "kilotune")
    good = TensorUpdate({"coords": torch.ones(64)})
    assert checked(recipe, loaded, good).norm == 8.0
    for update, loss, why in (
        (TensorUpdate({"coords": torch.ones(63)}), 1.0, "other tensors"),
        (TensorUpdate({"other": torch.ones(64)}), 1.0, "other tensors"),
        (TensorUpdate({"coords": torch.full((64,), math.nan)}), 1.0, "not finite"),
        (good, math.nan, "loss of nan"),
    ):
        with pytest.raises(WireError, match=why):
            checked(recipe, loaded, update, loss=loss)


def test_clients_keep_to_the_physical_bound_that_the_server_checks(base, data):
    """Kills: an honest client that is refused because its loss exploded; a bound without the rate or the schedule."""
    recipe = plan(base, data, "fedkseed", "optimizer.lr=0.01")
    limit = coefficient_limit(recipe, 300, 0.5)
    assert limit == pytest.approx(0.01 * 0.5 * (math.log(300) + 2) / (2 * 5e-4))
    assert loss_cap(300) == math.log(300) + 2
    sent = pairs([StepReport(2.0, 3, 1e9), StepReport(2.0, 4, -1e9), StepReport(2.0, 5, 0.5)], limit)
    assert sent.coefs.tolist() == [np.float32(limit), -np.float32(limit), 0.5]
    assert coefficient_limit(plan(base, data, "kilotune_zeroth"), 300, 1.0) is None  # every client has its own rate


@pytest.fixture
def judged(base, data, loaded):
    """(updates by client, the server's state, rows by client) -> what the guard makes of them."""
    recipe = plan(base, data, "kilotune_zeroth")
    replica = Replica(loaded, recipe)

    def judge(updates: dict[str, SeedUpdate], state=None, examples=None):
        guard = Guard(recipe, replica, {} if state is None else state)
        answers = {
            c: Answer(c, (examples or {}).get(c, 5), 2.0, 10, hashlib.sha256(u.coefs.tobytes()).hexdigest())
            for c, u in updates.items()
        }
        marks = {c: guard.check(1, -1, answers[c], u, 1.0) for c, u in updates.items()}
        return guard.judge(answers, marks, 1.0, updates.__getitem__)

    return judge


def two(first: float, second: float) -> SeedUpdate:
    return SeedUpdate(np.array([1, 2]), np.array([first, second], np.float32))


def test_large_scalars_are_cut_then_large_updates_scaled(judged):
    """Kills: norms of what was sent instead of what is left of it; the mean in place of the median."""
    honest = {f"c{n}": two(1.0, 1.0 + n / 100) for n in range(4)}
    found = judged({**honest, "liar": two(1e6, 0.5)})
    limit = 5 * np.float32(1.0)  # each client's lower median is its smaller scalar, 1.0 for the honest ones
    assert found.verdicts["liar"].limit == pytest.approx(limit)
    assert found.verdicts["c0"].limit is None
    most = 2 * norm_of(honest["c2"])  # the middle one of five: the liar's is 5
    left = norm_of(found.verdicts["liar"].bounded(two(1e6, 0.5)))
    assert left == pytest.approx(most, rel=1e-6)
    assert found.clipped_scalars == pytest.approx(1 / 10)
    assert found.clipped_norms == pytest.approx(1 / 5)
    assert [found.verdicts[c].scale for c in honest] == [1.0] * 4


def test_the_scalar_bound_follows_the_last_rounds_and_forgets(judged):
    """Kills: a bound a liar shifts in one round; a history that grows; a history that is not kept."""
    state: dict = {}
    for number in range(1, 13):
        judged({f"c{n}": two(number, number + 0.5 + n) for n in range(3)}, state)
    assert state[guard_module.MEDIANS].tolist() == [float(n) for n in range(3, 13)]
    found = judged({f"c{n}": two(99.0 + n, 1000.0) for n in range(3)}, state)
    assert found.verdicts["c0"].limit == 5 * 8.0  # the lower median of 4, 5, ..., 12, 99


def test_rows_are_self_reported_and_capped(judged):
    """Kills: a client that claims a billion rows and is the federation."""
    updates = {f"c{n}": two(1.0, 1.0 + n / 100) for n in range(5)}
    found = judged(updates, None, {"c4": 2**40})
    shares = np.array([found.verdicts[c].share for c in sorted(updates)])
    assert shares[4] / shares.sum() == pytest.approx(2 / 5)
    assert found.capped_weights == 1


def test_copies_are_refused_and_nothing_may_be_sent_twice(judged):
    """Kills: a payload replayed by its sender or by another; two clients that had nothing to say."""
    updates = {"ada": two(1.0, 2.0), "bob": two(1.0, 2.0), "cyd": two(0.0, 0.0), "dan": two(0.0, 0.0)}
    found = judged(updates)
    assert found.refused == {"bob": "sends the same payload as ada"}


def test_a_forward_only_client_is_not_measured_by_those_with_backprop(base, data, loaded):
    """Kills: a mixed federation in which the smaller steps of one half hold back the other half."""
    recipe = plan(base, data, "mixed")
    guard = Guard(recipe, Replica(loaded, recipe), {})
    sizes = {"a": (0, 1.0), "b": (0, 1.2), "c": (-1, 50.0), "d": (-1, 60.0), "e": (-1, 900.0)}
    answers = {c: Answer(c, 5, 2.0, 10, c) for c in sizes}
    marks = {c: Mark(group, norm) for c, (group, norm) in sizes.items()}
    found = guard.judge(answers, marks, 1.0, lambda client: pytest.fail("no scalars here"))
    scales = {c: v.scale for c, v in found.verdicts.items()}
    assert scales.pop("e") == pytest.approx(120 / 900, rel=1e-6)
    assert set(scales.values()) == {1.0}


def test_bounded_updates_are_the_same_bits_wherever_they_are_redone():
    update = two(3.0, -0.1)
    assert Verdict(0.2, limit=1.0, scale=0.3).bounded(update).coefs.tolist() == [
        np.float32(0.3),
        np.float32(-0.1) * np.float32(0.3),
    ]
    assert bounded(update, None, 1.0).coefs is update.coefs


def test_a_round_in_which_nothing_was_cut_hashes_as_it_always_did():
    """Kills: ledgers of earlier versions that no longer verify; a scale that the hash does not cover."""
    plain = Contribution("ada", 5, 0.25, "ab" * 32)
    content = [{"client": "ada", "num_examples": 5, "payload_sha256": "ab" * 32, "weight": 0.25}]
    told = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    record = Record(1, 2, "cd" * 32, (plain,), "00" * 32, "")
    assert record.members == hashlib.sha256(told).digest()
    assert record.to_json()["contributions"] == content
    for cut in (replace(plain, scale=0.5), replace(plain, limit=2.0)):
        assert replace(record, contributions=(cut,)).members != record.members
        assert Contribution(**cut.to_json()) == cut
    assert asdict(plain)["scale"] == 1.0


# -- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """Rows of five clients."""
    return write_rows(tmp_path_factory.mktemp("five") / "rows.jsonl", 8, tuple(f"c{n}" for n in range(5)))


@pytest.mark.parametrize("recipe", ["kilotune", "kilotune_zeroth", "fedavg_lora"])
def test_honest_clients_of_equal_norms_notice_nothing(base, data, tmp_path, recipe):
    """Kills: a defence that changes what it need not; weights that are rounded on the way."""
    loose = ("defences.norm_factor=1000", "defences.scalar_factor=1000")
    small = ("local_steps=1", "batch_size=2", "evaluation.limit=3")
    events: list[dict] = []
    guarded = federate(plan(base, data, recipe, *small, *loose), tmp_path / "on", events.append)
    bare = federate(plan(base, data, recipe, *small, "defences.enabled=false"), tmp_path / "off", quiet)
    assert guarded["digest"] == bare["digest"]
    assert [(g["accepted"], g["refused"], g["clipped_norms"], g["capped_weights"]) for g in guards(events)] == [
        (3, [], 0.0, 0)
    ] * 2
    assert all(event["guard_seconds"] > 0 for event in events if event["event"] == "round")


def final_loss(recipe, folder, lies) -> float:
    return prepared(recipe, folder, lies).run()["after"].overall.loss


def test_one_large_update_of_five_wrecks_an_undefended_run_only(base, five, tmp_path):
    """Kills: the norm bound switched off, or taken from the mean."""
    settings = ("rounds=3", "local_steps=1", "optimizer.lr=0.02", "uplink.dtype=fp16", "evaluation.limit=5")
    recipe = plan(base, five, "kilotune", *settings)
    bare = plan(base, five, "kilotune", *settings, "defences.enabled=false")
    clean = final_loss(recipe, tmp_path / "clean", {})
    for factor in (1e4, -1e4):
        lie = {"c3": times(factor)}
        assert final_loss(recipe, tmp_path / f"on{factor}", lie) < 1.1 * clean
        assert not final_loss(bare, tmp_path / f"off{factor}", lie) < 2 * clean


def test_stale_heads_bad_facts_and_second_hand_payloads_are_refused_by_name(base, five, tmp_path):
    """Kills: an answer to another history; facts that are no numbers ending the run; a replayed payload."""
    first: list[bytes] = []

    def repeating(replica, request, reply):
        first.append(reply.payloads[0])
        return replace(reply, payloads=(first[0],))

    lies = {
        "c0": claiming(head="ab" * 32),
        "c1": claiming(num_examples="many"),
        "c2": repeating,
        "c3": claiming(round=7),
    }
    events: list[dict] = []
    federation = prepared(plan(base, five, "kilotune", "rounds=2", "local_steps=1"), tmp_path, lies, events.append)
    federation.run()
    assert [[c.client for c in r.contributions] for r in federation.ledger.records] == [["c2", "c4"], ["c4"]]
    refused = {r["client"]: r["why"] for r in guards(events)[1]["refused"]}
    assert set(refused) == {"c0", "c2", "c3"}
    assert "stale" in refused["c0"]
    assert "stale" in refused["c3"]
    assert "earlier round" in refused["c2"]


def test_what_counted_is_in_the_ledger_and_rebuilds_the_broadcast(base, five, tmp_path):
    """Kills: weights, scales or limits that are not those of the sum, so that nobody can be subtracted."""
    recipe = plan(base, five, "kilotune", "rounds=2", "local_steps=1", "uplink.dtype=fp16")
    lies = {"c1": times(50.0), "c2": claiming(num_examples=10**6)}
    federation = prepared(recipe, tmp_path, lies)
    federation.run()
    for record in Ledger.load(tmp_path).records:
        context = federation.replica.context(record.round)
        sent = {e.client: e.payload for e in Book(tmp_path / "contributions").entries(record.round)}
        assert record.contributions[1].scale < 0.1
        assert max(c.weight for c in record.contributions) == pytest.approx(2 / 5)
        parts = [bounded(recipe.uplink.decode(sent[c.client], context), c.limit, c.scale) for c in record.contributions]
        mean = recipe.aggregation.combine(parts, np.array([c.weight for c in record.contributions]), {})
        payload = recipe.downlink.encode(outer_step(recipe.server_optimizer, mean, {}), context, {})
        assert payload == federation.ledger.payload(record.round)


class Killed(BaseException):
    """Stands for kill -9."""


def test_a_resumed_guard_decides_as_an_undisturbed_one(base, five, tmp_path):
    """Kills: medians that start anew after a crash, so that other scalars are cut."""
    recipe = plan(base, five, "kilotune_zeroth", "rounds=3", *SEEDS)
    lies = {"c1": times(30.0)}
    whole = prepared(recipe, tmp_path / "whole", lies)
    whole.run()
    cuts = [c.limit for r in whole.ledger.records for c in r.contributions if c.client == "c1"]
    assert len(set(cuts)) == 3
    assert None not in cuts

    def dying(event):
        if event["event"] == "guard" and event["round"] == 2:
            raise Killed

    with pytest.raises(Killed):
        prepared(recipe, tmp_path / "cut", lies, dying).run()
    again = prepared(recipe, tmp_path / "cut", lies)
    again.run()
    assert again.ledger.head == whole.ledger.head
    assert replay(tmp_path / "cut", None, quiet)["digest"] == whole.replica.digest()


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("kilotune", ("server_optimizer={name: sgd, lr: 0.7, momentum: 0.5}", "uplink.dtype=fp16")),
        ("kilotune_zeroth", ("defences.gate=5",)),  # its honest rounds go up and down on a tiny model
        ("fedavg_lora", ("uplink.dtype=fp32", "local_steps=2")),  # its first step moves one factor of two
    ],
)
def test_the_gate_turns_a_harmful_round_into_a_change_of_zero(base, five, tmp_path, recipe, settings):
    """Kills: a rejected round that moves weights or the server's momentum, breaks the chain or cannot be replayed."""
    bare = ("defences.norm_factor=1e30", "defences.scalar_factor=1e30", "defences.gate=0.05", "rounds=3")
    bare += ("local_steps=1", "evaluation.limit=5")
    composed, events = plan(base, five, recipe, *bare, *settings), []

    def at_round_two(replica, request, reply):
        return times(3000.0)(replica, request, reply) if request.body["round"] == 2 else reply

    federation = prepared(composed, tmp_path, {"c1": at_round_two}, events.append)
    digests = [federation.replica.digest()]
    after = federation.replica.apply

    def watched(number, payload):
        after(number, payload)
        digests.append(federation.replica.digest())

    federation.replica.apply = watched
    federation.run()
    assert [event["round"] for event in events if event["event"] == "rejected"] == [2]
    assert digests[2] == digests[1] != digests[0]
    assert {c.weight for c in federation.ledger.records[1].contributions} == {0.0}
    assert len(federation.ledger.records[1].contributions) == 5
    assert replay(tmp_path, None, quiet)["digest"] == federation.replica.digest()


def test_without_rows_on_the_server_the_gate_is_open(base, data, tmp_path):
    federation = prepared(plan(base, data, "kilotune", "defences.gate=0"), tmp_path, rows=False)
    assert not federation._gate.closed


def test_shared_directions_are_the_same_for_all_and_new_in_each_round(base, five, tmp_path):
    """Kills: a draw that contains the client's name or not the round's number; a client that chooses its own."""
    recipe, seen = plan(base, five, "robust_seeds", "local_steps=6", "batch_size=2"), {}

    def looking(update):
        seen.setdefault(len(seen), update.indices.tolist())
        return update

    chosen = changed(lambda update: SeedUpdate((update.indices + 1) % 64, update.coefs))
    events: list[dict] = []
    lies = {"c0": changed(looking), "c1": changed(looking), "c2": chosen}
    prepared(recipe, tmp_path, lies, events.append).run()
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert [[r["client"] for r in g["refused"]] for g in guards(events)] == [["c2"], ["c2"]]
    assert "not prescribed" in guards(events)[0]["refused"][0]["why"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"uplink": "seed_scalar", "downlink": "seed_scalar", "aggregation": "trimmed_mean"},
            "Use shared_directions: true",
        ),
        ({"shared_directions": True, "aggregation": "trimmed_mean"}, "shared_directions: has no effect with uplink"),
        (
            {
                "uplink": "seed_scalar",
                "downlink": "seed_scalar",
                "aggregation": "seed_sum",
                "shared_directions": True,
                "optimizer": {"name": "sgd", "lr": "auto"},
            },
            "Give a number",
        ),
    ],
)
def test_rules_without_votes_are_refused_with_the_fix(content, message):
    """Kills: a median over directions of which each client names others, which is 0."""
    parts = {"estimator": "zeroth_order", "optimizer": {"name": "sgd", "lr": 0.1}, "rounds": 1}
    with pytest.raises(IncompatibleError, match=message):
        build({**parts, **content}, "federate")


def test_a_scalar_of_one_example_comes_with_a_warning(base, data):
    assert "one example" in warnings(plan(base, data, "fedkseed", "batch_size=1"))[0]
    assert warnings(plan(base, data, "fedkseed", "batch_size=2")) == []
    assert warnings(plan(base, data, "kilotune", "batch_size=1")) == []
