"""The server's rules against the papers' loops written out in NumPy, and local steps that are held back."""

import numpy as np
import pytest
import torch

from kilotune.core.types import TensorUpdate
from kilotune.engine.rounds.tally import outer_step
from kilotune.engine.training.step import Memory
from kilotune.optimizer.adamw import AdamW
from kilotune.optimizer.adaptive import Adaptive
from kilotune.optimizer.co2 import CO2
from kilotune.optimizer.proximal import Proximal
from kilotune.optimizer.sgd import SGD

CHANGES = np.array([[0.3, -2.0, 0.0, 1e-3], [-0.1, 1.5, 0.2, 1e-3], [0.4, 0.5, -0.2, 0.0], [0.0, 0.0, 3.0, -1e-3]])


def walk(rule, changes):
    """Where everybody ends who starts at 0 and follows a server that hears these mean changes, one a round."""
    x, states, public = torch.zeros(changes.shape[1], dtype=torch.float64), {}, {}
    for number, change in enumerate(changes):
        foreseen = rule.foresee(public)
        step = rule.follow(outer_step(rule, TensorUpdate({"w": torch.from_numpy(change)}), states).tensors["w"], public)
        assert (foreseen is not None) == (rule.foresees and number > 0)
        assert foreseen is None or torch.equal(step, foreseen)
        x += step
    return x.numpy()


@pytest.mark.parametrize("variance", ["adam", "yogi", "adagrad"])
def test_adaptive_follows_algorithm_two(variance):
    """Kills: a bias correction; v that starts at 0; a gradient instead of a change to add; Yogi's sign turned round."""
    beta1, beta2, tau, lr = 0.9, 0.95, 1e-2, 0.3
    x, m, v = np.zeros(4), np.zeros(4), np.full(4, tau**2)
    for d in CHANGES:
        m = beta1 * m + (1 - beta1) * d
        if variance == "adam":
            v = beta2 * v + (1 - beta2) * d**2
        elif variance == "yogi":
            v = v - (1 - beta2) * d**2 * np.sign(v - d**2)
        else:
            v = v + d**2
        x = x + lr * m / (np.sqrt(v) + tau)
    rule = Adaptive(variance=variance, betas=(beta1, beta2), tau=tau, lr=lr)
    np.testing.assert_allclose(walk(rule, CHANGES), x, rtol=1e-12, atol=1e-15)


def test_momentum_on_the_server_is_fedavgm_and_none_is_fedavg():
    """Kills: momentum that damps the change ((1 - beta) of it); a server that steps away from the mean."""
    x, velocity = np.zeros(4), np.zeros(4)
    for d in CHANGES:
        velocity = 0.9 * velocity + d
        x = x + velocity
    np.testing.assert_allclose(walk(SGD(lr=1.0, momentum=0.9), CHANGES), x, rtol=1e-12)
    np.testing.assert_allclose(walk(SGD(lr=1.0), CHANGES), CHANGES.sum(0), rtol=1e-12)


def test_the_outer_step_of_diloco_goes_the_clients_way():
    """Kills: a pseudo-gradient of the wrong sign, with which the loss of a convex function rises; no look-ahead."""
    target, rule, states = torch.linspace(-1, 1, 5), SGD(lr=0.7, momentum=0.9, nesterov=True), {}
    x = torch.zeros(5)
    half_way = TensorUpdate({"w": (target - x) / 2})  # what clients that go half way come to
    step = outer_step(rule, half_way, states).tensors["w"]
    torch.testing.assert_close(step, 0.7 * 1.9 * half_way.tensors["w"])
    assert (target - x - step).square().sum() < (target - x).square().sum()


def test_one_local_step_under_plain_outer_sgd_is_data_parallel_sgd():
    """Kills: an outer step that is not the mean of what the clients did."""
    gradients = torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=torch.float64)
    local, zeros = SGD(lr=0.1), torch.zeros(2, dtype=torch.float64)
    changes = [local.update(gradient, {}, zeros, 0.1) for gradient in gradients]
    step = outer_step(SGD(lr=1.0), TensorUpdate({"w": torch.stack(changes).mean(0)}), {}).tensors["w"]
    torch.testing.assert_close(step, -0.1 * gradients.mean(0), rtol=1e-12, atol=0)


def test_co2_steps_with_the_round_before_damped_by_how_far_it_went_and_clipped():
    """Kills: this round's mean; a gap below 1 or before the first step; a clipped momentum that is thrown away."""
    beta, lr, most = 0.5, 0.5, 1.2
    x, m, late, moved, lengths, gaps = np.zeros(4), np.zeros(4), np.zeros(4), 0.0, [], []
    for d in CHANGES:
        gaps.append(1 + moved / np.mean(lengths) if lengths else 1.0)
        m = np.clip(beta * m - late / gaps[-1], -most, most)
        x, late, moved = x - lr * m, d, float(np.linalg.norm(lr * m))
        lengths += [moved] if moved else []
    assert gaps[:3] == [1.0, 1.0, 2.0]
    np.testing.assert_allclose(walk(CO2(momentum=beta, lr=lr, threshold=most), CHANGES), x, rtol=1e-12)
    at_once = CO2(momentum=0.0, lr=1.0, threshold=10.0, late=False)
    np.testing.assert_allclose(walk(at_once, CHANGES), CHANGES.sum(0), rtol=1e-12)


@pytest.mark.parametrize("rule", [SGD(momentum=0.5), AdamW()], ids=["sgd", "adamw"])
def test_proximal_adds_the_pull_to_the_gradient_and_starts_anew_every_round(rule):
    """Kills: a pull towards the first round's start; towards the last step; moments lost where they should stay."""
    mu, lr, target = 0.7, 0.05, torch.tensor([3.0, -1.0], dtype=torch.float64)
    outer = Proximal(mu=mu, lr=lr, rule=rule)
    memory, ours = Memory.empty(), torch.zeros(2, dtype=torch.float64)
    plain, state = torch.zeros(2, dtype=torch.float64), rule.init(torch.zeros(2, dtype=torch.float64))
    for _ in range(3):
        start = plain.clone()
        memory.begin(outer, {"w": ours}, {}, 4)
        for _ in range(4):
            ours += outer.update(ours - target, memory.optimizer["w"], ours, lr)
            plain += rule.update(plain - target + mu * (plain - start), state, plain, lr)
        memory.carry(outer)
        memory = Memory.from_tensors(memory.tensors())  # as between two processes
        assert "start" not in memory.optimizer["w"]
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)


def test_a_rule_inside_another_has_no_rate_of_its_own():
    """Kills: two learning rates of which one has no effect."""
    assert Proximal.model_validate({"lr": 0.3, "rule": {"name": "adamw"}}).rule.lr == 0.3
    again = Proximal.model_validate({"lr": 0.3, "rule": "adamw"}).model_dump()
    assert Proximal.model_validate(again).model_dump() == again
    with pytest.raises(ValueError, match="stands beside it"):
        Proximal.model_validate({"lr": 0.3, "rule": {"name": "adamw", "lr": 0.1}})
    with pytest.raises(ValueError, match="wraps no other"):
        Proximal.model_validate({"lr": 0.3, "rule": {"name": "scaffold"}})
