"""Laws of every aggregation the registry finds, stated on the effective change."""

import numpy as np
import pytest
import torch

from kilotune.aggregation import Aggregation, SeedUpdate, TensorUpdate, Update
from kilotune.core.registry import find, names
from kilotune.core.rng import stream

SHAPES = {"b": (50,), "a": (3, 4), "scalar": ()}
PAIRS = {"x.lora_A.w": (3, 11), "x.lora_B.w": (7, 3), "y.lora_A.w": (3, 4), "y.lora_B.w": (9, 3)}
SIZE = 30


def build(name: str) -> Aggregation:
    method = find("aggregation", name)
    return method(**method.example)


def of_pairs(rule: Aggregation) -> bool:
    return "factor_pair" in rule.needs


def shapes_of(rule: Aggregation) -> dict[str, tuple[int, ...]]:
    return PAIRS if of_pairs(rule) else SHAPES


def assert_same(rule: Aggregation, one: Update, other: Update) -> None:
    """To the bit; products of factors, which a rule may make of other factors, to the last digits of float32."""
    if not of_pairs(rule):
        assert np.array_equal(effective(one), effective(other))
        return
    for a in (name for name in PAIRS if "lora_A" in name):
        pairs = [[update.tensors[n].double() for n in (a.replace("_A", "_B"), a)] for update in (one, other)]  # type: ignore[union-attr]
        (b, a1), (b2, a2) = pairs
        torch.testing.assert_close(b @ a1, b2 @ a2, rtol=0, atol=1e-5 * float((b2 @ a2).abs().max()))


def update_for(rule: Aggregation, client: int) -> Update:
    """Numbers of very different sizes, so that a wrong order of addition shows in the last bit."""
    rng = stream(client, "update")
    if rule.takes == "seeds":
        coefs = rng.normal(size=40) * 10.0 ** rng.integers(-6, 6, 40)
        return SeedUpdate(rng.integers(0, SIZE, 40), coefs.astype(np.float32))
    spread = 1 if of_pairs(rule) else 6
    draw = {n: rng.normal(size=s) * 10.0 ** rng.integers(-spread, spread, s) for n, s in shapes_of(rule).items()}
    return TensorUpdate({n: torch.from_numpy(np.asarray(values, np.float32)) for n, values in draw.items()})


def effective(update: Update) -> np.ndarray:
    """The change as one vector: tensors in name order, or the amount along each direction."""
    if isinstance(update, TensorUpdate):
        return np.concatenate([update.tensors[name].numpy().reshape(-1) for name in sorted(update.tensors)])
    total = np.zeros(SIZE)
    np.add.at(total, update.indices, update.coefs.astype(np.float64))
    return total.astype(np.float32)


@pytest.mark.parametrize("name", names("aggregation"))
def test_one_client_is_the_identity(name: str) -> None:
    """Kills: dividing by the number of examples twice; lost tensors or pairs."""
    rule = build(name)
    update = update_for(rule, 0)
    assert_same(rule, rule.combine([update], np.ones(1), {}), update)


@pytest.mark.parametrize("num_clients", [2, 3, 7])
@pytest.mark.parametrize("name", names("aggregation"))
def test_equal_updates_give_that_update(name: str, num_clients: int) -> None:
    """Kills: a step that grows with the number of clients; weights that do not sum to 1."""
    rule = build(name)
    weights = rule.weights(list(range(1, num_clients + 1)))
    combined = rule.combine([update_for(rule, 0)] * num_clients, weights, {})
    assert_same(rule, combined, update_for(rule, 0))


@pytest.mark.parametrize("num_clients", [2, 5, 9])
@pytest.mark.parametrize("name", names("aggregation"))
def test_the_order_of_clients_does_not_change_a_bit(name: str, num_clients: int) -> None:
    """Kills: floating-point sums in order of arrival."""
    rule = build(name)
    weights = rule.weights([3 + i % 4 for i in range(num_clients)])
    updates = [update_for(rule, client) for client in range(num_clients)]
    first = effective(rule.combine(updates, weights, {}))
    for seed in range(6):
        order = stream(seed, "order").permutation(num_clients)
        shuffled = rule.combine([updates[i] for i in order], weights[order], {})
        assert effective(shuffled).tobytes() == first.tobytes()


@pytest.mark.parametrize("name", names("aggregation"))
def test_the_input_updates_stay_as_they_were(name: str) -> None:
    """Kills: accumulating into the first client's arrays."""
    rule = build(name)
    updates = [update_for(rule, client) for client in range(3)]
    rule.combine(updates, rule.weights([1, 2, 3]), {})
    for client, update in enumerate(updates):
        assert np.array_equal(effective(update), effective(update_for(rule, client)))


@pytest.mark.parametrize("name", names("aggregation"))
def test_weights_sum_to_one_and_follow_the_choice(name: str) -> None:
    """Kills: weighting by examples when equal weights were asked for."""
    method = find("aggregation", name)
    by_examples = method(**{**method.example, "weighting": "examples"}).weights([1, 3])
    equal = method(**{**method.example, "weighting": "equal"}).weights([1, 3])
    assert by_examples.tolist() == [0.25, 0.75]
    assert equal.tolist() == [0.5, 0.5]
