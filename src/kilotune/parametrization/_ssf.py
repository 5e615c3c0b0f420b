"""SSF: scale-and-shift sets behind the linear layers and norms of a model, chosen for each row by its prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from kilotune.core.choosing import Chooser
from kilotune.core.errors import RecipeError
from kilotune.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

CACHE = "past_key_values"
PEFT = "Use parametrization: peft."


class Pool(Chooser):
    """y ← y ⊙ mean γ + mean β over the sets chosen for a row. All tensors are its own, the model gets hooks alone."""

    def __init__(self, model: Any, size: int, count: int, pull: float, keys: Tensor) -> None:
        """`keys` (size, hidden)."""
        body = _body(model)
        inside = set(body.modules())
        widths = {n: (m, w) for n, m in model.named_modules() if m in inside and (w := _width(m))}
        if not widths:
            raise RecipeError(f"parametrization: {type(model).__name__} has no linear layers in its body. {PEFT}")
        param = partial(torch.nn.Parameter, requires_grad=False)
        self.gammas = {name: param(torch.ones(size, width)) for name, (_, width) in widths.items()}
        self.betas = {name: param(torch.zeros(size, width)) for name, (_, width) in widths.items()}
        self.keys = param(keys)
        self._count, self._pull = count, pull
        self._awake = True
        self._prompt: Tensor | None = None
        self.chosen = torch.zeros(0, count, dtype=torch.int64)  # (B, k) sets of each row of the batch under way
        self._similar = torch.zeros(0, count)  # (B, k) their cosines
        self._cached: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
        body.register_forward_pre_hook(self._before, with_kwargs=True)
        body.register_forward_hook(self._after)
        for name, (module, _) in widths.items():
            module.register_forward_hook(self._scaler(name))

    def params(self) -> dict[str, nn.Parameter]:
        """All that is trained, sorted by name."""
        named = {f"{name}.gamma": value for name, value in self.gammas.items()}
        named |= {f"{name}.beta": value for name, value in self.betas.items()}
        return dict(sorted({**named, "keys": self.keys}.items()))

    def hear(self, prompt: Tensor) -> None:
        self._prompt = prompt

    def losses(self) -> Tensor:
        """pull · (1 - Σ cos): draws the chosen keys to the queries that chose them."""
        return self._pull * (1 - self._similar.sum(1))

    def keep(self, cache: object, rows: Tensor) -> None:
        self._cached[cache] = self._cached[cache][rows]

    # -- hooks ----------------------------------------------------------------------------------------------------

    def _before(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose for the rows of a new batch; rows that go on after their cache keep what they have."""
        if not self._awake:
            return
        cache = kwargs.get(CACHE)
        if cache is not None and cache.get_seq_length() > 0:
            self.chosen = self._cached[cache]
            return
        prompt, self._prompt = self._prompt, None
        with self._asleep(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            hidden = body(*args, **{**kwargs, CACHE: None, "use_cache": False}).last_hidden_state  # (B, T, h)
        if prompt is None:
            mask = kwargs.get("attention_mask")
            prompt = torch.ones(hidden.shape[:2]) if mask is None else mask
        weight = prompt.to(hidden.dtype)[..., None]
        query = (hidden * weight).sum(1) / weight.sum(1)
        similar = torch.nn.functional.cosine_similarity(query[:, None], self.keys[None], dim=-1)  # (B, P)
        self.chosen = similar.detach().topk(self._count).indices.sort().values  # sorted: one order of every sum
        self._similar = similar.gather(1, self.chosen)

    def _after(self, body: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        cache = getattr(output, CACHE, None)
        if self._awake and cache is not None:
            self._cached[cache] = self.chosen

    def _scaler(self, name: str) -> Callable[..., Tensor | None]:
        gamma, beta = self.gammas[name], self.betas[name]

        def scale(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not self._awake:
                return None
            rows = len(self.chosen)
            if output.dim() < 3 or len(output) != rows:
                raise RecipeError(
                    f"parametrization: {name} mixes the rows of a batch, so none has its own sets. {PEFT}"
                )
            shape = (rows, *[1] * (output.dim() - 2), output.shape[-1])
            return torch.addcmul(beta[self.chosen].mean(1).view(shape), output, gamma[self.chosen].mean(1).view(shape))

        return scale

    @contextmanager
    def _asleep(self) -> Iterator[None]:
        """Inside, the model is its base."""
        self._awake = False
        try:
            yield
        finally:
            self._awake = True


def _body(model: Any) -> nn.Module:
    body = model.get_decoder() if hasattr(model, "get_decoder") else None
    if body is None or body is model or CACHE not in signature(body.forward).parameters:
        raise RecipeError(f"parametrization: {type(model).__name__} has no body that caches keys and values. {PEFT}")
    found: nn.Module = body
    return found


def _width(module: Any) -> int:
    """Of what a linear layer or a norm gives; 0 for any other module."""
    if isinstance(module, torch.nn.Linear):
        return int(module.out_features)
    weight = getattr(module, "weight", None)
    normal = "norm" in type(module).__name__.lower() and isinstance(weight, torch.Tensor) and weight.dim() == 1
    return len(weight) if normal else 0  # type: ignore[arg-type]
