"""Messages and tools of OpenAI's chat completions, as far as Baton serves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Discriminator, Field, JsonValue, Tag
from pydantic_core import from_json

from ..core.errors import InvalidRequest
from .chat import Message, ToolCall
from .fields import Many, Strict, text_or_list, text_or_object
from .tools import Tool, ToolUse
from .validation import shown

MAX_TOOLS = 128
MAX_CALLS = 128  # of one message
FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class TextPart(Strict):
    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Many[TextPart], Tag("<list>")],
    Discriminator(
        text_or_list, custom_error_type="union", custom_error_message="Input should be a string or a list of text parts"
    ),
]


class CalledFunction(Strict):
    name: str
    arguments: str


class CalledTool(Strict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Strict):
    """One message. The fields that only other APIs' answers carry may be null, so that answers can be sent back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: Annotated[Many[CalledTool], Field(max_length=MAX_CALLS)] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: None = None
    function_call: None = None
    audio: None = None
    annotations: None = None

    def plain(self, number: int) -> Message:
        """As chat templates are told of it; `number` is its place among the messages. Raises InvalidRequest."""
        own = f"messages.{number}"
        _needs(not self.tool_calls or self.role == "assistant", f"{own}.tool_calls", "only the assistant calls tools")
        if self.role == "tool":
            _needs(self.tool_call_id is not None, f"{own}.tool_call_id", "an answer of a tool names the call that it answers")
        else:
            _needs(self.tool_call_id is None, f"{own}.tool_call_id", "only messages of role 'tool' answer calls")
            _needs(self.name is None, f"{own}.name", "names of participants are not supported, only those of tools")
        _needs(
            self.content is not None or bool(self.tool_calls),
            f"{own}.content",
            "Input should be a string or a list of text parts",  # as pydantic has it for the others
        )
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        calls = tuple(_call(call, f"{own}.tool_calls.{i}.function.arguments") for i, call in enumerate(self.tool_calls or ()))
        return Message(self.role, content, calls, self.tool_call_id, self.name)


class ToolFunction(Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class ToolEntry(Strict):
    type: Literal["function"]
    function: ToolFunction


class ChosenFunction(Strict):
    name: str


class NamedChoice(Strict):
    type: Literal["function"]
    function: ChosenFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[NamedChoice, Tag("<object>")],
    Discriminator(
        text_or_object, custom_error_type="union", custom_error_message="Input should be 'none', 'auto', 'required' or a function"
    ),
]
Tools = Annotated[Many[ToolEntry], Field(max_length=MAX_TOOLS)]


def tool_use(
    entries: Sequence[ToolEntry], choice: Literal["none", "auto", "required"] | NamedChoice | None, parallel: bool | None
) -> ToolUse | None:
    """What a request wants of tools; None when the model is to know of none. Raises InvalidRequest."""
    tools = tuple(
        Tool(entry.function.name, entry.function.description, entry.function.parameters, bool(entry.function.strict))
        for entry in entries
    )
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    _needs(twice is None, "tools", f"two functions are called {twice!r}")
    if choice == "none" or not tools:
        _needs(choice in (None, "none", "auto"), "tool_choice", "it needs tools to choose from")
        return None
    if not isinstance(choice, NamedChoice):
        return ToolUse(tools, tools if choice == "required" else (), parallel is not False)
    forced = tuple(tool for tool in tools if tool.name == choice.function.name)
    _needs(bool(forced), "tool_choice", f"the tools have no function {shown(choice.function.name)}")
    return ToolUse(tools, forced, parallel=False)


def _call(call: CalledTool, field: str) -> ToolCall:
    """Templates write arguments themselves, so they have to be an object."""
    text = call.function.arguments.strip() or "{}"
    try:
        is_object = isinstance(from_json(text, allow_inf_nan=False), dict)
    except ValueError:
        is_object = False
    _needs(is_object, field, f"it must be the JSON text of an object, not {shown(text)}")
    return ToolCall(call.id, call.function.name, text)


def _needs(holds: bool, field: str, why: str) -> None:
    if not holds:
        raise InvalidRequest(f"{field}: {why}", field.partition(".")[0])
