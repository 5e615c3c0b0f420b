"""Split client: a client that holds the first blocks, the tail and the head, and reaches the body through messages."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from kilotune.codec.dense import Dense
from kilotune.core.rng import derive
from kilotune.core.types import Batch
from kilotune.engine.composing.plan import Plan
from kilotune.engine.flower.messages import Facts
from kilotune.engine.model.compute import Compute
from kilotune.engine.model.loss import hidden_loss, token_errors
from kilotune.engine.partial.split import DOWN, UP, kept_count
from kilotune.engine.partial.splitbody import (
    Body,
    ServerBody,
    blocks_between,
    cuts_of,
    pack,
    rows_message,
    through,
    unpack,
)
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rows.batches import BatchSampler, lay_out
from kilotune.engine.rows.tokenize import IGNORE, Example
from kilotune.estimator import Objective


class Link:
    """The client's end of the messages, which it counts."""

    def __init__(self, body: Body, width: int, codec: Dense) -> None:
        self._body, self._width, self._codec = body, width, codec
        self.up_bytes = self.down_bytes = 0

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        """Hidden states (B, T, h) through the body."""
        message = rows_message(lengths) + pack(x, lengths, self._codec)
        return self._read(message, self._body.forward(message), lengths)

    def backward(self, gradient: Tensor, lengths: list[int]) -> Tensor:
        """The gradient of what `forward` gave last -> the gradient of what it took."""
        message = pack(gradient, lengths, self._codec)
        return self._read(message, self._body.backward(message), lengths)

    def _read(self, sent: bytes, answer: bytes, lengths: list[int]) -> Tensor:
        self.up_bytes += len(sent)
        self.down_bytes += len(answer)
        return unpack(answer, lengths, self._width, self._codec)


def _like(short: Tensor, x: Tensor) -> Tensor:
    """Padded at the end of its rows where `x` is longer than its longest row."""
    return nnf.pad(short, (0, 0, 0, x.shape[1] - short.shape[1]))


class _Remote(torch.autograd.Function):
    """The body as a function whose value and gradient are made elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], link: Link) -> Tensor:
        ctx.lengths, ctx.link = lengths, link
        return _like(link.forward(x, lengths), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _like(ctx.link.backward(gradient, ctx.lengths), gradient), None, None


class SplitClient:
    """The parts of a model that clients hold, and the work they do with them."""

    def __init__(self, plan: Plan, model: Any, body: Body | None = None, pad_id: int = 0) -> None:
        """`model` has the plan's parametrization attached; of its body nothing is kept here. Without a `body` the
        model's own serves, behind the same messages. Raises RecipeError for cuts that do not fit."""
        split, tail = plan.recipe.split, int(plan.parametrization.tail)  # type: ignore[attr-defined]
        decoder, lower, upper = cuts_of(model, split, tail)
        self._compute, self._pad_id = Compute.of(plan.recipe), pad_id
        self._embedding, self._prompts = decoder.embed_tokens, decoder.prompts
        self._lower = blocks_between(decoder, 0, lower)
        self._tail = blocks_between(decoder, upper, len(decoder.layers), norm=True)
        self._head = model.get_output_embeddings()
        width, codec = int(decoder.embed_tokens.weight.shape[1]), Dense(dtype=split.dtype)
        if body is None:
            between = blocks_between(decoder, lower, upper)
            assert between is not None, "there is a block between the cuts"
            body = ServerBody(between, width, codec, self._compute)
        self._link = Link(body, width, codec)

    # -- one batch ----------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, shortcut: bool) -> Tensor:
        """() float32: sum over the labelled tokens, through the body or past it."""
        hidden, labels, _ = self._labelled(batch, shortcut)
        return hidden_loss(hidden, labels, self._head)

    def _labelled(self, batch: Batch, shortcut: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (N, h) before the head, labels (N,) and their examples (N,)."""
        count = len(self._prompts.weight)
        x = through(self._lower, self._prompts(self._embedding(batch.input_ids)), self._compute)
        if not shortcut:
            lengths = (batch.attention_mask.sum(1) + count).tolist()
            x = _Remote.apply(x, lengths, self._link)
        hidden = through(self._tail, x, self._compute)[:, count:]
        wanted = batch.labels[:, 1:] != IGNORE  # position t predicts token t + 1
        assert batch.rows is not None, "batches are laid out from examples"
        return hidden[:, :-1][wanted], batch.labels[:, 1:][wanted], batch.rows[:, 1:][wanted]

    # -- rows ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scores(self, examples: Sequence[Example], max_tokens: int) -> np.ndarray:
        """(n,) float64 EL2N by the shortcut: |softmax - one-hot| per token, its mean over a row's labelled tokens.

        Source: Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet", arXiv 2107.07075, definition 2.2.
        """
        sums, counts = torch.zeros(len(examples), dtype=torch.float64), torch.zeros(len(examples))
        for batch in lay_out(examples, max_tokens, self._pad_id, packed=False):
            hidden, labels, rows = self._labelled(batch, shortcut=True)
            sums.index_add_(0, rows, token_errors(hidden, labels, self._head).double())
            counts.index_add_(0, rows, torch.ones(len(rows)))
        return (sums / counts.clamp(min=1)).numpy()

    def kept(self, examples: Sequence[Example], keep: float, max_tokens: int) -> list[int]:
        """The rows of the largest scores, in order; among equals the first ones."""
        order = np.argsort(-self.scores(examples, max_tokens), kind="stable")
        return sorted(order[: kept_count(len(examples), keep)].tolist())

    # -- a round ------------------------------------------------------------------------------------------------------

    def objectives(self, plan: Plan, name: str, train: Sequence[Example], number: int) -> Iterator[Objective]:
        """What each step of a client's round makes smaller: first those past the body, then those through it."""
        recipe = plan.recipe
        self._link.up_bytes = self._link.down_bytes = 0
        rows = self.kept(train, recipe.split.keep, recipe.micro_batch_tokens)
        for shortcut, steps in ((True, recipe.split.shortcut_steps), (False, recipe.local_steps)):
            seed = derive(recipe.seed, "shortcut" if shortcut else "batches", name)
            sampler = BatchSampler(len(rows), recipe.batch_size, seed)
            for step in range(steps):
                chosen = [train[rows[i]] for i in sampler.indices((number - 1) * steps + step)]
                batches = lay_out(chosen, recipe.micro_batch_tokens, self._pad_id, packed=False)
                yield SplitObjective(self, batches, shortcut)

    def facts(self) -> Facts:
        """The bytes of the last round's messages."""
        return {UP: self._link.up_bytes, DOWN: self._link.down_bytes}


class SplitObjective(Objective):
    """Mean loss over the labelled tokens of some batches."""

    def __init__(self, client: SplitClient, batches: list[Batch], shortcut: bool) -> None:
        self._client, self._batches, self._shortcut = client, batches, shortcut
        self._count = sum(batch.num_labels for batch in batches)

    def parts(self) -> list[Any]:
        return [partial(self._share, batch) for batch in self._batches]

    def _share(self, batch: Batch) -> Tensor:
        return self._client.loss(batch, self._shortcut) / self._count


def split_client(replica: Replica) -> SplitClient | None:
    """For recipes with a split, the client's side of a replica that also holds the body."""
    plan = replica.plan
    if not plan.recipe.split.enabled:
        return None
    return SplitClient(plan, replica.model, pad_id=replica.base.tokenizer.pad_token_id or 0)
