"""Nested parts: a field of a method that is itself a method, so that a variant wraps another instead of copying it.

    codec: Annotated[Codec, Nested("codec")] = Field(description="what carries the numbers")

In a recipe it is written as every part is, `{name: dense, dtype: fp16}` or the bare word `dense`, and it is shown so.
"""

from typing import Any

from pydantic import GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from kilotune.core.errors import RecipeError
from kilotune.core.method import Method
from kilotune.core.registry import find


class Nested:
    """Marks a field as a method of this kind."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        shown = core_schema.plain_serializer_function_ser_schema(_shown)
        return core_schema.no_info_plain_validator_function(self._built, serialization=shown)

    def _built(self, value: Any) -> Method:
        """The method behind a mapping, a bare name, or itself."""
        if isinstance(value, Method):
            return value
        spec = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else {}
        name = spec.pop("name", None)
        if not isinstance(name, str):
            raise _wrong(f"the name of a {self._kind} or a mapping with one")
        try:
            found: Method = find(self._kind, name).model_validate(spec)
        except RecipeError as error:
            raise _wrong(error.problems[0].partition("expected ")[2].rstrip(".")) from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join([name, *map(str, first["loc"])])
            raise _wrong(f"a {self._kind} whose {where} is right ({first['msg'].lower()})") from None
        return found


def _wrong(wanted: str) -> PydanticCustomError:
    return PydanticCustomError("nested", "{wanted}", {"wanted": wanted})


def _shown(part: Method) -> dict[str, Any]:
    return {"name": part.method_name(), **part.model_dump(mode="json")}
