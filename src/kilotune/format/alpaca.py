"""Alpaca: {instruction, input, output} -> user: instruction, blank line, input; assistant: output.

Source: Taori et al., "Stanford Alpaca: An Instruction-following LLaMA model", 2023.
Departs: the answer may be called `response` (as in Dolly); a missing `input` is an empty one.
"""

from typing import Any, ClassVar

from kilotune.format import Format, Sample, Turn


class Alpaca(Format):
    priority: ClassVar[int] = 10

    @classmethod
    def matches(cls, record: dict[str, Any]) -> bool:
        answered = "output" in record or "response" in record
        # An instruction beside a list is a system text beside turns: left to the chat formats.
        return "instruction" in record and (answered or not any(isinstance(v, list) for v in record.values()))

    def read(self, record: dict[str, Any]) -> Sample:
        answer = "response" if "output" not in record and "response" in record else "output"
        for name in ("instruction", answer):
            if name not in record:
                found = ", ".join(repr(key) for key in record)
                raise ValueError(f"field {name!r} is missing; found {found}.")
            if not isinstance(record[name], str):
                raise ValueError(f"field {name!r}: got {type(record[name]).__name__}, expected text.")
        extra = record.get("input") or ""
        if not isinstance(extra, str):
            raise ValueError(f"field 'input': got {type(extra).__name__}, expected text.")
        question = "\n\n".join(part for part in (record["instruction"], extra) if part)
        return Sample((Turn("user", question), Turn("assistant", record[answer])))


METHOD = Alpaca
