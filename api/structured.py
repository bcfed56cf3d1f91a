"""Structured output as clients ask for it: a JSON schema, a regular expression, a choice or a grammar.

Each becomes a `Form`, which holds the text of one llguidance grammar: the only thing that the router's core and the workers
know of it. A form is checked here, with the compiler that workers use, before any other work is done.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from llguidance import LLMatcher, LLTokenizer, grammar_from
from pydantic import Discriminator, Field, JsonValue, Tag

from ..core.errors import InvalidRequest
from .fields import Many, Strict, text_or_object

MAX_GRAMMAR_LENGTH = 1 << 18  # characters
MAX_CHOICES = 4096
MAX_REASON = 240  # characters of the library's words in a message
MAX_REMEMBERED = 256  # grammars that were found good
# White space in JSON where a parser skips it: enough to indent, and never endless, as small models would have it.
WHITESPACE = r"[ \t]{1,8}|\r?\n[ \t]{0,64}"
JSON_OPTIONS: dict[str, JsonValue] = {"x-guidance": {"whitespace_pattern": WHITESPACE}}  # as a schema carries them itself


@dataclass(frozen=True, slots=True)
class Form:
    """What an output must match. `field` is what asked for it, as the client spells it."""

    field: str
    grammar: str


# ---- fields of the HTTP face ------------------------------------------------------------------------


class PlainText(Strict):
    type: Literal["text"]


class AnyJsonObject(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    """OpenAI's wrapping of a schema. `strict` may say anything: the schema always holds."""

    name: str
    description: str | None = None
    schema_: dict[str, JsonValue] = Field(alias="schema")
    strict: bool | None = None


class JsonOfSchema(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


def _format_kind(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if isinstance(kind, str) else None


ResponseFormat = Annotated[
    Annotated[PlainText, Tag("<text>")]
    | Annotated[AnyJsonObject, Tag("<json_object>")]
    | Annotated[JsonOfSchema, Tag("<json_schema>")],
    Discriminator(
        _format_kind,
        custom_error_type="union",
        custom_error_message="Input should be an object whose type is 'text', 'json_object' or 'json_schema'",
    ),
]
SchemaOrText = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[dict[str, JsonValue], Tag("<object>")],
    Discriminator(
        text_or_object, custom_error_type="union", custom_error_message="Input should be a JSON schema, as an object or as text"
    ),
]


class StructuredOutputs(Strict):
    """The field by which vLLM's clients ask. Exactly one entry must be given."""

    json_: SchemaOrText | None = Field(None, alias="json")
    regex: str | None = None
    choice: Many[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def form(self, field: str) -> Form | None:
        """Raises InvalidRequest."""
        forms: list[Form] = []
        if self.json_ is not None:
            forms.append(schema_form(f"{field}.json", self.json_))
        if self.regex is not None:
            forms.append(regex_form(f"{field}.regex", self.regex))
        if self.choice is not None:
            forms.append(choice_form(f"{field}.choice", self.choice))
        if self.grammar is not None:
            forms.append(grammar_form(f"{field}.grammar", self.grammar))
        if self.json_object:
            forms.append(any_object_form(f"{field}.json_object"))
        if not forms:
            raise _refused(field, "give one of json, regex, choice, grammar and json_object")
        return only_one(forms)


def format_form(field: str, wanted: PlainText | AnyJsonObject | JsonOfSchema) -> Form | None:
    """OpenAI's `response_format`. None for plain text."""
    match wanted:
        case AnyJsonObject():
            return any_object_form(field)
        case JsonOfSchema(json_schema=named):
            return schema_form(f"{field}.json_schema.schema", named.schema_)
        case PlainText():
            return None


# ---- forms ------------------------------------------------------------------------------------------


def schema_form(field: str, schema: str | Mapping[str, JsonValue]) -> Form:
    """JSON that validates against a schema, given as an object or as text."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        return Form(field, LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE}))
    except ValueError as error:
        raise _refused(field, f"it is no JSON schema: {reason(str(error))}") from error


def any_object_form(field: str) -> Form:
    return schema_form(field, {"type": "object"})


def regex_form(field: str, regex: str) -> Form:
    """Text that a regular expression matches as a whole; the syntax is that of Rust's regex crate."""
    return Form(field, LLMatcher.grammar_from_regex(regex))


def choice_form(field: str, choice: Sequence[str]) -> Form:
    """One of a few texts."""
    if not 1 <= len(choice) <= MAX_CHOICES or not all(choice):
        raise _refused(field, f"give 1 to {MAX_CHOICES} texts of at least one character")
    return Form(field, LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, choice))))


def grammar_form(field: str, grammar: str) -> Form:
    """A context-free grammar, in Lark's syntax or in GBNF."""
    try:
        return Form(field, grammar_from("grammar", grammar))
    except ValueError as error:
        raise _refused(field, reason(str(error))) from error


def only_one(forms: Sequence[Form]) -> Form | None:
    """Two wishes cannot both be met. Raises InvalidRequest."""
    if len(forms) > 1:
        raise _refused(forms[1].field, f"it cannot be given together with {forms[0].field}")
    return forms[0] if forms else None


def reason(error: str) -> str:
    """What the library says of an error, without the state of its parser."""
    lines = [line.strip() for line in error.splitlines()]
    details = [line for line in lines[1:] if line.startswith("error:")]
    return "; ".join(lines[:1] + details)[:MAX_REASON]


class GrammarChecker:
    """Tries forms with the compiler that workers use. Not for several event loops."""

    def __init__(self, source: Path | None) -> None:
        """`source` is the model's tokenizer.json, read when the first form comes; None where it has none."""
        self._source = source
        self._tokenizer: LLTokenizer | None = None
        self._good: OrderedDict[str, None] = OrderedDict()
        self._busy = asyncio.Lock()

    async def check(self, form: Form) -> None:
        """Raises InvalidRequest naming the field. Complex grammars take a second, on a thread, one after the other."""
        if len(form.grammar) > MAX_GRAMMAR_LENGTH:
            length = len(form.grammar)
            raise _refused(form.field, f"its grammar has {length} characters; at most {MAX_GRAMMAR_LENGTH} are allowed")
        if form.grammar not in self._good:
            async with self._busy:
                error = await asyncio.to_thread(self._error, form.grammar)
            if error:
                raise _refused(form.field, error)
            self._good[form.grammar] = None
        self._good.move_to_end(form.grammar)
        if len(self._good) > MAX_REMEMBERED:
            self._good.popitem(last=False)

    def _error(self, grammar: str) -> str:
        """Why no output can match the grammar; empty when one can."""
        try:
            if self._tokenizer is None:
                if self._source is None:
                    return "structured output needs a tokenizer.json, which this model's folder does not have"
                self._tokenizer = LLTokenizer(str(self._source))
        except ValueError as error:
            return f"structured output cannot be served with this model's tokenizer: {reason(str(error))}"
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if not matcher.is_error() and not matcher.is_stopped():
            mask = int.from_bytes(matcher.compute_bitmask(), "little")
            matcher.consume_token((mask & -mask).bit_length() - 1)  # some are found too complex only now
        return reason(matcher.get_error()) if matcher.is_error() else ""


def _refused(field: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {why}", field.partition(".")[0])
