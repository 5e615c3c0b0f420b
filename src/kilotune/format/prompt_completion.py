"""Prompt and completion: {prompt, completion} -> user: prompt; assistant: completion.

Source: the layout of OpenAI's fine-tuning files and of TRL's prompt-completion data sets.
"""

from typing import Any, ClassVar

from kilotune.format import Format, Sample, Turn


class PromptCompletion(Format):
    priority: ClassVar[int] = 20

    @classmethod
    def matches(cls, record: dict[str, Any]) -> bool:
        return "completion" in record or ("prompt" in record and not any(isinstance(v, list) for v in record.values()))

    def read(self, record: dict[str, Any]) -> Sample:
        for name in ("prompt", "completion"):
            if name not in record:
                found = ", ".join(repr(key) for key in record)
                raise ValueError(f"field {name!r} is missing; found {found}.")
            if not isinstance(record[name], str):
                raise ValueError(f"field {name!r}: got {type(record[name]).__name__}, expected text.")
        return Sample((Turn("user", record["prompt"]), Turn("assistant", record["completion"])))


METHOD = PromptCompletion
