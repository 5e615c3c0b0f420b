"""Plain text: {text} -> a text to model whole, without a template and without a question.

Source: the layout of language-modelling corpora in Hugging Face's `datasets`.
"""

from typing import Any, ClassVar

from kilotune.format import Format, Sample, Turn


class Text(Format):
    priority: ClassVar[int] = 90

    @classmethod
    def matches(cls, record: dict[str, Any]) -> bool:
        return "text" in record

    def read(self, record: dict[str, Any]) -> Sample:
        if "text" not in record:
            raise ValueError(f"field 'text' is missing; found {', '.join(repr(key) for key in record)}.")
        text = record["text"]
        if not isinstance(text, str):
            raise ValueError(f"field 'text': got {type(text).__name__}, expected text.")
        if not text.strip():
            raise ValueError("field 'text': got an empty text, expected words to learn.")
        return Sample((Turn("assistant", text),), plain=True)


METHOD = Text
