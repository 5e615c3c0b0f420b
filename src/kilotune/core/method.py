"""Method: the frozen pydantic base of every part. Fields are hyperparameters, functions are maths.

A method holds no tensors; what it must remember lives in a `state` dict that the engine owns, passes in and saves.
"""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Method(BaseModel):
    """Base of all parts a recipe can name.

    `needs` and `gives` hold capability words; `compose` refuses a recipe in which some part needs
    what no part gives. `example` holds the values with which the contract tests build the method
    where its defaults do not fit a tiny model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    example: ClassVar[dict[str, Any]] = {}

    @classmethod
    def method_name(cls) -> str:
        """The word that recipes use for this method: its file's stem."""
        return cls.__module__.rsplit(".", 1)[-1]
