"""Projection: per group of tensors, c_k = <Δ, v_k> / n for n of K public noise vectors; rebuilt as Σ c_k v_k.

Source: Shu et al., "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models", arXiv 2409.06277;
grouping, budgets and the clip as in the official code.
Departs: v has unit variance, so E[v vᵀ] = I and the rebuild is Δ in expectation (the official code rebuilds Δ/3; its
server rate 3 is our 1). Noise differs between equal groups. Uniform noise instead of a truncated normal: same second
moment. The norm of v in the clip is taken as sqrt(d), exact for signs. A change of norm 0 gets 2 seeds per group.
Wire: "PRJ1" | u8 law (0 sign, 1 gaussian, 2 uniform) | u32 checksum of the table in model order | u16 K | u32 groups |
u32 n | u16 count of each group | n u16 seeds | n fp32 coordinates, both by group, then seed; little-endian,
19 + 2·groups + 6·n bytes.
Memory: one tensor at a time on both sides; no copy of contiguous float32 tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from kilotune.codec import Codec, SeedUpdate, State, TensorUpdate, Update, WireContext, WireError
from kilotune.codec._frame import check, check_finite, check_indices, check_tensors, numel, open_header, table_checksum
from kilotune.codec._groups import budgets, flat, groups_of, square_norm
from kilotune.core.lazy import torch
from kilotune.core.noise import stream_key

if TYPE_CHECKING:
    from torch import Tensor

HEADER = struct.Struct("<4sBIHII")
MAGIC = b"PRJ1"
LAW_CODES = {"sign": 0, "gaussian": 1, "uniform": 2}
MOST = 65535  # what a 2-byte count can say


class Projection(Codec):
    """Clients encode tensors, the server encodes aggregated coordinates; both decode to pairs with groups."""

    gives = frozenset({"pairs", "own_support", "round_bound"})

    law: Literal["uniform", "sign", "gaussian"] = Field("uniform", description="noise; the paper's is near uniform")
    num_seeds: int = Field(200, ge=1, le=MOST, description="K when the recipe has no basis; script of the paper")
    max_norm: float = Field(10.0, gt=0, description="largest norm of one seed's share of a group; official code")

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """Tensors are the change (after - before). Seeds are drawn from the sender's private generator."""
        groups = groups_of({name: numel(shape) for name, shape in context.shapes.items()})
        if isinstance(update, TensorUpdate):
            update = self._project(update, context, groups)
        if update.groups is None:
            raise TypeError("projection takes tensors, or pairs with groups")
        check_indices("projection", update.indices, self._size(context))
        check_finite("projection", "the coordinates", update.coefs)
        order = np.lexsort((update.indices, update.groups))
        counts = np.bincount(update.groups, minlength=len(groups))
        if counts.size > len(groups) or counts.max(initial=0) > MOST:
            raise ValueError(f"projection: got {counts.size} groups, at most {counts.max()} pairs in one.")
        table = table_checksum(context.shapes)
        head = (MAGIC, LAW_CODES[self.law], table, self._size(context), len(groups), order.size)
        parts = [counts.astype("<u2"), update.indices[order].astype("<u2"), update.coefs[order].astype("<f4")]
        return HEADER.pack(*head) + b"".join(part.tobytes() for part in parts)

    def _size(self, context: WireContext) -> int:
        size = context.size or self.num_seeds
        if size > MOST:
            raise WireError(f"projection: got {size} seeds, expected at most {MOST}. Lower basis.size.")
        return size

    def _project(self, update: TensorUpdate, context: WireContext, groups: list[list[str]]) -> SeedUpdate:
        """1. norms; 2. budgets; 3. a private choice of seeds; 4. coordinates."""
        from kilotune.core import kernels  # loads numba: only when noise is really made

        check_tensors("projection", update.tensors, context.shapes)
        if context.rng is None:
            raise ValueError("projection: encode needs the sender's generator in context.rng.")
        norms = np.zeros(len(groups))
        for group, members in enumerate(groups):  # 1.
            squares = [square_norm(flat(update.tensors[name])) for name in members]
            check_finite("projection", f"tensors {members[0]!r} ..", np.array(squares))
            norms[group] = np.sqrt(sum(squares))
        chosen, coords = [], []
        for members, count in zip(groups, budgets(norms, self._size(context)), strict=True):  # 2.
            seeds = np.sort(context.rng.choice(self._size(context), count, replace=False))  # 3.
            inner = np.zeros(count)
            for name in members:
                keys = [stream_key(self.law, context.root, int(k), name) for k in seeds]
                inner += kernels.seeds_project(flat(update.tensors[name]), self.law, keys)
            chosen.append(seeds)
            coords.append(inner / count)  # 4.
        owner = np.repeat(np.arange(len(groups)), [seeds.size for seeds in chosen])
        joined = [np.concatenate(parts) if parts else np.empty(0) for parts in (chosen, coords)]
        return SeedUpdate(joined[0].astype(np.int64), joined[1].astype(np.float32), owner.astype(np.int64))

    def decode(self, payload: bytes, context: WireContext) -> SeedUpdate:
        """Fresh arrays, by group and seed."""
        code, table, size, num_groups, count = open_header("projection", HEADER, MAGIC, payload)
        groups = groups_of({name: numel(shape) for name, shape in context.shapes.items()})
        check("projection", "law", code, LAW_CODES[self.law])
        check("projection", "table checksum", table, table_checksum(context.shapes))
        check("projection", "number of seeds", size, self._size(context))
        check("projection", "number of groups", num_groups, len(groups))
        check("projection", "length", len(payload), HEADER.size + 2 * num_groups + 6 * count)
        counts = np.frombuffer(payload, "<u2", num_groups, HEADER.size).astype(np.int64)
        check("projection", "sum of counts", int(counts.sum()), count)
        indices = np.frombuffer(payload, "<u2", count, HEADER.size + 2 * num_groups).astype(np.int64)
        coords = np.frombuffer(payload, "<f4", count, HEADER.size + 2 * num_groups + 2 * count).astype(np.float32)
        check_indices("projection", indices, size)
        check_finite("projection", "the coordinates", coords)
        return SeedUpdate(indices, coords, np.repeat(np.arange(num_groups), counts))

    def expand(self, update: Update, context: WireContext) -> Iterator[tuple[str, Tensor]]:
        """Σ c v of every tensor that has non-zero coordinates; each share c·v is scaled down to `max_norm`."""
        from kilotune.core import kernels

        if not isinstance(update, SeedUpdate) or update.groups is None:
            raise TypeError("projection expands pairs with groups")
        for group, members in enumerate(groups_of({name: numel(shape) for name, shape in context.shapes.items()})):
            width = sum(numel(context.shapes[name]) for name in members)
            mine = (update.groups == group) & np.isfinite(update.coefs) & (update.coefs != 0)
            bound = self.max_norm / max(width, 1) ** 0.5
            coefs = np.clip(update.coefs[mine].astype(np.float64), -bound, bound).astype(np.float32)
            for name in members if coefs.size else ():
                change = np.zeros(numel(context.shapes[name]), np.float32)
                keys = [stream_key(self.law, context.root, int(k), name) for k in update.indices[mine]]
                kernels.seeds_add(change, change, self.law, [(keys, coefs)])
                yield name, torch.from_numpy(change).reshape(context.shapes[name])

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """`update_numel` in model order; without `num_pairs` every group is taken to use all K = `num_seeds`."""
        num_groups = len(groups_of(update_numel))
        return HEADER.size + 2 * num_groups + 6 * (num_pairs or num_groups * self.num_seeds)


METHOD = Projection
