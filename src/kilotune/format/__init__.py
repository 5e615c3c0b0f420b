"""Format: one record of a data file becomes a conversation (turns of role and content) or plain text."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from kilotune.core.method import Method

__all__ = ["Format", "Sample", "Turn"]


@dataclass(frozen=True)
class Turn:
    """One message. Loss falls on turns of role "assistant"."""

    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True)
class Sample:
    """What a record says: turns that end with the assistant's answer, or one user-less text to model whole."""

    turns: tuple[Turn, ...]
    plain: bool = False  # True: turns[0].content is text to learn as it stands, without any template


class Format(Method):
    """Contract. A format is recognised by its fields alone; the first match in order of `priority` is taken."""

    priority: ClassVar[int] = 50  # smaller is asked first

    @classmethod
    @abstractmethod
    def matches(cls, record: dict[str, Any]) -> bool:
        """True when the record's fields (and their types) are this format's."""

    @abstractmethod
    def read(self, record: dict[str, Any]) -> Sample:
        """The sample. Raises ValueError that says which field is missing or wrong (the caller adds file and line)."""
