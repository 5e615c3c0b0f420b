"""Loss on the answer: cross-entropy where there are labels, without ever holding the tokens x vocabulary matrix.

The body of the model runs on all tokens, the head only on positions whose next token carries a label, a chunk of rows
at a time. For backprop the gradients of hidden states and head weight are made in the forward pass, chunk by chunk, so
that no logits wait for the backward pass. Models that do more than body and head (scaled or capped logits, prompt
tuning) are recognised and run whole.

Right padding is never masked: with causal attention no labelled position can see it, and the pass without a mask is
faster. Sums are over rows in a fixed order and never split by threads.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

from kilotune.core.choosing import chooser
from kilotune.core.types import Batch

__all__ = ["RowLosses", "answer_loss", "example_losses", "hidden_loss", "label_losses", "splits", "token_errors"]

IGNORE = -100
CHUNK_NUMBERS = 1 << 24  # logits alive at once: 64 MiB in float32, and as much again for their softmax


@dataclass(frozen=True)
class RowLosses:
    """Cross-entropy of every labelled position."""

    losses: Tensor  # (N,) float32
    rows: Tensor  # (N,) int64, the example of each (`Batch.rows`)


def answer_loss(model: nn.Module, batch: Batch, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """() float32: mean or sum over the labelled tokens; gradients flow when they are enabled. 0 without any label."""
    hidden, labels, _, head = _labelled(model, batch)
    if labels.numel() == 0:
        return hidden.sum() * 0.0
    total = hidden_loss(hidden, labels, head)
    return total / labels.numel() if reduction == "mean" else total


@torch.no_grad()
def label_losses(model: nn.Module, batch: Batch) -> RowLosses:
    """The loss of each labelled token, without gradients."""
    hidden, labels, rows, head = _labelled(model, batch)
    parts = [_cross_entropy(h, y, head) for h, y in _chunks(hidden, labels, head)]
    return RowLosses(torch.cat(parts) if parts else torch.zeros(0), rows)


def example_losses(model: nn.Module, batch: Batch) -> Tensor:
    """(n,) float64: the mean loss of each example that has labelled tokens, in order of their numbers."""
    found = label_losses(model, batch)
    rows, place, count = found.rows.unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, place, found.losses.double()) / count


def _labelled(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, nn.Module | None]:
    """Hidden states (N, H) before the head, or logits (N, V) without a head; labels (N,) and their examples (N,)."""
    wanted = batch.labels[:, 1:] != IGNORE  # position t predicts token t + 1
    labels = batch.labels[:, 1:][wanted]
    rows = wanted.nonzero()[:, 0] if batch.rows is None else batch.rows[:, 1:][wanted]
    parts = _split(model)
    if (choosing := chooser(model)) is not None:
        choosing.hear(_prompt(batch))
    if parts is None:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        logits = logits[:, -batch.input_ids.shape[1] :]  # prompt tuning puts its virtual tokens in front
        return logits[:, :-1][wanted], labels, rows, None
    body, head = parts
    hidden = body(input_ids=batch.input_ids, use_cache=False, **_attention(batch, body)).last_hidden_state  # (B, T, H)
    return hidden[:, :-1][wanted], labels, rows, head


def _prompt(batch: Batch) -> Tensor:
    """(B, T) bool: the tokens of each row before its first label; the first token, which never carries loss, is one."""
    assert batch.visible is None, "rows of a model that chooses for each of them are never packed"
    answered = batch.labels != IGNORE
    answered[:, 0] = False
    return (answered.cumsum(1) == 0) & (batch.attention_mask > 0)


def _attention(batch: Batch, body: nn.Module) -> dict[str, Tensor | None]:
    if batch.visible is None:
        return {"attention_mask": None if _right_padded(batch.attention_mask) else batch.attention_mask}
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else next(body.parameters()).dtype
    mask = torch.zeros(batch.visible.shape, dtype=dtype).masked_fill_(~batch.visible, -math.inf)
    return {"attention_mask": mask, "position_ids": batch.positions}


def _right_padded(mask: Tensor) -> bool:
    return bool((mask[:, 1:] <= mask[:, :-1]).all())


@torch.no_grad()
def token_errors(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """(N,) float32: |softmax - one-hot|, the length of the loss's gradient by the logits, of hidden states (N, H)."""
    parts = []
    for h, y in _chunks(hidden, labels, head):
        error = head(h).float().softmax(dim=-1)
        error[torch.arange(len(y)), y] -= 1.0
        parts.append(error.norm(dim=-1))
    return torch.cat(parts) if parts else torch.zeros(0)


def hidden_loss(hidden: Tensor, labels: Tensor, head: nn.Module | None) -> Tensor:
    """() float32: the sum of the cross-entropies of hidden states (N, H) before the head."""
    if torch.is_grad_enabled() and _is_plain_linear(head):
        return _AnswerLoss.apply(hidden, head.weight, head.bias, labels)  # type: ignore[union-attr]
    total = hidden.new_zeros(())
    for h, y in _chunks(hidden, labels, head):
        if torch.is_grad_enabled() and head is not None:  # a head with an adapter: logits are made twice, never kept
            losses = checkpoint(_cross_entropy, h, y, head, use_reentrant=False, preserve_rng_state=False)
        else:
            losses = _cross_entropy(h, y, head)
        total = total + losses.sum()
    return total


def _cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Module | None) -> Tensor:
    logits = hidden if head is None else head(hidden)  # called as a module, so that its hooks see every use
    return nnf.cross_entropy(logits.float(), labels, reduction="none")


def _chunks(hidden: Tensor, labels: Tensor, head: nn.Module | None) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, CHUNK_NUMBERS // _vocabulary(hidden, head))
    return list(zip(hidden.split(rows), labels.split(rows), strict=True)) if len(labels) else []


def _vocabulary(hidden: Tensor, head: nn.Module | None) -> int:
    return int(hidden.shape[-1] if head is None else getattr(head, "out_features", hidden.shape[-1]))


class _AnswerLoss(torch.autograd.Function):
    """Sum of the cross-entropies of hidden @ weight.T + bias, with its gradients made in the forward pass."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight) if needs_weight else None
        d_bias = torch.zeros_like(bias) if needs_bias and bias is not None else None
        total = weight.new_zeros(())
        rows = max(1, CHUNK_NUMBERS // weight.shape[0])
        narrow = weight.to(hidden.dtype)  # bfloat16 inside autocast; else the weight itself
        shift = None if bias is None else bias.to(hidden.dtype)
        for start in range(0, len(labels), rows):
            h, y = hidden[start : start + rows], labels[start : start + rows]
            log_p = nnf.log_softmax(nnf.linear(h, narrow, shift).to(weight.dtype), dim=-1)  # (C, V)
            total -= log_p.gather(1, y[:, None]).sum()
            d_logits = log_p.exp_()
            d_logits[torch.arange(len(y)), y] -= 1.0  # softmax - one-hot
            if d_hidden is not None:
                torch.mm(d_logits.to(h.dtype), narrow, out=d_hidden[start : start + rows])
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, h.to(weight.dtype))
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        ctx.grads = (d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # type: ignore[attr-defined]
        if grads is None:
            raise RuntimeError("answer_loss: its gradients were used up by the first backward pass.")
        return (*(None if g is None else g.mul_(grad) for g in grads), None)


def _is_plain_linear(head: nn.Module | None) -> bool:
    """A bare linear layer: nothing wraps it, so its weight is all there is to it."""
    return type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks


# -- body and head ----------------------------------------------------------------------------------------------------

_PARTS: WeakKeyDictionary[nn.Module, tuple[nn.Module, nn.Module] | None] = WeakKeyDictionary()


def splits(model: nn.Module) -> bool:
    """Whether the model is a body and a head, so that the head can run on labelled positions alone."""
    return _split(model) is not None


def _split(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """(body, head) of a model whose logits are head(body(tokens)) and nothing else; None for any other."""
    if model not in _PARTS:
        parts = _find_parts(model)
        _PARTS[model] = parts if parts is not None and _same_logits(model, *parts) else None
    return _PARTS[model]


def _find_parts(model: Any) -> tuple[nn.Module, nn.Module] | None:
    if hasattr(model, "peft_config"):
        tuner: Any = model.base_model
        plain = type(tuner).forward.__qualname__ == "BaseTuner.forward"
        configs = model.peft_config.values()
        special = any(c.is_prompt_learning or getattr(c, "alora_invocation_tokens", None) for c in configs)
        if not plain or special:
            return None
        model = model.get_base_model()
    if not hasattr(model, "get_decoder") or not hasattr(model, "get_output_embeddings"):
        return None
    body, head = model.get_decoder(), model.get_output_embeddings()
    if body is None or head is None or body is model:
        return None
    return body, head


@torch.no_grad()
def _same_logits(model: nn.Module, body: nn.Module, head: nn.Module) -> bool:
    """Compare both ways on four tokens; capped or scaled logits show here."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    tokens = torch.arange(1, 5)[None]
    try:
        whole = model(input_ids=tokens, use_cache=False).logits
        split = head(body(input_ids=tokens, use_cache=False).last_hidden_state)
        return bool(whole.shape == split.shape and (whole - split).abs().max() <= 1e-4 * whole.abs().max())
    except (TypeError, AttributeError):
        return False
    finally:
        for module, training in modes.items():
            module.training = training
