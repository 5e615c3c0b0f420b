"""ShareGPT: {conversations: [{from, value}, ...]} -> turns; human is the user, gpt the assistant.

Source: the layout of the ShareGPT dumps as used by Chiang et al., "Vicuna: An Open-Source Chatbot Impressing GPT-4
with 90%* ChatGPT Quality", 2023.
Departs: turns after the last answer are dropped, there is nothing in them to learn.
"""

from typing import Any, ClassVar

from kilotune.format import Format, Sample, Turn

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class ShareGPT(Format):
    priority: ClassVar[int] = 40

    @classmethod
    def matches(cls, record: dict[str, Any]) -> bool:
        return "conversations" in record

    def read(self, record: dict[str, Any]) -> Sample:
        conversation = record.get("conversations")
        if not isinstance(conversation, list):
            got = "nothing" if conversation is None else type(conversation).__name__
            raise ValueError(f"field 'conversations': got {got}, expected a list of {{from, value}}.")
        turns = [self._turn(number, message) for number, message in enumerate(conversation, 1)]
        while turns and turns[-1].role != "assistant":
            turns.pop()
        if not turns:
            raise ValueError("field 'conversations': got no turn from 'gpt', expected at least one.")
        return Sample(tuple(turns))

    @staticmethod
    def _turn(number: int, message: Any) -> Turn:
        where = f"field 'conversations', turn {number}"
        if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
            raise ValueError(f"{where}: got {message!r:.60}, expected an object with 'from' and 'value'.")
        role = ROLES.get(message["from"]) if isinstance(message["from"], str) else None
        if role is None:
            raise ValueError(f"{where}: got from {message['from']!r}, expected human, gpt or system.")
        if not isinstance(message["value"], str):
            raise ValueError(f"{where}: got value of type {type(message['value']).__name__}, expected text.")
        return Turn(role, message["value"])


METHOD = ShareGPT
