"""Tool calls in chat completions: which way of writing them a model was taught, and how one is forced.

A family is recognised by its chat template, which holds the very markup that the model writes. The request's tools go into
the prompt through that template; `api.call_text` finds calls in the answer; where a call is demanded, or its arguments must
match their schema, a grammar leaves the model nothing else to write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from ..core.errors import InvalidRequest
from .call_text import CallParser, Writing
from .chat import ChatTemplate
from .structured import JSON_OPTIONS, Form

ARGS = "[ARGS]"  # between the name and the arguments of a call, in Mistral's newer way
NO_ARGUMENTS: Mapping[str, JsonValue] = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_ARGUMENTS: Mapping[str, JsonValue] = {"type": "object"}

MarkId = Callable[[str], int | None]  # the token that a grammar names for a text, if there is one


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    parameters  JSON schema of its arguments; None: it takes none
    strict      the arguments match the schema even where the model is free to call it or not
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, JsonValue] | None = None
    strict: bool = False

    @property
    def schema(self) -> Mapping[str, JsonValue]:
        return NO_ARGUMENTS if self.parameters is None else self.parameters

    def described(self) -> dict[str, object]:
        """As chat templates expect it."""
        function: dict[str, object] = {"name": self.name, "description": self.description or "", "parameters": self.schema}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says of tools: the functions it describes, those of which one must be called (if any), and
    whether an answer may hold several calls."""

    tools: tuple[Tool, ...]
    forced: tuple[Tool, ...] = ()
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How one family writes calls.

    before, after  text around a call's arguments, after the opening mark; NAME stands for the function's name
    between        text between calls
    listed         the calls of an answer stand in one JSON list, behind one mark
    single         an answer holds one call
    short_ids      ids of calls are nine letters and digits, as the template wants to see them again
    """

    writing: Writing
    before: str
    after: str
    between: str = ""
    listed: bool = False
    single: bool = False
    short_ids: bool = False

    @property
    def marks(self) -> frozenset[str]:
        """Special tokens whose text the parser must see."""
        return frozenset((self.writing.opening, self.writing.closing, *((ARGS,) if self.writing.named else ()))) - {""}

    def parser(self, use: ToolUse) -> CallParser:
        """A parser of one answer."""
        names = frozenset(tool.name for tool in use.tools)
        return CallParser(self.writing, names.__contains__, None if use.parallel else 1)

    def form(self, use: ToolUse, mark_id: MarkId) -> Form | None:
        """What the answer must match; None when the model is free."""
        if not use.forced and not any(tool.strict for tool in use.tools):
            return None
        rules = []
        choices = use.forced or use.tools
        for i, tool in enumerate(choices):
            schema = {**JSON_OPTIONS, **(tool.schema if use.forced or tool.strict else ANY_ARGUMENTS)}
            before, after = _lark(self.before.replace("NAME", tool.name), mark_id), _lark(self.after, mark_id)
            rules += [f"call_{i}: {before} arguments_{i} {after}", f"arguments_{i}: %json {json.dumps(schema)}"]
        rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(choices))))
        many = use.parallel and not self.single
        calls = f'"[" call {_repeated(", ", "call") if many else ""} "]"' if self.listed else "call"
        mark = _lark(self.writing.opening, mark_id)
        if use.forced:
            one = calls if self.writing.bare else f"{mark} {calls}"
            start = f"{one} {_repeated(self.between, one)}" if many and not self.listed else one
        elif self.writing.bare:
            start, text = "call | TEXT", r"TEXT: /(\s*[^{\s](.|\n)*)?/"  # what begins like a call must be one
            rules.append(text)
        else:
            head = f"TEXT {mark}" if mark.startswith("<[") else "head"
            start = f"({head} {calls})* TEXT"
            rules += [r"TEXT: /(.|\n)*/", rf"head[lazy]: /(.|\n)*{re.escape(self.writing.opening)}/"]
        return Form("tools", "\n".join([f"start: {start}", *rules]))


_OBJECT = '{"name": "NAME", "arguments": '
FORMATS = {
    "hermes": ToolFormat(Writing("<tool_call>", "</tool_call>"), f"\n{_OBJECT}", "}\n</tool_call>", between="\n"),
    "mistral": ToolFormat(Writing("[TOOL_CALLS]", named=True), _OBJECT, "}", listed=True, short_ids=True),
    "mistral_args": ToolFormat(Writing("[TOOL_CALLS]", named=True), f"NAME{ARGS}", "", short_ids=True),
    "llama": ToolFormat(Writing("<|python_tag|>", bare=True), '{"name": "NAME", "parameters": ', "}", single=True),
}
# What a template contains, and which format that means; the first that applies.
_SIGNS = (
    ("<tool_call>", "hermes"),
    (ARGS, "mistral_args"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama"),
    ('{"name": function name, "parameters": dictionary of argument name and its value}', "llama"),
)


def tool_format(template: ChatTemplate | None, field: str) -> ToolFormat:
    """The format of a model with this template. Raises InvalidRequest where it defines no tools, or unknown ones."""
    source = None if template is None else template.tool_source
    if source is None:
        raise InvalidRequest(f"{field}: this model's chat template does not define tools, so that it cannot call any", field)
    name = next((name for sign, name in _SIGNS if sign in source), None)
    if name is None:
        known = "<tool_call>, [TOOL_CALLS] and <|python_tag|>"
        raise InvalidRequest(f"{field}: this model's template writes tool calls in none of the known ways, {known}", field)
    return FORMATS[name]


def _lark(text: str, mark_id: MarkId) -> str:
    """Text in a grammar: marks that are tokens of their own as those tokens, the rest literally."""
    marks = re.split(r"(<\|?\w+\|?>|</\w+>|\[[A-Z_]+\])", text)
    parts = [(part, mark_id(part) if number % 2 else None) for number, part in enumerate(marks) if part]
    return " ".join(json.dumps(part) if token is None else f"<[{token}]>" for part, token in parts)


def _repeated(between: str, what: str) -> str:
    return f"({json.dumps(between)} {what})*" if between else f"({what})*"
