"""The kinds of fields that requests of the HTTP face are made of: strict, and cheap to refuse."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, FailFast, Tag, model_validator
from pydantic_core import PydanticCustomError

from .validation import shortened

UNKNOWN_FIELD = "unknown_field"  # our own type of validation error

_T = TypeVar("_T")


class FirstMistake(FailFast):
    """One mistake is enough: a million of them must not cost a million errors. Hashable, as members of a union must be."""

    __hash__ = object.__hash__


Many = Annotated[list[_T], FirstMistake()]


class Strict(BaseModel):
    """No coercion, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _knows_all(cls, value: object) -> object:
        """Before pydantic looks, which would make an error for each of a million unknown fields."""
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next((name for name in value if name not in known), None)
        if unknown is not None:
            raise PydanticCustomError(UNKNOWN_FIELD, "{name}: this field is not supported", {"name": shortened(str(unknown))})
        return value


def text_or_list(value: object) -> str | None:
    """For a discriminator: the tag of a field that is a text or a list."""
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def text_or_object(value: object) -> str | None:
    """For a discriminator: the tag of a field that is a text or an object."""
    return "<text>" if isinstance(value, str) else "<object>" if isinstance(value, dict) else None


Texts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Many[str], Tag("<list>")],
    Discriminator(text_or_list, custom_error_type="union", custom_error_message="Input should be a string or a list of strings"),
]
