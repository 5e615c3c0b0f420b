"""Generation: greedy answers for many prompts at once, and one answer token by token.

Prompts of similar length share a batch, padded on the left; rows that have ended leave it, with their keys and values.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kilotune.core.choosing import chooser

__all__ = ["default_stop_ids", "generate", "stream_tokens"]

Progress = Callable[[int, int], None]

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
COMPACT_BELOW = 0.75  # share of rows still running below which the others are cut from the cache


def default_stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """EOS of tokenizer and model, and the end-of-turn marks that the tokenizer knows as special tokens."""
    stops = {tokenizer.eos_token_id}
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops.update(eos if isinstance(eos, list) else [eos])
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    stops.update(i for i in tokenizer.convert_tokens_to_ids(list(END_OF_TURN)) if i in special)
    unknown = tokenizer.unk_token_id
    return sorted(i for i in stops if i is not None and (i != unknown or i == tokenizer.eos_token_id))


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop_ids: Sequence[int] | None = None,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> list[str]:
    """The likeliest continuation of each prompt, in the order of the prompts, without special tokens.

    A batch holds at most `batch_tokens` tokens, prompts and answers together (or one prompt).
    """
    stops = default_stop_ids(model, tokenizer) if stop_ids is None else list(stop_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    done = 0
    while done < len(order):
        rows = max(1, batch_tokens // (len(prompts[order[done]]) + max_new_tokens))
        members = order[done : done + rows]
        found = _greedy(model, [list(map(int, prompts[i])) for i in members], max_new_tokens, stops)
        for i, tokens in zip(members, found, strict=True):
            answers[i] = tokens
        done += len(members)
        if progress is not None:
            progress(done, len(prompts))
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]


def _greedy(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, stops: list[int]) -> list[list[int]]:
    """New tokens of each prompt, without the stop token."""
    if _takes_virtual_tokens(model):
        return _by_transformers(model, prompts, max_new_tokens, stops)
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch is
    step = _Step(model, prompts)
    for _ in range(max_new_tokens):
        chosen = step.logits.argmax(-1)  # (B,)
        tokens = chosen.tolist()
        running = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if row >= 0 and token not in stops:
                answers[row].append(token)
                running.append(place)
            else:
                rows[place] = -1
        if not running or len(answers[rows[running[0]]]) == max_new_tokens:
            break
        if len(running) <= COMPACT_BELOW * len(rows):
            rows, chosen = [rows[place] for place in running], chosen[running]
            step.keep(running)
        step.take(chosen)
    return answers


class _Step:
    """A batch in the middle of generation. `logits` (B, V) are those of the next token."""

    def __init__(self, model: nn.Module, prompts: list[list[int]]) -> None:
        width = max(len(prompt) for prompt in prompts)
        tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
        self.mask = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            self.mask[row, width - len(prompt) :] = 1
        self.model = model
        self.cache: Any = None
        self._run(tokens, (self.mask.cumsum(-1) - 1).clamp(min=0))

    def _run(self, tokens: Tensor, positions: Tensor) -> None:
        padded = bool((self.mask == 0).any())
        output = self.model(
            input_ids=tokens,
            attention_mask=self.mask if padded else None,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        index = torch.tensor(rows)
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index)
        if (choosing := chooser(self.model)) is not None:
            choosing.keep(self.cache, index)

    def take(self, tokens: Tensor) -> None:
        """Append one token (B,) to every row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self._run(tokens[:, None], self.mask.sum(-1, keepdim=True) - 1)


def _takes_virtual_tokens(model: Any) -> bool:
    """Prompt and prefix tuning: PEFT puts virtual tokens in front and keeps count of them itself."""
    return any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values())


def _by_transformers(model: Any, prompts: list[list[int]], max_new_tokens: int, stops: list[int]) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=stops,
            pad_token_id=stops[0] if stops else 0,
        )
        new = out[0, len(prompt) :].tolist()
        answers.append(new[: next((i for i, token in enumerate(new) if token in stops), len(new))])
    return answers


@torch.no_grad()
def stream_tokens(
    model: nn.Module,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    stop_ids: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """Pieces of the answer's text as they are generated; temperature 0 takes the likeliest token each time.

    Without a `generator` two calls at a temperature above 0 differ.
    """
    stops = set(default_stop_ids(model, tokenizer) if stop_ids is None else stop_ids)
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    tokens: list[int] = []
    shown = ""
    for token in _tokens(model, list(map(int, prompt)), max_new_tokens, temperature, stops, generator):
        tokens.append(token)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("�"):  # half of a character: wait for the other half
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(tokens, skip_special_tokens=True)
    if rest != shown:
        yield rest[len(shown) :]


def _tokens(
    model: nn.Module, prompt: list[int], limit: int, temperature: float, stops: set[int], generator: torch.Generator
) -> Iterator[int]:
    if _takes_virtual_tokens(model):
        yield from _by_transformers(model, [prompt], limit, sorted(stops))[0]
        return
    step = _Step(model, [prompt])
    for count in range(1, limit + 1):
        if temperature > 0:
            chances = torch.softmax(step.logits.float() / temperature, dim=-1)
            chosen = torch.multinomial(chances, 1, generator=generator)[:, 0]
        else:
            chosen = step.logits.argmax(-1)
        token = int(chosen)
        if token in stops:
            return
        yield token
        if count < limit:
            step.take(chosen)
