"""The autograd functions behind `fused`: each a part of a Llama-like layer, with its gradient written out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Dense:
    """y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ"""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    a: Tensor | None = None  # (r, in)
    b: Tensor | None = None  # (out, r)
    scale: float = 0.0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (T, in) -> y (T, out) and x Aᵀ (T, r)."""
        y = torch.mm(x, self.weight.t()) if self.bias is None else torch.addmm(self.bias, x, self.weight.t())
        if self.a is None or self.b is None:
            return y, None
        inner = torch.mm(x, self.a.t())
        return y.addmm_(inner, self.b.t(), alpha=self.scale), inner

    def pull(
        self, dy: Tensor, x: Tensor, inner: Tensor | None, dx: Tensor | None, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of weight, bias, a and b, where needed; adds the input's to `dx` unless that is None."""
        grads: list[Tensor | None] = [
            torch.mm(dy.t(), x) if needs[0] else None,
            dy.sum(0) if needs[1] else None,
            None,
            None,
        ]
        if dx is not None:
            dx.addmm_(dy, self.weight)
        if self.a is not None and self.b is not None and inner is not None:
            d_inner = torch.mm(dy, self.b).mul_(self.scale)
            if dx is not None:
                dx.addmm_(d_inner, self.a)
            if needs[2]:
                grads[2] = torch.mm(d_inner.t(), x)
            if needs[3]:
                grads[3] = torch.mm(dy.t(), inner).mul_(self.scale)
        return grads


def _layers(scales: Sequence[float], tensors: Sequence[Any]) -> list[Dense]:
    quads = (tensors[4 * i : 4 * i + 4] for i in range(len(scales)))
    return [Dense(w, bias, a, b, scale) for (w, bias, a, b), scale in zip(quads, scales, strict=True)]


class Linears(torch.autograd.Function):
    """Several linear layers on one input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        outputs, inners = zip(*(layer(flat) for layer in _layers(scales, tensors)), strict=True)
        ctx.scales, ctx.shape = scales, x.shape
        ctx.save_for_backward(flat, *tensors, *inners)
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        number = len(ctx.scales)
        x, *rest = ctx.saved_tensors
        tensors, inners = rest[: 4 * number], rest[4 * number :]
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        for i, layer in enumerate(_layers(ctx.scales, tensors)):
            dy = dys[i].reshape(len(x), -1)
            grads += layer.pull(dy, x, inners[i], dx, ctx.needs_input_grad[2 + 4 * i : 6 + 4 * i])
        return (None if dx is None else dx.view(ctx.shape), None, *grads)


class GatedFeedForward(torch.autograd.Function):
    """down(silu(gate(x)) · up(x)); keeps gate and up, makes their product again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        gate, up, down = _layers(scales, tensors)
        (g, g_inner), (u, u_inner) = gate(flat), up(flat)
        y, y_inner = down(nnf.silu(g).mul_(u))
        ctx.scales, ctx.shape = scales, x.shape
        ctx.save_for_backward(flat, g, u, g_inner, u_inner, y_inner, *tensors)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, g_inner, u_inner, y_inner, *tensors = ctx.saved_tensors
        gate, up, down = _layers(ctx.scales, tensors)
        needs = ctx.needs_input_grad[2:]
        dy = dy.reshape(len(x), -1)
        s = nnf.silu(g)
        d_hidden = torch.zeros_like(g)
        down_grads = down.pull(dy, s * u, y_inner, d_hidden, needs[8:])
        du = s.mul_(d_hidden)
        dg = torch.ops.aten.silu_backward(d_hidden.mul_(u), g)
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grads = gate.pull(dg, x, g_inner, dx, needs[:4]) + up.pull(du, x, u_inner, dx, needs[4:8]) + down_grads
        return (None if dx is None else dx.view(ctx.shape), None, *grads)


# -- norm and rotation ------------------------------------------------------------------------------------------------


class RmsNorm(torch.autograd.Function):
    """x / rms(x) · weight (Zhang and Sennrich, arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (size.square_().div_(x.shape[-1]).add_(eps)).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (dy * x).mul_(scale).flatten(0, -2).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        d_unit = dy * weight
        along = torch.linalg.vecdot(d_unit, x)[..., None].mul_(scale.pow(3)).div_(-x.shape[-1])
        return d_unit.mul_(scale).addcmul_(x, along), d_weight, None


class Rotation(torch.autograd.Function):
    """Rotary positions (Su et al., arXiv 2104.09864), halves as transformers lays them out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        half = dy.shape[-1] // 2
        dx = dy * cos
        dx[..., :half].addcmul_(dy[..., half:], sin[..., half:])
        dx[..., half:].addcmul_(dy[..., :half], sin[..., :half], value=-1)
        return dx, None, None
