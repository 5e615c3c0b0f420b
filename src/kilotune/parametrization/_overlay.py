"""Overlay: forward passes see changed weights while the stored ones stay as they are.

The changed values live in scratch memory, a block of rows at a time, and never whole: a linear layer multiplies block
after block while it is in cache, an embedding makes the rows that are looked up, any other module gets its own
parameters replaced for the time of its forward. What is never written cannot drift and needs no restoring.

`both` is a two-point probe, w + d and w - d. Short batches go through the body of the model once, as a batch of two
halves of which one sees w + d and the other w - d: weights and noise are then read once for both. The bits are those
of two passes; a model on which they are not (tried on four tokens) makes two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from kilotune.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


Fill: TypeAlias = "Callable[[str, Tensor, int, Tensor | None, Tensor | None], None]"
"""fill(name, stored, start, plus, minus): write what the passes at w + d and at w - d shall see.

`stored` is the parameter, or rows of it of which the first element is number `start`; a side not wanted is None.
"""

BLOCK = 1 << 20  # numbers of one block: 4 MiB, which stay in the cache between their making and their use
GAP = 1 << 16  # numbers between two rows looked up that are made for nothing rather than begin anew
DOUBLE_TOKENS = 1024  # longer batches are slow enough for weights to be read twice; twice their activations would weigh
MISFIT = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)

Place: TypeAlias = "tuple[str, nn.Module, str]"
"""(name of a covered parameter, module that holds it, attribute there)."""


class Overlay:
    """The covered parameters of a model, and the modules that compute with them."""

    def __init__(self, model: nn.Module, params: dict[str, nn.Parameter]) -> None:
        readers = _readers(model, {param: name for name, param in params.items()})
        self._seers = [(module, _seer(self, module, places)) for module, places in readers.items()]
        self._body = _body(model, readers)
        self._scratch: dict[torch.Size, tuple[Tensor, Tensor]] = {}  # views of one pair of blocks
        self._fill: Fill | None = None
        self._side = 0  # 0: w + d, 1: w - d
        self._double: tuple[int, int] | None = None  # (rows, tokens) of the doubled batch now under way
        self._doubles: bool | None = None  # whether doubling gives the bits of two passes; None: not tried yet
        self._later: list[tuple[Tensor, Any]] = []  # (input ids, output) of the second halves

    @contextmanager
    def over(self, fill: Fill) -> Iterator[None]:
        """Inside, modules compute with what `fill` writes into `plus`."""
        kept = [module.__dict__.get("forward") for module, _ in self._seers]
        self._fill = fill
        try:
            for module, seer in self._seers:
                module.__dict__["forward"] = seer
            yield
        finally:
            self._fill, self._side, self._double = None, 0, None
            for (module, _), forward in zip(self._seers, kept, strict=True):
                _put_back(module, forward)

    def both(self, fill: Fill, parts: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
        """The sums of the parts at w + d and at w - d."""
        sums = [0.0, 0.0]
        with self.over(fill), self._doubling():
            for part in parts:
                for self._side in (0, 1):
                    sums[self._side] += float(part())
                self._later.clear()  # of a call that only the first pass made
        return sums[0], sums[1]

    # -- what the seers use -------------------------------------------------------------------------------------------

    def fill(self, name: str, stored: Tensor, start: int, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Those of the two values that are wanted now, filled."""
        assert self._fill is not None, "overlay: used outside of its context"
        plus, minus = values
        if self._double is not None:
            self._fill(name, stored, start, plus, minus)
            return values
        self._fill(name, stored, start, *((None, minus) if self._side else (plus, None)))
        return values[self._side : self._side + 1]

    def scratch(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Room for both sides: one pair of blocks for all, or memory of its own for what is larger."""
        if shape.numel() > BLOCK:
            return torch.empty(shape), torch.empty(shape)
        if not self._scratch:
            self._scratch[torch.Size([BLOCK])] = torch.empty(BLOCK), torch.empty(BLOCK)
        if shape not in self._scratch:
            plus, minus = self._scratch[torch.Size([BLOCK])]
            self._scratch[shape] = plus[: shape.numel()].view(shape), minus[: shape.numel()].view(shape)
        return self._scratch[shape]

    def halves(self, x: Any) -> Sequence[Any]:
        """What each side sees of an input: all of it, or its half of the doubled batch."""
        if self._double is None:
            return (x,)
        if not isinstance(x, torch.Tensor) or x.dim() < 2 or x.shape[0] == 1:
            return x, x
        rows, tokens = self._double
        if x.shape[0] != (tokens if x.dim() == 2 and x.is_floating_point() else rows):
            raise RuntimeError(f"overlay: got an input of shape {tuple(x.shape)} in a batch of {rows} doubled rows.")
        return x.chunk(2)

    @contextmanager
    def one_side(self, side: int) -> Iterator[None]:
        """Inside, all modules see one half of the doubled batch."""
        double, before = self._double, self._side
        self._double, self._side = None, side
        try:
            yield
        finally:
            self._double, self._side = double, before

    # -- doubled batches ----------------------------------------------------------------------------------------------

    @contextmanager
    def _doubling(self) -> Iterator[None]:
        """Inside, the body passes both halves at once when it is called for the first, and keeps the second."""
        if self._body is None or self._doubles is False:
            yield
            return
        body, kept, forward = self._body, self._body.__dict__.get("forward"), self._body.forward
        body.__dict__["forward"] = partial(self._pass_both, forward)
        try:
            if self._doubles is None:
                self._doubles = self._agrees(body, forward)
            if not self._doubles:
                _put_back(body, kept)
            yield
        finally:
            self._later.clear()
            _put_back(body, kept)

    def _pass_both(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        if args or ids is None or ids.numel() > DOUBLE_TOKENS:
            return forward(*args, **kwargs)
        if self._side == 1:
            while self._later:
                seen, output = self._later.pop(0)
                if torch.equal(seen, ids):
                    return output
            return forward(**kwargs)
        rows = len(ids)
        self._double = (2 * rows, 2 * ids.numel())
        try:
            output = forward(**{key: _twice(value, rows) for key, value in kwargs.items()})
        finally:
            self._double = None
        plus, minus = output.last_hidden_state.chunk(2)
        self._later.append((ids, type(output)(last_hidden_state=minus)))
        return type(output)(last_hidden_state=plus)

    def _agrees(self, body: nn.Module, forward: Callable[..., Any]) -> bool:
        """Whether a doubled pass over four tokens gives the bits of two single ones."""
        tokens = torch.arange(1, 5)[None]
        try:
            for self._side in (0, 1):
                doubled = body(input_ids=tokens, use_cache=False).last_hidden_state
                single = forward(input_ids=tokens, use_cache=False).last_hidden_state
                if not torch.equal(doubled, single):
                    return False
        except MISFIT:
            return False
        return True


def _twice(x: Any, rows: int) -> Any:
    if not isinstance(x, torch.Tensor) or x.dim() < 2 or len(x) != rows:
        return x
    return x.expand(2, *x.shape[1:]) if rows == 1 else torch.cat([x, x])


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


# -- which module computes with which parameter -----------------------------------------------------------------------


def _readers(model: nn.Module, names: dict[nn.Parameter, str]) -> dict[nn.Module, list[Place]]:
    """Modules with a forward of their own, and the covered parameters that each reads itself.

    Parameters in a container that is never called (nn.ParameterDict) are read by the module around it.
    """
    modules = dict(model.named_modules())
    readers: dict[nn.Module, list[Place]] = {}
    for path, module in modules.items():
        for key, param in module.named_parameters(recurse=False, remove_duplicate=False):
            if param in names:
                at = path
                while at and type(modules[at]).forward is torch.nn.Module.forward:
                    at = at.rpartition(".")[0]
                readers.setdefault(modules[at], []).append((names[param], module, key))
    return readers


def _body(model: Any, readers: dict[nn.Module, list[Place]]) -> nn.Module | None:
    """What turns tokens into hidden states in a language model, if all that is covered lies in it or the head."""
    try:
        body, head = model.get_decoder(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if body is None or body is model or body in readers:
        return None
    inside = {*body.modules(), head}
    return cast(torch.nn.Module, body) if all(module in inside for module in readers) else None


# -- forwards that see the change -------------------------------------------------------------------------------------


def _seer(overlay: Overlay, module: nn.Module, places: list[Place]) -> Callable[..., Any]:
    plain = "forward" not in module.__dict__ and [key for _, _, key in places] in (["weight"], ["weight", "bias"])
    if plain and type(module) is torch.nn.Linear:
        return _Linear(overlay, module, places)
    if plain and type(module) is torch.nn.Embedding and module.max_norm is None:
        return _Embedding(overlay, module, places[0][0])
    return _Other(overlay, module, places)


class _Linear:
    """x Wᵀ + b, a block of rows of W at a time; the sides' halves of x one after the other."""

    def __init__(self, overlay: Overlay, module: nn.Linear, places: list[Place]) -> None:
        self.overlay, self.module = overlay, module
        self.name = places[0][0]
        self.bias_name = places[1][0] if len(places) > 1 else None
        self.rows = max(1, BLOCK // module.in_features)

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.module.weight.data, self.module.bias
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        halves = [half.reshape(-1, half.shape[-1]).to(dtype) for half in self.overlay.halves(x)]
        num = sum(map(len, halves))
        out = torch.empty(num, len(weight), dtype=dtype)
        outs = out.chunk(len(halves))
        biases = self._biases(bias, dtype)
        for first in range(0, len(weight), self.rows):
            part = weight if self.rows >= len(weight) else weight[first : first + self.rows]
            values = self.overlay.fill(self.name, part, first * weight.shape[1], self.overlay.scratch(part.shape))
            for i, value in enumerate(values):
                into = outs[i] if part is weight else outs[i][:, first : first + self.rows]
                if value.dtype != dtype:
                    value = value.to(dtype)
                if bias is None:
                    torch.mm(halves[i], value.t(), out=into)
                else:
                    b = biases[i % len(biases)][first : first + self.rows]
                    torch.addmm(b, halves[i], value.t(), out=into)
        return out.view(*x.shape[:-1], len(weight))

    def _biases(self, bias: nn.Parameter | None, dtype: torch.dtype) -> list[Tensor]:
        if bias is None:
            return []
        if self.bias_name is None:
            return [bias.data.to(dtype)]
        room = torch.empty_like(bias), torch.empty_like(bias)
        return [value.to(dtype) for value in self.overlay.fill(self.bias_name, bias.data, 0, room)]


class _Embedding:
    """Only the rows that are looked up, in runs of neighbours."""

    def __init__(self, overlay: Overlay, module: nn.Embedding, name: str) -> None:
        self.overlay, self.module, self.name = overlay, module, name

    def __call__(self, ids: Tensor) -> Tensor:
        weight = self.module.weight.data
        rows, places = torch.unique(ids, return_inverse=True)
        halves = self.overlay.halves(places)
        tables = [weight.new_empty(len(rows), weight.shape[1]) for _ in halves]
        for at, end in _runs(rows.tolist(), weight.shape[1]):
            first = int(rows[at])
            part = weight[first : int(rows[end - 1]) + 1]
            values = self.overlay.fill(self.name, part, first * weight.shape[1], self.overlay.scratch(part.shape))
            for table, value in zip(tables, values, strict=True):
                torch.index_select(value, 0, rows[at:end] - first, out=table[at:end])
        looked_up = [torch.nn.functional.embedding(half, table) for half, table in zip(halves, tables, strict=True)]
        if len(looked_up) == 1:
            return looked_up[0]
        if len(ids) == 1 and self.overlay._double is not None:  # positions that all rows share
            each = self.overlay._double[0] // 2
            looked_up = [half.expand(each, *half.shape[1:]) for half in looked_up]
        return torch.cat(looked_up)


def _runs(rows: list[int], width: int) -> Iterator[tuple[int, int]]:
    """Sorted rows cut where a gap costs more than a new start, or a block would be full."""
    begin = 0
    for at in range(1, len(rows) + 1):
        if at < len(rows) and (rows[at] - rows[at - 1]) * width <= GAP and (rows[at] - rows[begin]) * width < BLOCK:
            continue
        yield begin, at
        begin = at


class _Other:
    """Any module: its forward with its parameters replaced, once for each side; what it calls sees that side alone."""

    def __init__(self, overlay: Overlay, module: nn.Module, places: list[Place]) -> None:
        self.overlay, self.forward, self.places = overlay, module.forward, places

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        overlay = self.overlay
        stored = [holder._parameters[key] for _, holder, key in self.places]
        values = [
            overlay.fill(name, param.data, 0, (torch.empty_like(param), torch.empty_like(param)))  # type: ignore[union-attr, arg-type]
            for (name, _, _), param in zip(self.places, stored, strict=True)
        ]
        if overlay._double is None:
            return self._with([value[0] for value in values], stored, args, kwargs)
        inputs = [overlay.halves(x) for x in args]
        named = {key: overlay.halves(x) for key, x in kwargs.items()}
        outs = []
        for side in (0, 1):
            with overlay.one_side(side):
                mine = [x[side] for x in inputs], {key: x[side] for key, x in named.items()}
                outs.append(self._with([value[side] for value in values], stored, *mine))
        return torch.cat(outs)

    def _with(self, values: list[Tensor], stored: list[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            for (_, holder, key), value in zip(self.places, values, strict=True):
                holder._parameters[key] = value  # type: ignore[assignment]
            return self.forward(*args, **kwargs)
        finally:
            for (_, holder, key), param in zip(self.places, stored, strict=True):
                holder._parameters[key] = param
