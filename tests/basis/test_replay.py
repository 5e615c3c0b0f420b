"""Replay: many rounds in one walk over the weights, straight from a mapped base, are the rounds one by one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from federating import plan as small_plan
from kilotune.core.errors import WireError
from kilotune.core.types import SeedUpdate, TensorUpdate
from kilotune.engine.model.base import load_base, weights_digest
from kilotune.engine.rounds import replica as replicas
from kilotune.engine.rounds.replica import Replica
from tiny import save_tiny

# The loops of a basis are compiled for ten seconds: one test each, so that no two processes begin with the same one.
KINDS = {
    "tiled": (("kilotune",), ("kilotune", "basis.refresh=run")),
    "seeds": (("fedkseed", "basis.refresh=round", "basis.law=uniform"), ("fedkseed",)),
}


def rounds(plan, replica: Replica, count: int) -> list[tuple[int, bytes]]:
    """Payloads as a server sends them."""
    made = []
    for number in range(1, count + 1):
        rng = np.random.default_rng(number)
        if "seed_scalar" in type(plan.downlink).__module__:
            update = SeedUpdate(rng.integers(0, 64, 20), rng.standard_normal(20).astype(np.float32) * 1e-2)
        else:
            coords = torch.from_numpy(rng.standard_normal(64).astype(np.float32)) * 1e-2
            update = TensorUpdate({"coords": coords})
        made.append((number, plan.downlink.encode(update, replica.context(number), {})))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_rounds_in_one_walk_equal_rounds_one_by_one(kind, base, data, monkeypatch):
    """Same digest, however many rounds a walk takes, each with a root of its own or all with one. Kills: rounds that
    are summed before they are added, scaled by another root's noise, left out at the seam of two walks, or scaled by
    the rms of weights that already moved."""
    for how in KINDS[kind]:
        plan = small_plan(base, data, *how)
        one_by_one = Replica(load_base(str(base), writable=True), plan)
        payloads = rounds(plan, one_by_one, 7)
        for number, payload in payloads:
            one_by_one.apply(number, payload)
        assert one_by_one.digest() != load_base(str(base)).digest
        for at_once, writable in ((256, True), (3, True), (3, False)):
            monkeypatch.setattr(replicas, "ROUNDS_AT_ONCE", at_once)
            replica = Replica(load_base(str(base), writable=writable), plan)
            replica.replay(iter(payloads))
            assert (replica.round, replica.digest()) == (7, one_by_one.digest()), how


def test_a_round_out_of_order_is_refused_before_any_weight_moves(base, data):
    """Kills: half a replay applied; a gap in the rounds."""
    plan = small_plan(base, data)
    replica = Replica(load_base(str(base), writable=True), plan)
    before, payloads = replica.digest(), rounds(plan, replica, 3)
    with pytest.raises(WireError, match="round 3 does not follow round 1"):
        replica.replay([payloads[0], payloads[2]])
    assert (replica.round, replica.digest()) == (0, before)


class NewMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.total += result.untyped_storage().nbytes()
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


def dirty_bytes(file: Path) -> int:
    """Pages of a mapped file that this process has changed, and so owns a copy of. Fails when it is not mapped."""
    total, inside, seen = 0, False, False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(file))
            seen = seen or inside
        elif inside and line.startswith("Anonymous:"):
            total += 1024 * int(line.split()[1])
    assert seen, f"{file} is not mapped"
    return total


def test_a_mapped_base_is_read_once_and_never_written(tmp_path, data, monkeypatch):
    """New memory is the changed weights and some coordinates, not one tensor more; the mapping stays clean.

    Kills: a copy that is changed afterwards, a copy for every walk, pages of the file turned private.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_tiny(tmp_path / "wide", hidden_size=64, intermediate_size=512)
    stored = (folder / "model.safetensors").read_bytes()
    plan = small_plan(folder, data)
    base = load_base(str(folder), writable=False)
    assert base.mapped
    pages = {name: param.data for name, param in base.parameters().items()}  # keeps the mapping
    replica = Replica(base, plan)
    payloads = rounds(plan, replica, 6)
    monkeypatch.setattr(replicas, "ROUNDS_AT_ONCE", 3)
    with NewMemory() as new:
        replica.replay(payloads)
    weights = sum(4 * page.numel() for page in pages.values())
    coordinates = 2 * 4 * 64 * (len(payloads) * (len(pages) + 2))
    assert weights <= new.total <= weights + coordinates
    assert new.largest == 4 * max(page.numel() for page in pages.values())
    assert dirty_bytes(folder / "model.safetensors") == 0
    assert weights_digest(pages) == base.digest
    assert (folder / "model.safetensors").read_bytes() == stored
