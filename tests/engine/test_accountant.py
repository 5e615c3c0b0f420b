"""Accountant: its epsilon is a second implementation's, and nothing that was spent is ever forgotten."""

import math

import pytest
from mpmath import binomial, exp, log, mp, mpf, sqrt

from kilotune.core.errors import RecipeError, RunError
from kilotune.engine.privacy.accountant import ORDERS, Accountant, Release, calibrate, epsilon_of

DELTA = 1e-5
EVERYBODY = Release(100, 100, 3.0, replaces=False)
SAMPLED = Release(1000, 60, 2.2, replaces=True)


def smallest_epsilon(divergence, delta):
    """min over orders a of D(a) + ln(1 - 1/a) - ln(delta a) / (a - 1): Canonne et al. 2020, proposition 12."""
    return min(d + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a, d in divergence.items())


def sampled_divergence(rate, noise, order):
    """Rényi divergence of a Gaussian sum over a sample without replacement, bounded as in Wang, Balle and
    Kasiviswanathan 2019, theorem 27, term by term with 60 digits. `noise` is per sensitivity."""
    mp.dps = 60
    q, s = mpf(rate), mpf(noise)

    def moment(j):  # e^((j-1) eps(j)) of the Gaussian
        return exp(mpf(j) * (j - 1) / (2 * s * s))

    def difference(n):
        return sum((-1) ** i * binomial(n, i) * moment(n - i) for i in range(n + 1))

    second = mpf(2) / (2 * s * s)  # eps(2)
    total = 1 + q**2 * binomial(order, 2) * min(4 * (exp(second) - 1), 2 * exp(second))
    for j in range(3, order + 1):
        between = 4 * sqrt(difference(2 * (j // 2)) * difference(2 * ((j + 1) // 2)))
        total += q**j * binomial(order, j) * min(between, 2 * moment(j))
    return float(log(total) / (order - 1))


@pytest.mark.parametrize("count", [1, 12, 400])
@pytest.mark.parametrize("replaces", [False, True])
def test_epsilon_without_sampling_is_the_closed_form_to_one_percent(count, replaces):
    """Kills: a replaced unit counted like an absent one; variance for standard deviation; counts that are lost."""
    noise = 3.0
    sensitivity = 2 if replaces else 1
    fine = {a: count * a * sensitivity**2 / (2 * noise**2) for a in [1 + n / 100 for n in range(5, 20000)]}
    found = epsilon_of([(Release(50, 50, noise, replaces), count)], DELTA)
    assert found == pytest.approx(smallest_epsilon(fine, DELTA), rel=0.01)


@pytest.mark.parametrize(("rate", "noise", "count"), [(0.06, 2.2, 50), (0.01, 1.6, 400)])
def test_epsilon_with_sampling_is_the_theorem_computed_again_to_one_percent(rate, noise, count):
    """Kills: Poisson's formula for a sample of fixed size; noise per clip taken as noise per sensitivity (2 clip)."""
    divergence = {a: count * sampled_divergence(rate, noise / 2, a) for a in range(2, 13)}
    found = epsilon_of([(Release(1000, round(1000 * rate), noise, replaces=True), count)], DELTA)
    assert found == pytest.approx(smallest_epsilon(divergence, DELTA), rel=0.01)
    whole = epsilon_of([(Release(1000, 1000, noise, replaces=True), count)], DELTA)
    assert found < 0.7 * whole


def test_unequal_releases_add_up():
    """Kills: an epsilon per kind of release; only the last noise counted."""
    parts = [(Release(9, 9, 2.0, False), 3), (Release(9, 9, 5.0, False), 10)]
    fine = {a: a / 2 * (3 / 4 + 10 / 25) for a in [1 + n / 100 for n in range(5, 20000)]}
    assert epsilon_of(parts, DELTA) == pytest.approx(smallest_epsilon(fine, DELTA), rel=0.01)
    assert epsilon_of([], DELTA) == 0.0
    with pytest.raises(ValueError, match="neighbours"):
        epsilon_of([(EVERYBODY, 1), (SAMPLED, 1)], DELTA)


@pytest.mark.parametrize(
    ("release", "count", "epsilon"), [(EVERYBODY, 12, 8.0), (EVERYBODY, 1, 0.5), (SAMPLED, 50, 8.0)]
)
def test_the_noise_found_keeps_the_budget_and_no_smaller_one_does(release, count, epsilon):
    """Kills: noise that is a little too small; a search that stops far above."""
    noise = calibrate(release, count, epsilon, DELTA)

    def spent(sigma):
        return epsilon_of([(Release(release.population, release.sample, sigma, release.replaces), count)], DELTA)

    assert spent(noise) <= epsilon < spent(0.99 * noise)


def test_a_budget_no_noise_can_keep_is_refused():
    """Kills: an endless search, or a run that ends before its first round without a reason."""
    with pytest.raises(RecipeError, match=r"privacy\.epsilon"):
        calibrate(EVERYBODY, 10, 1e-9, 1e-12)


def account(tmp_path, budget=None, **more):
    return Accountant(tmp_path / "state" / "privacy.json", DELTA, budget, **more)


def test_spending_survives_a_restart(tmp_path):
    """Kills: an account in memory; one that begins anew when a run is resumed."""
    first = account(tmp_path)
    first.start(3.0)
    for number in range(5):
        first.charge(f"{number}:head", EVERYBODY)
        first.settle()
    again = account(tmp_path)
    assert (again.count, again.noise_multiplier) == (5, 3.0)
    assert again.epsilon() == first.epsilon() == epsilon_of([(EVERYBODY, 5)], DELTA)


def test_a_release_counts_before_it_leaves_and_once_if_it_never_left(tmp_path):
    """Kills: counting after sending, which a crash skips; paying twice for a draw that nobody saw."""
    account(tmp_path).charge("1:head", EVERYBODY)  # the process ends here
    again = account(tmp_path)
    assert again.count == 1
    again.charge("1:head", EVERYBODY)
    assert again.count == 1
    again.charge("1:other", EVERYBODY)  # another history: the first may have left
    assert again.count == 2
    again.settle()
    again.charge("1:other", EVERYBODY)  # rolled back and made again after it left
    assert again.count == 3
    assert account(tmp_path).count == 3


def test_the_budget_is_asked_before_and_not_after(tmp_path):
    """Kills: a stop one release too late or too early; a crash that turns an affordable release into one too many."""
    two = epsilon_of([(EVERYBODY, 2)], DELTA)
    book = account(tmp_path, budget=two * 1.0001)
    for number in (1, 2):
        assert book.affords(EVERYBODY, key=f"{number}:h")
        book.charge(f"{number}:h", EVERYBODY)
    assert account(tmp_path, budget=two * 1.0001).affords(EVERYBODY, key="2:h")  # cut off, to be made again
    book.settle()
    assert not book.affords(EVERYBODY, key="3:h")
    assert book.epsilon() <= book.budget


@pytest.mark.parametrize("content", [None, "", "{}", '{"noise_multiplier": 1, "spent": [[1, 2]], "pending": null}'])
def test_a_lost_or_foreign_account_is_refused(tmp_path, content):
    """Kills: starting at zero because the file is gone or cut."""
    if content is not None:
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "privacy.json").write_text(content)
    with pytest.raises(RunError, match=r"privacy\.json"):
        account(tmp_path, expected=True)


def test_orders_are_fine_enough_for_small_and_large_budgets():
    """Kills: a grid of orders that misses the best one by more than one per cent of epsilon."""
    for noise in (0.3, 0.6, 1.0, 4.0, 20.0):
        fine = {a: a / (2 * noise**2) for a in [1 + n / 100 for n in range(5, 12700)]}
        coarse = smallest_epsilon({a: a / (2 * noise**2) for a in ORDERS}, DELTA)
        assert coarse == pytest.approx(smallest_epsilon(fine, DELTA), rel=0.01)
