"""An update as one vector, its tensors by rising name, and back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kilotune.codec import Codec, TensorUpdate, Update, WireContext, WireError
from kilotune.codec._frame import Shapes, check_finite, check_range, check_tensors, in_name_order, numels
from kilotune.core.lazy import torch


def flatten(codec: str, update: Update, context: WireContext) -> np.ndarray:
    """(n,) float32, a fresh array. Raises WireError for numbers that are not finite or too large to be scaled."""
    if not isinstance(update, TensorUpdate):
        raise TypeError(f"{codec} takes tensors, got pairs")
    check_tensors(codec, update.tensors, context.shapes)
    out = np.empty(sum(numels(context.shapes)), np.float32)
    for name, part in zip(sorted(context.shapes), by_tensor(out, context.shapes), strict=True):
        value = update.tensors[name].detach().cpu().float().reshape(-1).numpy()
        check_range(codec, name, value)
        part[:] = value
    return out


def rebuild(codec: str, values: np.ndarray, shapes: Shapes) -> TensorUpdate:
    """Tensors by name over the memory of (n,) float32 values. Raises WireError when one is not finite."""
    tensors = {}
    for (name, shape), part in zip(in_name_order(shapes).items(), by_tensor(values, shapes), strict=True):
        check_finite(codec, f"tensor {name!r}", part)
        tensors[name] = torch.from_numpy(part).reshape(shape)
    return TensorUpdate(tensors)


def by_tensor(values: np.ndarray, shapes: Shapes) -> Iterator[np.ndarray]:
    """The part of (n,) values that belongs to each tensor, by rising name; views."""
    at = 0
    for size in numels(shapes):
        yield values[at : at + size]
        at += size


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Rising places of the `count` largest of (n,) values; among equal ones the first places win."""
    if count >= values.size:
        return np.arange(values.size)
    bar = np.partition(values, values.size - count)[values.size - count]
    above, level = np.flatnonzero(values > bar), np.flatnonzero(values == bar)
    return np.sort(np.concatenate([above, level[: count - above.size]]))


def plain(codec: Codec) -> Codec:
    """For fields that hold a codec. Raises ValueError unless it makes tensors of tensors and remembers nothing."""
    if codec.takes != "tensors" or codec.gives & {"pairs", "any_rank"}:
        raise ValueError(
            f"a codec that brings tensors of known shapes, which {codec.method_name()} does not; use topk, quantized, "
            "sign or dense"
        )
    if codec.remembers:
        raise ValueError("a codec that keeps no errors itself: use error_feedback: false, or no residual inside")
    return codec


def nested(codec: str, inner: Codec, values: np.ndarray, context: WireContext) -> bytes:
    """The payload of an inner codec for one vector."""
    try:
        update = TensorUpdate({"values": torch.from_numpy(values)})
        return inner.encode(update, inner_context(context, values.size), {})
    except WireError as error:
        raise WireError(f"{codec}: values: {error}") from None


def opened(codec: str, inner: Codec, payload: bytes, count: int, context: WireContext) -> np.ndarray:
    """(count,) float32 of what `nested` made. Raises WireError that names the outer codec."""
    try:
        update = inner.decode(payload, inner_context(context, count))
    except WireError as error:
        raise WireError(f"{codec}: values: {error}") from None
    assert isinstance(update, TensorUpdate), "an inner codec decodes to tensors"
    return update.tensors["values"].numpy()


def inner_context(context: WireContext, count: int) -> WireContext:
    """What both ends know of the vector that an inner codec carries."""
    return WireContext(context.round, context.root, {"values": (count,)}, 0, context.rng)
