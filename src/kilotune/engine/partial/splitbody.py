"""Body: the blocks between the two cuts, behind messages of bytes; what both ends need to cut a model and to talk.

A batch is four messages: hidden states up (with the lengths of its rows) and down, gradients up and down. Rows travel
without padding, one after the other. See docs/wire.md.
"""

import copy
import struct
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kilotune.codec.dense import Dense
from kilotune.core.errors import RecipeError, WireError
from kilotune.core.types import TensorUpdate, WireContext
from kilotune.engine.composing.recipe import SplitSection
from kilotune.engine.model.compute import Compute
from kilotune.parametrization._prompts import decoder_of

MAGIC, HEADER = b"ROW1", struct.Struct("<4sI")
NAME = "activations"
MAX_TOKENS = 1 << 24  # of a batch


class Body(Protocol):
    """What a client knows of the blocks that it does not hold."""

    def forward(self, message: bytes) -> bytes:
        """Hidden states at the lower cut -> at the upper cut."""

    def backward(self, message: bytes) -> bytes:
        """The gradient at the upper cut, of the batch that went forward last -> at the lower cut."""


# -- cuts -------------------------------------------------------------------------------------------------------------


def blocks_between(decoder: Any, first: int, last: int, norm: bool = False) -> nn.Module | None:
    """The decoder with these blocks alone, from hidden states to hidden states; None for none of them."""
    if first == last and not norm:
        return None
    part = copy.copy(decoder)
    part.__dict__.pop("forward", None)  # the one that puts prompts in front
    part._modules = {name: own for name, own in decoder._modules.items() if name not in ("embed_tokens", "prompts")}
    part.layers = nn.ModuleList(decoder.layers[first:last])
    part.norm = decoder.norm if norm else nn.Identity()
    return part


def through(part: nn.Module | None, x: Tensor, compute: Compute) -> Tensor:
    """(B, T, h) -> (B, T, h). Rows are padded at their ends, which causal attention does not see."""
    if part is None:
        return x
    with compute.around(part):
        hidden: Tensor = part(inputs_embeds=x, use_cache=False).last_hidden_state
        return hidden


def cuts_of(model: Any, split: SplitSection, tail: int) -> tuple[Any, int, int]:
    """(decoder, lower cut, upper cut). Raises RecipeError when no block is left to the server, or the parts in turn are
    not the whole."""
    decoder = decoder_of(model)
    layers = len(decoder.layers)
    lower, upper = split.lower, layers - tail
    if upper <= lower:
        raise RecipeError(
            f"split: got split.lower {lower} and parametrization.tail {tail}, expected fewer than the base's {layers} "
            f"blocks in all. Use at most {layers - 1} together, so that the server has a body."
        )
    _require_whole(decoder, lower, upper)
    return decoder, lower, upper


@torch.no_grad()
def _require_whole(decoder: Any, lower: int, upper: int) -> None:
    """Some models do more between their blocks than pass on what they have; it shows on four tokens."""
    tokens, compute = torch.arange(1, 5)[None], Compute()
    whole = decoder(input_ids=tokens, use_cache=False).last_hidden_state
    x = decoder.prompts(decoder.embed_tokens(tokens))
    for first, last in ((0, lower), (lower, upper), (upper, len(decoder.layers))):
        x = through(blocks_between(decoder, first, last, norm=last == len(decoder.layers)), x, compute)
    if not bool((x[:, -4:] - whole).abs().max() <= 1e-4 * whole.abs().max()):
        raise RecipeError(
            f"split: {type(decoder).__name__} is not the sum of its blocks: run in turn they give another result. "
            "Use --set split.enabled=false."
        )


# -- messages ---------------------------------------------------------------------------------------------------------


def rows_message(lengths: list[int]) -> bytes:
    """What the body has to know of the rows of a batch."""
    return HEADER.pack(MAGIC, len(lengths)) + struct.pack(f"<{len(lengths)}I", *lengths)


def read_rows(message: bytes) -> tuple[list[int], bytes]:
    """(lengths, the rest of the message). Raises WireError."""
    if len(message) < HEADER.size:
        raise WireError(f"split: got a message of {len(message)} bytes, expected a header of {HEADER.size}.")
    magic, count = HEADER.unpack_from(message)
    end = HEADER.size + 4 * count
    if magic != MAGIC or not 0 < count <= MAX_TOKENS or len(message) < end:
        raise WireError(f"split: got magic {magic!r} and {count} rows, expected {MAGIC!r} and as many lengths.")
    lengths = list(struct.unpack_from(f"<{count}I", message, HEADER.size))
    if min(lengths) < 1 or count * max(lengths) > MAX_TOKENS:
        raise WireError(f"split: got rows of {min(lengths)} to {max(lengths)} tokens, expected {MAX_TOKENS} in all.")
    return lengths, message[end:]


def pack(x: Tensor, lengths: list[int], codec: Dense) -> bytes:
    """The rows of (B, T, h) without their padding."""
    flat = torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])
    return codec.encode(TensorUpdate({NAME: flat}), _context(flat.shape), {})


def unpack(message: bytes, lengths: list[int], width: int, codec: Dense) -> Tensor:
    """(B, T, h) float32, zero on padding. Raises WireError."""
    flat = codec.decode(message, _context((sum(lengths), width))).tensors[NAME]
    return nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)


def _context(shape: tuple[int, ...]) -> WireContext:
    return WireContext(0, 0, {NAME: tuple(shape)})


# -- the server's end -------------------------------------------------------------------------------------------------


class ServerBody:
    """Frozen blocks. Between forward and backward it keeps what one batch has left in them."""

    def __init__(self, part: nn.Module, width: int, codec: Dense, compute: Compute) -> None:
        self._part, self._width, self._codec, self._compute = part, width, codec, compute
        self._open: tuple[list[int], Tensor, Tensor] | None = None

    def forward(self, message: bytes) -> bytes:
        lengths, rest = read_rows(message)
        x = unpack(rest, lengths, self._width, self._codec).requires_grad_()
        with torch.enable_grad():
            y = through(self._part, x, self._compute)
        self._open = lengths, x, y
        return pack(y, lengths, self._codec)

    def backward(self, message: bytes) -> bytes:
        if self._open is None:
            raise WireError("split: got a gradient, expected hidden states: no batch is under way.")
        (lengths, x, y), self._open = self._open, None
        (gradient,) = torch.autograd.grad(y, x, unpack(message, lengths, self._width, self._codec))
        return pack(gradient, lengths, self._codec)
