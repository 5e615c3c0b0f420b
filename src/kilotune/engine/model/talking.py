"""Talking to a model: turns in, text out as it is generated."""

from collections.abc import Iterator

from torch import nn

from kilotune.engine.model.base import load_base
from kilotune.engine.model.generation import stream_tokens
from kilotune.engine.model.tuned import open_tuned
from kilotune.engine.rows.tokenize import encode_prompt, stop_ids
from kilotune.format import Turn


class Talker:
    """A tuned model and, to compare, its base."""

    def __init__(
        self, target: str, base_name: str | None, compare: bool, temperature: float, max_new_tokens: int
    ) -> None:
        self._tuned = open_tuned(target, base_name)
        self._base = load_base(base_name or self._tuned.base.name, writable=False) if compare else None
        self._temperature, self._max_new_tokens = temperature, max_new_tokens

    def tuned(self, turns: list[dict[str, str]]) -> Iterator[str]:
        """The tuned model's answer, piece by piece."""
        return self._answer(self._tuned.model, turns)

    def plain(self, turns: list[dict[str, str]]) -> Iterator[str]:
        """The base model's answer, piece by piece."""
        if self._base is None:
            raise ValueError("made without compare")
        return self._answer(self._base.model, turns)

    def _answer(self, model: nn.Module, turns: list[dict[str, str]]) -> Iterator[str]:
        tokenizer = self._tuned.base.tokenizer
        settings = self._tuned.data
        prompt = encode_prompt([Turn(t["role"], t["content"]) for t in turns], tokenizer, settings)
        return stream_tokens(
            model,
            tokenizer,
            [int(token) for token in prompt],
            max_new_tokens=self._max_new_tokens,
            temperature=self._temperature,
            stop_ids=stop_ids(tokenizer, settings),
        )
