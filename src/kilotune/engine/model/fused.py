"""Fused: the layers of Llama-like models as a few autograd functions that keep less and do less.

transformers writes a layer as some hundred small operations, peft adds ten for every adapted matrix, and autograd keeps
what each of them made. Here a norm, the products that share an input (with their LoRA factors), the rotation of
queries and keys, and the gated feed-forward are one function each, with its own gradient: scalings ride along with a
matrix product, sums go into the buffer of the product before, the gated activation is made again instead of kept.

Only for gradients in float32. Anything else (evaluation, probes, autocast, hooks, dropout, modules of another make)
takes the module's own forward. Modules are recognised by their parts, and each kind is compared with its own forward
before it is trusted.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from kilotune.engine.model._layers import Dense, GatedFeedForward, Linears, RmsNorm, Rotation

__all__ = ["fuse"]

CLOSE = 1e-4  # relative to the largest number: the same sums in another order
_FUSED: "WeakSet[nn.Module]" = WeakSet()

Forward = Callable[..., Any]
"""Takes a module and the arguments of its forward; NotImplemented where the module's own has to be used."""


def fuse(model: nn.Module) -> None:
    """Give the modules of `model` that are known a forward that runs fused when gradients are wanted."""
    if model in _FUSED:
        return
    _FUSED.add(model)
    trusted: dict[tuple[type, ...], bool] = {}
    for module in model.modules():
        forward, example = _recognise(module)
        if forward is None or "forward" in vars(module):
            continue
        kind = (type(module), *map(type, module.children()))
        if kind not in trusted:
            trusted[kind] = _agrees(module, forward, example)
        if trusted[kind]:
            module.forward = partial(_either, module, forward, module.forward)


def _either(module: nn.Module, fused: Forward, own: Forward, *args: Any, **kwargs: Any) -> Any:
    if torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        result = fused(module, *args, **kwargs)
        if result is not NotImplemented:
            return result
    return own(*args, **kwargs)


def _recognise(module: Any) -> tuple[Forward | None, dict[str, Any]]:
    """The fused forward of a module, and arguments to try it on."""

    def has(*names: str) -> bool:
        return all(hasattr(module, name) for name in names)

    if has("weight", "variance_epsilon") and getattr(module.weight, "dim", int)() == 1:
        return _norm, {"hidden_states": _numbers(1, 5, len(module.weight))}
    if has("gate_proj", "up_proj", "down_proj", "act_fn") and _is_silu(module.act_fn):
        width = getattr(module.gate_proj, "in_features", 0)
        return _feed_forward, {"x": _numbers(1, 5, width)}
    if has("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "config"):
        angles = torch.arange(5.0)[:, None] / torch.arange(1.0, module.head_dim // 2 + 1)
        around = torch.cat([angles, angles], dim=-1)[None]
        hidden = _numbers(1, 5, getattr(module.q_proj, "in_features", 0))
        tables = (around.cos(), around.sin())
        return _attention, {"hidden_states": hidden, "position_embeddings": tables, "attention_mask": None}
    return None, {}


def _is_silu(activation: object) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _numbers(*shape: int) -> Tensor:
    """Numbers without a pattern that a wrong formula could live with; no generator is touched."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(1.0, count + 1).square()).reshape(shape)


def _agrees(module: nn.Module, fused: Forward, example: dict[str, Any]) -> bool:
    """Whether output and input gradient are those of the module's own forward."""
    results = []
    for forward in (partial(fused, module), module.forward):
        inputs = {k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in example.items()}
        try:
            with torch.enable_grad():
                output = forward(**inputs)
                if output is NotImplemented:
                    return False
                output = output[0] if isinstance(output, tuple) else output
                (first,) = [v for v in inputs.values() if isinstance(v, Tensor)]
                (gradient,) = torch.autograd.grad((output * _numbers(*output.shape)).sum(), first)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False
        results.append((output.detach(), gradient))
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= CLOSE * b.abs().max()) for a, b in zip(*results, strict=True)
    )


# -- the forwards -----------------------------------------------------------------------------------------------------


def _norm(module: Any, hidden_states: Tensor) -> Any:
    if hidden_states.dtype != torch.float32 or module.weight.dtype != torch.float32:
        return NotImplemented
    return RmsNorm.apply(hidden_states, module.weight, module.variance_epsilon)


def _feed_forward(module: Any, x: Tensor) -> Any:
    layers = [_dense(layer) for layer in (module.gate_proj, module.up_proj, module.down_proj)]
    if x.dtype != torch.float32 or not all(layers):
        return NotImplemented
    return _apply(GatedFeedForward, x, layers)


def _attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: object = None,
    **others: Any,
) -> Any:
    """The llama form: rotated queries and keys, no norms of their own, no window, no cache."""
    layers = [_dense(layer) for layer in (module.q_proj, module.k_proj, module.v_proj, module.o_proj)]
    plain = (
        module.config._attn_implementation == "sdpa"
        and not (module.training and getattr(module, "attention_dropout", 0.0))
        and getattr(module, "sliding_window", None) is None
    )
    if hidden_states.dtype != torch.float32 or not (plain and all(layers)):
        return NotImplemented
    if past_key_values is not None or position_embeddings is None:
        return NotImplemented
    batch, length, _ = hidden_states.shape
    q, k, v = (
        out.view(batch, length, -1, module.head_dim).transpose(1, 2)
        for out in _apply(Linears, hidden_states, layers[:3])
    )
    cos, sin = (table[:, None] for table in position_embeddings)
    q, k = Rotation.apply(q, cos, sin), Rotation.apply(k, cos, sin)
    causal = attention_mask is None and length > 1
    many = q.shape[1] != k.shape[1]
    mixed = nnf.scaled_dot_product_attention(
        q, k, v, attn_mask=attention_mask, is_causal=causal, scale=module.scaling, enable_gqa=many
    )
    flat = mixed.transpose(1, 2).reshape(batch, length, -1)
    (out,) = _apply(Linears, flat, layers[3:])
    return out, None


# -- linear layers -----------------------------------------------------------------------------------------------------


def _dense(layer: Any) -> Dense | None:
    """The numbers of a linear layer, bare or with one plain LoRA of peft; None for anything that does more."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if type(layer) is nn.Linear:
        return Dense(layer.weight, layer.bias) if layer.weight.dtype == torch.float32 else None
    base = getattr(layer, "base_layer", None)
    if type(base) is not nn.Linear or not hasattr(layer, "lora_A") or layer.merged or layer.disable_adapters:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    bare = _dense(base)
    if bare is None or len(active) != 1 or active[0] in layer.lora_variant:
        return None
    (name,) = active
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    still = isinstance(dropout, nn.Identity) or not dropout.training
    if not still or b.bias is not None or not a.weight.dtype == b.weight.dtype == torch.float32:
        return None
    return Dense(bare.weight, bare.bias, a.weight, b.weight, float(layer.scaling[name]))


def _apply(function: Any, x: Tensor, layers: Sequence[Dense | None]) -> Any:
    tensors = [t for d in layers if d is not None for t in (d.weight, d.bias, d.a, d.b)]
    return function.apply(x, tuple(d.scale for d in layers if d is not None), *tensors)
