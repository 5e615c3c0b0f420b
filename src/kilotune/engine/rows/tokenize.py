"""Encoding: rows become token ids with labels on the answer; rows that are too long are cut, never to nothing.

Prompt and answer are tokenised apart and joined, so the border of the labels is exact, no token can span it, and the
prompt's tokens in training are those from which an answer is generated later. Tokenizers that put a space before
every text they see (SentencePiece with a dummy prefix) would put one into the middle that way: for them the whole
text is tokenised, compared with the tokens of the prompt alone, and the labels begin where the two part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from kilotune.core.errors import DataError
from kilotune.engine.composing.recipe import DataSection
from kilotune.engine.rows.data import Progress, Row, read_sample
from kilotune.engine.rows.templates import Layout, Template
from kilotune.format import Sample, Turn

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["EncodeReport", "Example", "Segment", "Shown", "encode", "encode_prompt", "show", "stop_ids"]

Borders = list[list[tuple[int, int]]]
IGNORE = -100
CHUNK = 1000


@dataclass(frozen=True, slots=True)
class Example:
    """One row as tokens. The last answer begins at `prompt_length`; a plain text has no prompt (0)."""

    input_ids: np.ndarray  # (T,) int32
    labels: np.ndarray  # (T,) int32, -100 where no loss
    prompt_length: int
    reference: str  # the last answer in full, also when its tokens were cut
    client: str | None
    row: int  # index into the rows that were encoded

    @property
    def prompt_ids(self) -> np.ndarray:
        """The tokens up to the last answer, from which it is to be generated; empty for a plain text."""
        return self.input_ids[: self.prompt_length]

    @property
    def num_labels(self) -> int:
        return int((self.labels[1:] != IGNORE).sum())


@dataclass
class EncodeReport:
    """What encoding did. `template` is the one in use: a tokenizer without a chat template gets `plain`."""

    num_rows: int = 0
    num_truncated: int = 0
    num_prompt_cut: int = 0
    num_answer_cut: int = 0
    tokens: int = 0
    label_tokens: int = 0
    template: str = "chat"


def encode(
    rows: Sequence[Row], tokenizer: Any, settings: DataSection, progress: Progress | None = None
) -> tuple[list[Example], EncodeReport]:
    """One example per row, in order. Raises DataError that names file and line of a row that cannot be learnt."""
    template = Template(tokenizer, settings)
    report = EncodeReport(template=template.name)
    separable = _separable(tokenizer)
    examples: list[Example] = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        layouts = [_lay_out(row, template, settings) for row in chunk]
        ids, borders = (_joined if separable else _compared)(layouts, tokenizer, chunk)
        for offset, (row, layout) in enumerate(zip(chunk, layouts, strict=True)):
            example = _example(ids[offset], borders[offset], layout, row, start + offset, settings, report)
            examples.append(example)
        if progress:
            progress(len(examples), len(rows))
    return examples, report


def _lay_out(row: Row, template: Template, settings: DataSection) -> Layout:
    sample = read_sample(row, settings.format)
    try:
        return template.lay_out(sample, row.record)
    except ValueError as error:
        raise DataError(f"{row.where}: {error}") from None


def _tokenize(texts: list[str], tokenizer: Any, rows: Sequence[Row]) -> list[list[int]]:
    """Token ids of texts that hold their special tokens already."""
    try:
        ids: list[list[int]] = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
    except (UnicodeEncodeError, TypeError):
        for row, text in zip(rows, texts, strict=False):
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise DataError(
                    f"{row.where}: the text holds half of a surrogate pair, expected valid Unicode. Remove it."
                ) from None
        raise
    return ids


def _separable(tokenizer: Any) -> bool:
    """False for tokenizers that put a space before every text: no text has the same tokens after a line break."""
    for text in ("zebra", "7", "{"):
        alone, after = tokenizer([text, "\n" + text], add_special_tokens=False)["input_ids"]
        if after[-len(alone) :] == alone:
            return True
    return False


def _joined(layouts: list[Layout], tokenizer: Any, rows: Sequence[Row]) -> tuple[list[list[int]], Borders]:
    """Ids of pieces that are tokenised apart, and the spans (first, end) in tokens."""
    cuts = [[0, *(place for span in layout.spans for place in span)] for layout in layouts]
    owners = [i for i, places in enumerate(cuts) for _ in places[1:]]
    texts = [layout.text[a:b] for layout, places in zip(layouts, cuts, strict=True) for a, b in pairwise(places)]
    ids: list[list[int]] = [[] for _ in layouts]
    edges: list[list[int]] = [[] for _ in layouts]
    for i, piece in zip(owners, _tokenize(texts, tokenizer, [rows[i] for i in owners]), strict=True):
        ids[i] += piece
        edges[i].append(len(ids[i]))
    return ids, [list(zip(ends[0::2], ends[1::2], strict=True)) for ends in edges]


def _compared(layouts: list[Layout], tokenizer: Any, rows: Sequence[Row]) -> tuple[list[list[int]], Borders]:
    """Ids of whole texts, and the spans (first, end) in tokens where the ids of the text before them part."""
    ids = _tokenize([layout.text for layout in layouts], tokenizer, rows)
    owners = [i for i, layout in enumerate(layouts) for _ in layout.spans]
    borders: Borders = [[] for _ in layouts]
    spans = [span for layout in layouts for span in layout.spans]
    heads = [layouts[i].text[: span[0]] for i, span in zip(owners, spans, strict=True)]
    parts = [layouts[i].text[: span[1]] for i, span in zip(owners, spans, strict=True)]
    known = [rows[i] for i in owners]
    both = zip(_tokenize(heads, tokenizer, known), _tokenize(parts, tokenizer, known), strict=True)
    for i, (head, part) in zip(owners, both, strict=True):
        borders[i].append((_common_length(head, ids[i]), _common_length(part, ids[i])))
    return ids, borders


def _common_length(head: list[int], ids: list[int]) -> int:
    """How many leading tokens agree: len(head) unless a token of `ids` spans the end of the head's text."""
    if ids[: len(head)] == head:
        return len(head)
    return next(i for i, (a, b) in enumerate(zip(head, [*ids, -1], strict=False)) if a != b)


def _example(
    ids: list[int],
    spans: list[tuple[int, int]],
    layout: Layout,
    row: Row,
    index: int,
    settings: DataSection,
    report: EncodeReport,
) -> Example:
    """Labels, cut to length, counted."""
    tokens = np.array(ids, dtype=np.int32)
    labels = np.full(len(ids), IGNORE, dtype=np.int32)
    for first, end in spans if settings.answer_only else [(0, len(ids))]:
        labels[first:end] = tokens[first:end]
    border = spans[-1][0]
    kept, border_kept, seam = _cut(len(ids), border, settings.max_length)
    tokens, labels = tokens[kept], labels[kept]
    labels[:1] = IGNORE  # nothing predicts the first token ...
    if seam:
        labels[seam] = IGNORE  # ... and nothing that still stands there predicts the one after a cut
    example = Example(tokens, labels, border_kept, layout.reference, row.client, index)
    if not example.num_labels:
        raise DataError(f"{row.where}: nothing to learn, the answer has no tokens. Remove the row or fill it in.")
    report.num_rows += 1
    report.num_truncated += len(kept) < len(ids)
    report.num_prompt_cut += border_kept < border
    report.num_answer_cut += len(kept) - border_kept < len(ids) - border
    report.tokens += len(tokens)
    report.label_tokens += example.num_labels
    return example


def _cut(length: int, border: int, max_length: int) -> tuple[np.ndarray, int, int]:
    """Which tokens of a row stay (ascending indices), where its answer then begins, and the place after a cut.

    The answer keeps its beginning and gives up its end only when it would leave less than a quarter of max_length
    to the prompt; the prompt gives up its middle, so both the instruction's start and the answer's header stay.
    """
    if length <= max_length:
        return np.arange(length), border, 0
    answer = min(length - border, max_length - min(border, max_length // 4))
    prompt = max_length - answer
    head = prompt // 2
    tail = prompt - head
    kept = np.concatenate([np.arange(head), np.arange(border - tail, border + answer)])
    return kept, prompt, head if prompt < border else 0


def encode_prompt(turns: Sequence[Turn], tokenizer: Any, settings: DataSection) -> np.ndarray:
    """The tokens (T,) int32 after which the model is to answer these turns; not cut."""
    text = Template(tokenizer, settings).prompt(tuple(turns))
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


def stop_ids(tokenizer: Any, settings: DataSection) -> list[int]:
    """Tokens that end an answer: the tokenizer's EOS and the template's end-of-turn mark if it is a special token."""
    layout = Template(tokenizer, settings).lay_out(Sample((Turn("user", "Hello"), Turn("assistant", "zebra"))))
    mark = layout.text.rpartition("zebra")[2]
    first = tokenizer(mark, add_special_tokens=False)["input_ids"][:1] if mark else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    stops = {token for token in first if token in special}
    return sorted(stops if tokenizer.eos_token_id is None else stops | {tokenizer.eos_token_id})


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text whose tokens all carry loss, or all do not."""

    text: str
    loss: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """A row as the model sees it: `marked` for plain terminals, `styled` for rich ones, `as_dict` for JSON."""

    where: str
    client: str | None
    split: str
    segments: tuple[Segment, ...]

    def marked(self) -> str:
        """The text with «» around what carries loss."""
        return "".join(f"«{s.text}»" if s.loss else s.text for s in self.segments)

    def styled(self) -> "Text":
        """The text with colour on what carries loss; never read as markup."""
        from rich.text import Text

        return Text.assemble(*((s.text, "bold green" if s.loss else "dim") for s in self.segments))

    def as_dict(self) -> dict[str, Any]:
        segments = [{"text": s.text, "loss": s.loss} for s in self.segments]
        return {"where": self.where, "client": self.client, "split": self.split, "segments": segments}


def show(rows: Sequence[Row], tokenizer: Any, settings: DataSection, limit: int = 5) -> list[Shown]:
    """The first rows with the tokens that carry loss marked, exactly as training would use them."""
    examples, _ = encode(rows[:limit], tokenizer, settings)
    return [
        Shown(row.where, row.client, row.split, _segments(example, tokenizer))
        for row, example in zip(rows[:limit], examples, strict=True)
    ]


def _segments(example: Example, tokenizer: Any) -> tuple[Segment, ...]:
    loss = example.labels != IGNORE
    edges = [0, *(np.flatnonzero(np.diff(loss)) + 1).tolist(), len(loss)]
    return tuple(
        Segment(tokenizer.decode(example.input_ids[a:b].tolist(), clean_up_tokenization_spaces=False), bool(loss[a]))
        for a, b in pairwise(edges)
    )
