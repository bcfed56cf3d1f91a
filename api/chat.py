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

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..core.errors import InvalidRequest, ModelError


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


class ChatTemplate:
    """A model's compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ModelError(f"the chat template cannot be compiled: {error}") from error
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, directory: Path, tokenizer_config: Mapping[str, object]) -> ChatTemplate | None:
        """The template of a model directory, or None when it has none."""
        path = directory / "chat_template.jinja"
        source = path.read_text("utf-8") if path.is_file() else _default_template(tokenizer_config.get("chat_template"))
        if source is None:
            return None
        special = {
            key: text
            for key, value in tokenizer_config.items()
            if key.endswith("_token") and (text := _token_text(value)) is not None
        }
        return cls(source, special)

    @staticmethod
    def missing() -> InvalidRequest:
        return InvalidRequest("this model has no chat template: use /v1/completions or give token ids", "messages")

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation, ending where the assistant is to go on. Raises InvalidRequest."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=True, tools=None, documents=None, **self._special_tokens
            )
        except Exception as error:  # foreign code raises whatever it likes
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error


def _default_template(value: object) -> str | None:
    """The format knows one template, or a list of named ones."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and entry.get("name") == "default":
                return _default_template(entry.get("template"))
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
