"""Private federations: what is clipped, drawn, noised, told and counted, from the recipe to the summary."""

import io
import json
import math

import numpy as np
import pytest
import torch

from federating import CLIENTS, content, plan, quiet, write_rows
from kilotune.cli.display import Display
from kilotune.core.errors import IncompatibleError, RecipeError, RunError
from kilotune.core.rng import stream
from kilotune.core.types import SeedUpdate, TensorUpdate, WireContext
from kilotune.engine.afterwards.measure import replay
from kilotune.engine.model.base import load_base
from kilotune.engine.model.loss import answer_loss
from kilotune.engine.privacy.accountant import Release, epsilon_of
from kilotune.engine.privacy.private import NoisyMean, private_rounds
from kilotune.engine.privacy.privatesteps import PrivateSteps
from kilotune.engine.rounds.guard import Guard, Mark, Verdict
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rounds.tally import Answer
from kilotune.engine.rows.batches import collate, micro_batches
from kilotune.engine.session import encode_rows, federate, split_rows
from kilotune.engine.training.step import BatchObjective
from kilotune.privacy.central import Central

NOISE = ("privacy.epsilon=null", "privacy.noise_multiplier=1.0")


def central(base, data, *more):
    return plan(base, data, "private_central", *NOISE, "local_steps=1", "batch_size=2", "evaluation.limit=3", *more)


def local(base, data, *more):
    return plan(base, data, "private_local", *NOISE, "local_steps=2", "batch_size=4", "evaluation.limit=3", *more)


def events_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """Stands for kill -9."""


# -- central: the mean ------------------------------------------------------------------------------------------------

PRIVACY = Central(clip=0.5, noise_multiplier=0.01, clients=7)
RELEASE = Release(7, 7, 0.01, replaces=False)


def updates(kind):
    rng = stream(3, "updates", kind)
    if kind == "tensors":
        return [
            TensorUpdate({"b": torch.from_numpy(rng.standard_normal(5)), "a": torch.from_numpy(rng.random((2, 3)))})
            for _ in range(4)
        ]
    return [
        SeedUpdate(rng.integers(0, 11, 30), rng.standard_normal(30).astype(np.float32) * scale)
        for scale in (0.01, 0.1, 1.0, 10.0)
    ]


def flat(update):
    if isinstance(update, TensorUpdate):
        return np.concatenate([update.tensors["a"].numpy().reshape(-1), update.tensors["b"].numpy()])
    whole = np.zeros(11)
    for index, coef in zip(update.indices, update.coefs, strict=True):
        whole[index] += coef
    return whole


def gathering(kind, base, data):
    more = ("aggregation={name: seed_sum, weighting: equal}",) if kind == "pairs" else ()
    if kind == "pairs":
        more = (*more, "estimator=zeroth_order", "optimizer=sgd", "uplink=seed_scalar", "downlink=seed_scalar")
    shapes = {"coords": (11,)} if kind == "pairs" else {"b": (5,), "a": (2, 3)}
    return NoisyMean(PRIVACY, RELEASE, WireContext(1, 0, shapes, 11), central(base, data, *more).aggregation)


@pytest.mark.parametrize("kind", ["tensors", "pairs"])
def test_the_mean_is_of_clipped_updates_over_the_planned_cohort(base, data, kind):
    """Kills: a divisor that follows who answers; weights by rows; pairs clipped before they are summed; noise on the
    touched directions only. Bound: 6 sigma of noise made 100 times smaller than clip."""
    clipped = [v * min(1.0, 0.5 / np.linalg.norm(v)) for v in map(flat, updates(kind))]
    assert any(np.linalg.norm(v) > 0.51 for v in map(flat, updates(kind)))
    found = gathering(kind, base, data)
    for number, update in enumerate(updates(kind)):
        found.add(update, 10**number)
    got = found.result({})
    numbers = got.coefs if isinstance(got, SeedUpdate) else flat(got)
    assert numbers.size == 11
    np.testing.assert_allclose(numbers, sum(clipped) / 7, rtol=0, atol=6 * 0.01 * 0.5 / 7)
    assert (numbers != 0).all()


@pytest.mark.parametrize("kind", ["tensors", "pairs"])
def test_the_sum_does_not_depend_on_the_order_of_arrival(base, data, kind):
    """Kills: float sums whose low bits tell who came first."""
    ways = []
    for some in (updates(kind), updates(kind)[::-1]):
        found = gathering(kind, base, data)
        for update in some:
            found.add(update, 1)
        ways.append(found._total)
    assert np.array_equal(*ways)


def test_what_others_sent_does_not_change_what_a_client_counts_for(base, data):
    """Kills: medians, copies and weight caps of the defences, by which one client moves the others' shares."""
    recipe = central(base, data)
    guard = Guard(recipe, Replica(load_base(str(base), writable=True), recipe), {})
    answers = {name: Answer(name, rows, 1.0, 9, "same") for name, rows in zip(CLIENTS, (1, 10, 900), strict=True)}
    marks = {name: Mark(-1, norm) for name, norm in zip(CLIENTS, (0.1, 0.1, 50.0), strict=True)}
    judged = guard.judge(answers, marks, 1.0, lambda client: pytest.fail("looked at again"))
    assert judged.refused == {}
    assert judged.verdicts == {name: Verdict(1.0, None, 1.0) for name in CLIENTS}


def test_directions_are_chosen_by_noisy_amplitudes_only(base, data):
    """Kills: FedKSeed-Pro's history made from what clients really sent."""
    more = ("estimator=zeroth_order", "optimizer=sgd", "uplink=seed_scalar", "downlink=seed_scalar")
    rule = central(
        base, data, *more, "aggregation={name: seed_sum, weighting: equal, selection: amplitude}"
    ).aggregation
    found, state = NoisyMean(PRIVACY, RELEASE, WireContext(1, 0, {"coords": (11,)}, 11), rule), {}
    for update in updates("pairs"):
        found.add(update, 1)
    got = found.result(state)
    np.testing.assert_array_equal(state["abs_sum"].numpy(), np.abs(got.coefs.astype(np.float64)))
    assert state["count"].tolist() == [1] * 11


# -- central: the run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("central") / "run"
    return folder, federate(central(base, data, "rounds=3"), folder, quiet)


def test_a_run_says_what_it_has_spent_and_how(run):
    """Kills: an epsilon for another sampling, another number of rounds or another noise than the run's."""
    folder, summary = run
    spent = [epsilon_of([(Release(128, 128, 1.0, replaces=False), n)], 1e-5) for n in (1, 2, 3)]
    assert [e["epsilon"] for e in events_of(folder) if e["event"] == "round"] == spent
    told = summary["privacy"]
    assert told["epsilon"] == spent[-1]
    assert (told["unit"], told["neighbours"], told["delta"]) == ("client", "add or remove one", 1e-5)
    assert (told["rounds"], told["noise_multiplier"], told["clip"], told["divided_by"]) == (3, 1.0, 0.68, 128)
    assert "all 128" in told["sampling"]
    assert json.loads((folder / "summary.json").read_text())["privacy"] == told


def test_nothing_a_run_leaves_tells_losses_or_payloads_of_single_clients(run):
    """Kills: mean losses in round events; hashes of raw payloads in the ledger, which let a guess be checked."""
    folder, _ = run
    for event in events_of(folder):
        assert not {"loss", "loss_first"} & set(event), event
        assert event["event"] != "client", event
    assert all(record.contributions == () for record in Ledger.load(folder).records)
    assert not list((folder / "contributions").glob("*"))
    assert replay(folder, None, quiet)["verified"] is True


def test_the_report_draws_quality_against_epsilon_and_states_the_release(run):
    """Kills: a chart over rounds with another label; a statement without neighbours, sampling or delta."""
    folder, summary = run
    page = (folder / "report.html").read_text()
    spent, losses = summary["privacy"]["epsilon"], [summary["eval"][at]["loss"] for at in ("before", "after")]
    assert f'<desc id="d-held-out-loss-by-epsilon">{losses[0]:.3f} at 0, {losses[1]:.3f} at {spent:g}<' in page
    for word in ("add or remove one", "all 128, no amplification", f"epsilon {spent:.4g}, delta 1e-05 for each client"):
        assert word in page


def test_the_terminal_shows_epsilon_where_losses_are_not_told(run):
    """Kills: a display that stops on a round without a loss."""
    lines = io.StringIO()
    with Display(3, "round", file=lines) as show:
        for event in events_of(run[0]):
            show(event)
    spent = run[1]["privacy"]["epsilon"]
    assert f"round 3/3: 3 of 3 clients, epsilon {spent:.3f}, " in lines.getvalue()


def test_equal_public_seeds_give_other_noise(base, data, run, tmp_path):
    """Kills: noise that follows from the recipe, or from a global generator seeded like it."""
    torch.manual_seed(0)
    np.random.seed(0)
    again = federate(central(base, data, "rounds=3"), tmp_path / "run", quiet)
    assert again["recipe_id"] == run[1]["recipe_id"]
    payloads = [Ledger.load(folder).payload(1) for folder in (run[0], tmp_path / "run")]
    assert payloads[0] != payloads[1]


def test_kills_neither_forget_nor_repeat_a_payment(base, data, tmp_path, run, monkeypatch):
    """Kills: an account that is saved after the ledger, reset on resume, or pays for a draw that nobody saw."""
    recipe, append = central(base, data, "rounds=3"), Ledger.append

    for moment, number in (
        ("client", 1),
        ("charged", 1),
        ("appended", 1),
        ("round", 2),
        ("charged", 3),
        ("appended", 3),
    ):

        def dying(self, *args, moment=moment, number=number):
            if moment == "charged" and len(self) == number - 1:
                raise Killed
            record = append(self, *args)
            if moment == "appended" and record.round == number:
                raise Killed
            return record

        def told(event, moment=moment, number=number):
            if event["event"] == {"client": "guard"}.get(moment, moment) and event["round"] == number:
                raise Killed

        monkeypatch.setattr(Ledger, "append", dying)
        with pytest.raises(Killed):
            federate(recipe, tmp_path / "run", told)
        monkeypatch.undo()
    summary = federate(recipe, tmp_path / "run", quiet)
    assert summary["privacy"] == run[1]["privacy"]
    assert summary["rounds"] == 3
    assert replay(tmp_path / "run", None, quiet)["digest"] == summary["digest"]


def test_a_run_whose_account_is_gone_does_not_go_on(base, data, tmp_path):
    """Kills: a resume that starts at zero because a file was deleted."""
    federate(central(base, data, "rounds=1"), tmp_path / "run", quiet)
    (tmp_path / "run" / "state" / "privacy.json").unlink()
    with pytest.raises(RunError, match=r"privacy\.json"):
        federate(central(base, data, "rounds=2"), tmp_path / "run", quiet)


def test_the_run_ends_before_the_round_that_would_exceed_the_budget(base, data, tmp_path):
    """Kills: a stop after the fact; a stop that leaves a run without result."""
    two = epsilon_of([(Release(128, 128, 1.0, replaces=False), 2)], 1e-5)
    recipe = plan(
        base, data, "private_central", "rounds=5", "privacy.noise_multiplier=1.0", f"privacy.epsilon={two + 0.01}"
    )
    seen = []
    summary = federate(recipe, tmp_path / "run", seen.append)
    (stopped,) = [e for e in seen if e["event"] == "stopped"]
    assert (stopped["round"], summary["rounds"]) == (2, 2)
    assert "epsilon" in stopped["why"]
    assert summary["privacy"]["epsilon"] == two
    assert summary["eval"]["after"]["loss"] > 0
    assert replay(tmp_path / "run", None, quiet)["verified"] is True


def test_absent_clients_change_neither_the_account_nor_the_chances_of_others(base, data, tmp_path):
    """Kills: a sampling rate or a divisor that follows who is there. Bound: 5 sigma over 400 draws."""
    more = ("schedule={name: uniform, clients_per_round: 3}", "privacy.clients=6")
    recipe = central(base, data, *more)
    ledger = Ledger.open(tmp_path, _header(recipe, base))
    rounds = private_rounds(recipe, ledger, tmp_path, clients_measure=False)
    draws = [rounds.choose(1, list(CLIENTS)) for _ in range(400)]
    assert all(set(chosen) <= set(CLIENTS) for chosen in draws)
    for name in CLIENTS:
        assert abs(sum(name in chosen for chosen in draws) / 400 - 0.5) <= 5 * 0.5 / 20
    assert len({tuple(chosen) for chosen in draws}) > 1  # the same round, drawn anew: not from the public seed
    assert rounds.summary()["privacy"]["sampling"].startswith("3 of 6,")
    with pytest.raises(Exception, match=r"privacy\.clients: got 6, but 7"):
        rounds.choose(1, [f"c{i}" for i in range(4)])


def _header(recipe, base):
    from kilotune.engine.session import header

    return header(recipe, load_base(str(base), writable=True))


def test_a_budget_of_eight_still_learns_from_many_clients(base, tmp_path):
    """Kills: noise beyond what the budget asks for, or a clip that leaves nothing. Without noise the loss falls by
    0.75; with this noise by 0.6, give or take 0.05; with that of epsilon 1 it rises."""
    names = tuple(f"c{i:02d}" for i in range(24))
    data = write_rows(tmp_path / "rows.jsonl", per_client=4, clients=names)
    lr = 0.2
    recipe = plan(
        base,
        data,
        "private_central",
        "rounds=3",
        "local_steps=1",
        "privacy.clients=24",
        f"optimizer.lr={lr}",
        f"privacy.clip={lr * math.sqrt(64)}",
        "evaluation.limit=24",
    )
    summary = federate(recipe, tmp_path / "run", quiet)
    assert summary["privacy"]["epsilon"] <= 8.0
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"] - 0.3


# -- local ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [64, 1024])
def test_the_slopes_are_those_of_every_row_alone(base, data, tokens):
    """Kills: slopes of micro-batches; rows mixed up by packing; token weights across rows; one side taken twice.
    Bound: float32 losses of about 6, eight ulp, over 2 epsilon."""
    recipe = local(base, data, f"micro_batch_tokens={tokens}")
    loaded = load_base(str(base), writable=True)
    replica = Replica(loaded, recipe)
    examples = encode_rows(recipe, loaded, split_rows(recipe, alone=False).clients["ada"], "ada", quiet)[:5]
    pad, taken = loaded.tokenizer.pad_token_id, []

    def release(slopes):
        taken.append(slopes)
        return 0.25

    replica.trainable.begin(1, forward_only=True)
    objective = BatchObjective(
        replica.model, micro_batches(examples, recipe.recipe, replica.model, pad), release=release
    )
    pushed = []
    estimate = recipe.estimator.estimate(
        objective, replica.trainable, stream(0, "z"), {}, lambda name, g: pushed.append(g.clone())
    )
    direction = replica.trainable.draw(stream(0, "z"))
    expected = []
    for example in examples:
        row = collate([example], pad)
        with torch.no_grad():
            sides = replica.trainable.both(direction, 0.01, [lambda row=row: answer_loss(replica.model, row)])
        expected.append((sides[0] - sides[1]) / 0.02)
    np.testing.assert_allclose(np.sort(taken[0]), np.sort(expected), rtol=0, atol=8 * 6 * 2**-23 / 0.02)
    assert estimate.slope == 0.25
    assert math.isnan(estimate.loss)
    torch.testing.assert_close(pushed[0], replica.trainable.basis.direction(direction.index) * 0.25)


def test_a_noisy_slope_is_the_mean_of_clipped_slopes(base, data, tmp_path):
    """Kills: the mean clipped instead of every example; a divisor that is not the batch. Bound: 6 sigma."""
    recipe = local(base, data, "privacy.noise_multiplier=0.01", "privacy.clip=2.0", "batch_size=4")
    steps = PrivateSteps(recipe, tmp_path / "privacy.json", 9)
    slopes = np.array([5.0, -0.5, math.nan, -math.inf])
    assert abs(steps.slope(slopes) - (2.0 - 0.5 + 0.0 - 2.0) / 4) <= 6 * 0.01 * 2.0 / 4


def test_batches_are_secret_samples_of_fixed_size(base, data, tmp_path):
    """Kills: batches from the public seed or in epochs, which no amplification covers. Bound: 5 sigma."""
    steps = PrivateSteps(local(base, data), tmp_path / "privacy.json", 9)
    draws = [steps.batch() for _ in range(900)]
    assert all(len(set(batch)) == 4 and batch == sorted(batch) for batch in draws)
    counts = np.bincount(np.concatenate(draws), minlength=9)
    assert np.abs(counts / 900 - 4 / 9).max() <= 5 * math.sqrt(4 / 9 * 5 / 9 / 900)
    assert len(set(draws[0]) | set(draws[1]) | set(draws[2])) > 4


@pytest.fixture(scope="module")
def local_run(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "run"
    return folder, federate(local(base, data), folder, quiet)


def test_every_client_keeps_its_own_account(local_run):
    """Kills: an account by the server's word; sampling of another rate than the batch's share of the rows."""
    folder, summary = local_run
    expected = epsilon_of([(Release(9, 4, 1.0, replaces=True), 4)], 1e-5)
    for client in CLIENTS:
        told = json.loads((folder / "clients" / client / "privacy.json").read_text())
        assert told["spent"] == [[9, 4, 1.0, True, 4]]
    assert summary["privacy"]["epsilon"] == pytest.approx(expected)
    assert summary["privacy"]["unit"] == "example"
    assert not any({"loss", "loss_first"} & set(e) for e in events_of(folder))


def test_a_client_that_was_killed_pays_once_and_sends_one_answer(base, data, tmp_path, local_run):
    """Kills: spending that a restart forgets or doubles; two noises on one slope."""

    def dying(event):
        if event["event"] == "client" and event.get("round") == 2 and event["client"] == "bob":
            raise Killed

    with pytest.raises(Killed):
        federate(local(base, data), tmp_path / "run", dying)
    summary = federate(local(base, data), tmp_path / "run", quiet)
    assert summary["privacy"] == local_run[1]["privacy"]
    for client in CLIENTS:
        told = json.loads((tmp_path / "run" / "clients" / client / "privacy.json").read_text())
        assert told["spent"] == [[9, 4, 1.0, True, 4]]


def test_equal_public_seeds_give_other_slopes(base, data, tmp_path, local_run):
    """Kills: noise or batches that the recipe's seed decides."""
    torch.manual_seed(0)
    federate(local(base, data), tmp_path / "run", quiet)
    payloads = [Ledger.load(folder).payload(1) for folder in (local_run[0], tmp_path / "run")]
    assert payloads[0] != payloads[1]


def test_a_client_whose_budget_is_spent_refuses_and_the_run_ends(base, data, tmp_path):
    """Kills: a client that goes on because the server asks; a run that fails instead of ending."""
    once = epsilon_of([(Release(9, 4, 1.0, replaces=True), 2)], 1e-5)
    recipe = plan(
        base,
        data,
        "private_local",
        "rounds=4",
        "batch_size=4",
        "privacy.noise_multiplier=1.0",
        f"privacy.epsilon={once + 0.01}",
    )
    seen = []
    summary = federate(recipe, tmp_path / "run", seen.append)
    assert summary["rounds"] == 1
    assert [e["why"] for e in seen if e["event"] == "stopped"] == [
        f"3 of 3 clients have spent their epsilon {once + 0.01:g}"
    ]
    steps = PrivateSteps(recipe, tmp_path / "run" / "clients" / "ada" / "privacy.json", 9)
    with pytest.raises(Exception, match="takes no further part"):
        steps.charge("ada", 2, "a history the server made up", 2)


# -- recipes that promise too much ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        ("private_central", "aggregation.weighting=examples", "aggregation.weighting=equal"),
        ("private_central", "aggregation={name: geometric_median, weighting: equal}", "aggregation: mean"),
        ("private_central", "schedule={name: uniform, clients_per_round: 200}", "at most privacy.clients = 128"),
        ("private_central", "schedule={name: over_select, clients_per_round: 2}", "schedule: all, or uniform"),
        ("private_central", "staleness.max=2", "staleness.max=0"),
        ("private_local", "estimator=backprop", "estimator: zeroth_order"),
        ("private_local", "optimizer.lr=auto", "optimizer.lr: auto"),
    ],
)
def test_what_would_break_the_promise_is_refused_with_a_way_out(base, data, recipe, change, message):
    """Kills: a promise that one part of the recipe makes and another breaks."""
    with pytest.raises(IncompatibleError, match=message):
        plan(base, data, recipe, change)


def test_ferret_sends_nothing_that_could_be_clipped_whole(base, data):
    """Kills: clipping the coordinates of seeds that every client chose for itself."""
    raw = content(
        base, data, "ferret", "aggregation.weighting=equal", "privacy={name: central, clip: 1, epsilon: 8, clients: 3}"
    )
    from kilotune.engine.composing.compose import build

    with pytest.raises(IncompatibleError, match="uplink: dense"):
        build(raw, "federate")


def test_privacy_without_noise_or_alone_is_refused(base, data):
    """Kills: a key that has no effect."""
    with pytest.raises(RecipeError, match="an epsilon, a noise_multiplier, or both"):
        plan(base, data, "private_central", "privacy={name: central, clip: 1.0, clients: 3}")
    with pytest.raises(RecipeError, match="privacy: has no effect"):
        plan(base, data, "local_subspace", "privacy={name: central, clip: 1.0, epsilon: 8, clients: 3}")


def test_early_stopping_on_losses_that_nobody_tells_is_refused(base, data, tmp_path):
    """Kills: stopping by raw losses of clients, which would be told by when the run ends."""
    recipe = central(base, data, "patience=2")
    ledger = Ledger.open(tmp_path, _header(recipe, base))
    with pytest.raises(IncompatibleError, match="patience"):
        private_rounds(recipe, ledger, tmp_path, clients_measure=True)
    private_rounds(recipe, ledger, tmp_path, clients_measure=False)  # the server's own rows are not theirs
