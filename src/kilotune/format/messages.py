"""Messages: {messages: [{role, content}, ...]} -> the turns as they stand.

Source: the layout of OpenAI's chat files and of Hugging Face's conversational data sets.
Departs: turns after the last answer are dropped, there is nothing in them to learn.
"""

from typing import Any, ClassVar

from kilotune.format import Format, Sample, Turn


class Messages(Format):
    priority: ClassVar[int] = 30

    @classmethod
    def matches(cls, record: dict[str, Any]) -> bool:
        return "messages" in record

    def read(self, record: dict[str, Any]) -> Sample:
        messages = record.get("messages")
        if not isinstance(messages, list):
            got = "nothing" if messages is None else type(messages).__name__
            raise ValueError(f"field 'messages': got {got}, expected a list of {{role, content}}.")
        turns = [self._turn(number, message) for number, message in enumerate(messages, 1)]
        while turns and turns[-1].role != "assistant":
            turns.pop()
        if not turns:
            raise ValueError("field 'messages': got no turn of role 'assistant', expected at least one.")
        return Sample(tuple(turns))

    @staticmethod
    def _turn(number: int, message: Any) -> Turn:
        where = f"field 'messages', turn {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where}: got {message!r:.60}, expected an object with 'role' and 'content'.")
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"{where}: got role {message['role']!r}, expected system, user or assistant.")
        if not isinstance(message["content"], str):
            raise ValueError(f"{where}: got content of type {type(message['content']).__name__}, expected text.")
        return Turn(message["role"], message["content"])


METHOD = Messages
