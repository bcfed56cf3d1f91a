"""Chat templates: a conversation becomes the prompt that the model was trained on.

Templates come with the model and are foreign code: they run in jinja2's immutable sandbox, with the few
names that the Hugging Face format promises.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..core.errors import InvalidRequest, ModelError


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the assistant has called; `arguments` is the JSON text of an object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `name` and `tool_call_id` say whose answer a tool's message is."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


class ChatTemplate:
    """A model's compiled template, and a second one for conversations with tools where the model has that."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], tool_source: str | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        self._tool_source = tool_source or source
        try:
            self._template = environment.from_string(source)
            self._tool_template = environment.from_string(self._tool_source)
            names = meta.find_undeclared_variables(environment.parse(self._tool_source))
        except TemplateError as error:
            raise ModelError(f"the chat template cannot be compiled: {error}") from error
        self._defines_tools = "tools" in names
        self._special_tokens = dict(special_tokens)

    @property
    def tool_source(self) -> str | None:
        """The text of the template that is told of tools; None when the model has none that looks at them."""
        return self._tool_source if self._defines_tools else None

    @classmethod
    def load(cls, directory: Path, tokenizer_config: Mapping[str, object]) -> ChatTemplate | None:
        """The template of a model directory, or None when it has none."""
        path, tool_path = directory / "chat_template.jinja", directory / "additional_chat_templates" / "tool_use.jinja"
        given = tokenizer_config.get("chat_template")
        source = path.read_text("utf-8") if path.is_file() else _named_template(given, "default")
        if source is None:
            return None
        tool_source = tool_path.read_text("utf-8") if tool_path.is_file() else None
        if tool_source is None and not path.is_file() and isinstance(given, list):
            tool_source = _named_template(given, "tool_use")
        special = {
            key: text
            for key, value in tokenizer_config.items()
            if key.endswith("_token") and (text := _token_text(value)) is not None
        }
        return cls(source, special, tool_source)

    @staticmethod
    def missing() -> InvalidRequest:
        return InvalidRequest("this model has no chat template: use /v1/completions or give token ids", "messages")

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]] = ()) -> str:
        """The prompt of a conversation, ending where the assistant is to go on. Raises InvalidRequest.

        tools  as Hugging Face's format has them: {"type": "function", "function": {"name", "description", "parameters"}}
        """
        turns = [_turn(message) for message in messages]
        template = self._tool_template if tools else self._template
        try:
            return template.render(
                messages=turns,
                add_generation_prompt=True,
                tools=list(tools) or None,
                documents=None,
                **self._special_tokens,
            )
        except Exception as error:  # foreign code raises whatever it likes
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error


def _turn(message: Message) -> dict[str, object]:
    """A message as templates expect it: with the keys that it has, and arguments as objects."""
    turn: dict[str, object] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _named_template(value: object, name: str) -> str | None:
    """The format knows one template, or a list of named ones."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and entry.get("name") == name:
                return _named_template(entry.get("template"), name)
    return None


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: object, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """Without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant said, for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
