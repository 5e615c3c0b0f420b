"""Templates: a conversation becomes one text, and the spans of it that are the assistant's own words.

`chat` is the tokenizer's chat template (`plain` where it has none), `plain` is the turns line by line, `alpaca` the
headers of Taori et al. (Stanford Alpaca, 2023). A span reaches from the first character the assistant writes to the
end of its end-of-turn mark, which is therefore learnt.
"""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from kilotune.core.errors import RecipeError
from kilotune.engine.composing.recipe import DataSection
from kilotune.format import Sample, Turn

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALPACA_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


@dataclass(frozen=True, slots=True)
class Layout:
    """A text that ends with the last answer; `spans` are (start, end) in characters, one per answer, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]
    reference: str  # the last answer as the data have it; a plain text itself
    plain: bool = False


class Template:
    """A template bound to a tokenizer. `name` is the template in use: `chat` needs a tokenizer that has one."""

    def __init__(self, tokenizer: Any, settings: DataSection) -> None:
        self.tokenizer = tokenizer
        self.name = settings.template
        if self.name == "chat" and not getattr(tokenizer, "chat_template", None):
            self.name = "plain"
        self.eos: str = tokenizer.eos_token or ""
        self.system = self._usable_system(settings.system)
        self.bos = _bos(tokenizer)
        self.mark = self._regular_mark() if self.name == "chat" else None

    def _regular_mark(self) -> str | None:
        """The end-of-turn mark, when an answered conversation is its prompt + the answer + this mark; else None."""
        marks = set()
        for words in ("zebra", "Two words."):
            turns = self._with_system((Turn("user", "Hello"), Turn("assistant", words)))
            full, head = self._render(turns, False), self._render(turns[:-1], True)
            marks.add(full.removeprefix(head + words).rstrip() if full.startswith(head + words) else "")
        return marks.pop() or None if len(marks) == 1 else None

    def _usable_system(self, system: str | None) -> str | None:
        """The system text to insert, or None. An empty text is an empty system turn in a chat template (so the
        template's own default stays away) and no turn at all elsewhere."""
        if self.name != "chat":
            return system or None
        if system is None:
            return None
        try:
            self._render((Turn("system", system), Turn("user", "a")), False)
        except TemplateError:
            if system:
                raise RecipeError(
                    f"data.system: got {system!r:.60}, but the model's chat template takes no system turn. "
                    "Remove it, or use data.template: plain."
                ) from None
            return None
        return system

    def lay_out(self, sample: Sample, record: dict[str, Any] | None = None) -> Layout:
        """Text and spans of a sample; `record` lets `alpaca` keep instruction and input apart.

        Raises ValueError when the chat template refuses the conversation.
        """
        if sample.plain:
            text = sample.turns[0].content
            return Layout(self.bos + text + self.eos, ((0, len(self.bos + text + self.eos)),), text, True)
        turns = self._with_system(sample.turns)
        if self.name == "chat":
            try:
                return self._chat(turns)
            except TemplateError as error:
                raise ValueError(
                    f"the model's chat template refuses this conversation ({error}). "
                    "Correct the order of the roles, or use data.template: plain."
                ) from None
        return self._joined(turns, record or {})

    def prompt(self, turns: tuple[Turn, ...], record: dict[str, Any] | None = None) -> str:
        """The text after which the model is to write the next answer."""
        turns = self._with_system(turns)
        if self.name == "chat":
            return self._render(turns, True)
        layout = self._joined((*turns, Turn("assistant", "")), record or {})
        return layout.text[: layout.spans[-1][0]]

    def _with_system(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if self.system is None or (turns and turns[0].role == "system"):
            return turns
        return (Turn("system", self.system), *turns)

    def _render(self, turns: tuple[Turn, ...], prompt: bool) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return text

    def _chat(self, turns: tuple[Turn, ...]) -> Layout:
        """Spans by rendering the conversation up to each answer with the generation prompt."""
        answer = turns[-1].content
        # A conversation that opens with the assistant answers nothing: those words carry no loss.
        answers = [number for number, turn in enumerate(turns) if turn.role == "assistant" and number > 0]
        if not answers:
            raise ValueError("the conversation opens with its only answer, expected a question before it.")
        if self.mark and len(answers) == 1 and _ordinary(answer):
            head = self._render(turns[:-1], True)
            text = head + answer + self.mark
            return Layout(text, ((len(head), len(text)),), answer)
        full = self._render(turns, False)
        places: list[tuple[int, int]] = []  # where each answer begins, where its words end
        for number in answers:
            places.append(self._place(full, turns, number, places[-1][1] if places else 0))
        mark = full[places[-1][1] :].strip()  # what ends a turn
        spans = [(begin, _end(full, end, mark)) for begin, end in places]
        text = full[: spans[-1][1]]
        if not mark and self.eos:  # the template ends no turn: the model must learn to stop
            text += self.eos
            spans[-1] = (spans[-1][0], len(text))
        return Layout(text, tuple(spans), answer)

    def _place(self, full: str, turns: tuple[Turn, ...], number: int, done: int) -> tuple[int, int]:
        """Where the assistant begins to write an answer and where its words end; `done` ends the answer before."""
        words = turns[number].content.strip()  # some templates strip them
        head = self._render(turns[:number], True)
        shared = _shared(full, head)
        first = full.find(words, max(shared, done))
        if first < 0:
            raise ValueError("the model's chat template alters the answer. Use data.template: plain.")
        # Where history is rendered otherwise than a prompt, the answer begins at its own words.
        return (shared if shared == len(head) >= done else first), first + len(words)

    def _joined(self, turns: tuple[Turn, ...], record: dict[str, Any]) -> Layout:
        """The plain and alpaca layouts, put together from pieces."""
        text, spans = self.bos, []
        alpaca = self.name == "alpaca"
        if alpaca and turns[0].role != "system":
            text += (ALPACA_INPUT if _parts(turns[0], record) else ALPACA_PLAIN) + "\n\n"
        for turn in turns:
            if turn.role == "assistant":
                begin = len(text)
                text += turn.content + self.eos
                spans.append((begin, len(text)))
                text += "\n\n" if alpaca else "\n"
            elif not alpaca or turn.role == "system":
                text += turn.content + ("\n\n" if alpaca else "\n")
            elif parts := _parts(turn, record):
                text += f"### Instruction:\n{parts[0]}\n\n### Input:\n{parts[1]}\n\n### Response:\n"
            else:
                text += f"### Instruction:\n{turn.content}\n\n### Response:\n"
        return Layout(text[: spans[-1][1]], tuple(spans), turns[-1].content)


def _parts(turn: Turn, record: dict[str, Any]) -> tuple[str, str] | None:
    """Instruction and input of a turn that an alpaca record was joined into, else None."""
    instruction, extra = record.get("instruction") or "", record.get("input") or ""
    joined = bool(instruction and extra) and turn.content == f"{instruction}\n\n{extra}"
    return (instruction, extra) if joined else None


def _shared(full: str, head: str) -> int:
    """How many leading characters two texts share."""
    if full.startswith(head):
        return len(head)
    return next((i for i, (a, b) in enumerate(zip(full, head, strict=False)) if a != b), len(full))


def _end(full: str, words_end: int, mark: str) -> int:
    """The end of an answer with its end-of-turn mark, past the space that the answer itself ends with."""
    gap = len(full) - words_end - len(full[words_end:].lstrip())
    return words_end + gap + len(mark) if mark and full.startswith(mark, words_end + gap) else words_end


def _ordinary(answer: str) -> bool:
    """Words that no template treats in a special way: no space around them, no tags such as </think>."""
    return "<" not in answer and answer == answer.strip()


def _bos(tokenizer: Any) -> str:
    """The token that the tokenizer itself puts before a text (chat templates write theirs)."""
    first = tokenizer("")["input_ids"][:1]
    return tokenizer.bos_token if tokenizer.bos_token and first == [tokenizer.bos_token_id] else ""
