"""Control variates against SCAFFOLD as its paper writes it, on quadratics whose optima lie far apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from kilotune.core.types import State, TensorUpdate
from kilotune.engine.rounds.tally import outer_step
from kilotune.engine.training.step import Memory
from kilotune.optimizer import Optimizer
from kilotune.optimizer.controlled_averaging import ControlledAveraging
from kilotune.optimizer.scaffold import OWN, Scaffold
from kilotune.optimizer.sgd import SGD

CLIENTS, SIZE, STEPS, LR = 6, 20, 5, 0.1


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CURVES = draw(0, CLIENTS, SIZE).abs() + 0.2  # f_i(x) = 1/2 Σ curve · (x - optimum)²
OPTIMA = 5 * draw(1, CLIENTS, SIZE)
GLOBAL = (CURVES * OPTIMA).sum(0) / CURVES.sum(0)
TURNS = [torch.randperm(CLIENTS, generator=torch.Generator().manual_seed(r))[:3].tolist() for r in range(150)]
ALL = [list(range(CLIENTS))] * 150


def gradient(client: int, x: Tensor) -> Tensor:
    return CURVES[client] * (x - OPTIMA[client])


def top(count: int) -> Callable[[Tensor], Tensor]:
    """The largest numbers alone."""

    def keep(x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_copy(0, (at := x.abs().topk(count).indices), x[at])

    return keep


@dataclass
class Run:
    """What a federation through the contract has come to."""

    x: Tensor = field(default_factory=lambda: torch.zeros(SIZE, dtype=torch.float64))
    public: dict[str, State] = field(default_factory=dict)
    memories: list[Memory] = field(default_factory=lambda: [Memory.empty() for _ in range(CLIENTS)])
    server: State = field(default_factory=dict)

    def own(self, client: int) -> Tensor:
        return self.memories[client].optimizer.get("x", {}).get(OWN, torch.zeros(SIZE, dtype=torch.float64))


def federate(
    local: Optimizer,
    server: Optimizer,
    turns: Sequence[list[int]],
    up: Callable[[Tensor], Tensor] = torch.clone,
    down: Callable[[Tensor], Tensor] = torch.clone,
) -> Run:
    """Rounds as worker, tally and replica make them."""
    run = Run()
    for chosen in turns:
        read = []
        for client in chosen:
            y, memory = run.x.clone(), run.memories[client]
            memory.begin(local, {"x": y}, run.public, STEPS)
            for _ in range(STEPS):
                y += local.update(gradient(client, y), memory.optimizer["x"], y, LR)
            sent = {n: up(t) for n, t in memory.outgoing(local, TensorUpdate({"x": y - run.x})).tensors.items()}
            memory.sent(local, TensorUpdate(sent))
            memory.carry(local)
            run.memories[client] = Memory.from_tensors(memory.tensors())
            read.append(sent["x"])
        change = down(outer_step(server, TensorUpdate({"x": torch.stack(read).mean(0)}), run.server).tensors["x"])
        run.x += server.follow(change, run.public.setdefault("x", {}))
    return run


def plain(turns: Sequence[list[int]], global_lr: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """SCAFFOLD, algorithm 1 with option II, two vectors each way: x, c and all c_i."""
    x, c, own = torch.zeros(SIZE).double(), torch.zeros(SIZE).double(), torch.zeros(CLIENTS, SIZE).double()
    for chosen in turns:
        moved, learned = torch.zeros(SIZE).double(), torch.zeros(SIZE).double()
        for client in chosen:
            y = x.clone()
            for _ in range(STEPS):
                y = y - LR * (gradient(client, y) - own[client] + c)
            fresh = own[client] - c + (x - y) / (STEPS * LR)
            moved, learned = moved + (y - x), learned + (fresh - own[client])
            own[client] = fresh
        x, c = x + global_lr * moved / len(chosen), c + learned / CLIENTS
    return x, c, own


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_one_vector_each_way_walks_as_scaffold_with_two(share):
    """Kills: a control of the wrong sign or scale; c counted over the round's clients instead of all; a client that
    was not asked and yet moves on; a server step without c."""
    turns = (ALL if share == 1 else TURNS)[:12]
    run = federate(Scaffold(), ControlledAveraging(lr=0.8, participation=share), turns)
    x, c, own = plain(turns, global_lr=0.8)
    torch.testing.assert_close(run.x, x, rtol=1e-10, atol=1e-10)
    scale = -LR * STEPS
    torch.testing.assert_close(run.public["x"][OWN], scale * c, rtol=1e-10, atol=1e-10)
    for client in range(CLIENTS):
        torch.testing.assert_close(run.own(client), scale * own[client], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(run.public["x"][OWN], torch.stack([run.own(i) for i in range(CLIENTS)]).mean(0))


@pytest.mark.parametrize(
    ("local", "share", "up", "rounds", "averaging"),
    [
        (Scaffold(), 1.0, torch.clone, 50, 0.1),
        (Scaffold(), 0.5, torch.clone, 50, 0.1),
        (Scaffold(beta=0.5), 0.5, top(4), 150, 0.4),
    ],
    ids=["scaffold", "some clients", "scafcom, one number in five"],
)
def test_the_optimum_of_all_is_reached_where_averaging_stays_away(local, share, up, rounds, averaging):
    """Kills: drift that is only damped; an error of compression that is never made good."""
    turns = (ALL if share == 1 else TURNS)[:rounds]
    run = federate(local, ControlledAveraging(participation=share), turns, up)
    assert (run.x - GLOBAL).norm() < 1e-5 * GLOBAL.norm()
    without = federate(SGD(), SGD(lr=1.0), turns, up)
    assert (without.x - GLOBAL).norm() > averaging * GLOBAL.norm()


def test_what_the_downlink_rounds_away_does_not_pile_up():
    """Kills: clients that add up rounded changes of c, which wander from the server's c. Bound: half a step."""
    grid = 1e-2

    def rounded(change: Tensor) -> Tensor:
        return (change / grid).round() * grid

    run = federate(Scaffold(), ControlledAveraging(participation=0.5), TURNS[:60], down=rounded)
    exact = run.server[f"x/{OWN}"]
    torch.testing.assert_close(exact, torch.stack([run.own(i) for i in range(CLIENTS)]).mean(0))
    assert (run.public["x"][OWN] - exact).abs().max() <= grid / 2
