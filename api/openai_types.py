"""Requests of OpenAI's HTTP API, as far as Baton serves them. Anything else is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, FailFast, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from ..core.errors import InvalidRequest
from .chat import Message
from .validation import MAX_LOGPROBS, MAX_MESSAGES, Parameters, shortened

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
MAX_PROMPTS = 128
MAX_CHOICES = 1024  # prompts times n
UNKNOWN_FIELD = "unknown_field"  # our own type of validation error

_T = TypeVar("_T")


class _FirstMistake(FailFast):
    """One mistake is enough: a million of them must not cost a million errors. Hashable, as members of a union must be."""

    __hash__ = object.__hash__


Many = Annotated[list[_T], _FirstMistake()]
Zero = Annotated[float, Field(ge=0, le=0)]  # penalties: accepted where they change nothing


class Strict(BaseModel):
    """No coercion, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _knows_all(cls, value: object) -> object:
        """Before pydantic looks, which would make an error for each of a million unknown fields."""
        unknown = next((name for name in value if name not in cls.model_fields), None) if isinstance(value, dict) else None
        if unknown is not None:
            raise PydanticCustomError(UNKNOWN_FIELD, "{name}: this field is not supported", {"name": shortened(str(unknown))})
        return value


def _shape(value: object) -> str | None:
    """Which kind of text or list a value is meant to be, judged by its first entry: only that one is checked."""
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<entries>"


def _text_or_list(value: object) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


Texts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Many[str], Tag("<list>")],
    Discriminator(_text_or_list, custom_error_type="union", custom_error_message="Input should be a string or a list of strings"),
]
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[Many[str], Tag("<texts>")]
    | Annotated[Many[int], Tag("<entries>")]
    | Annotated[Many[Many[int]], Tag("<lists>")],
    Discriminator(
        _shape,
        custom_error_type="union",
        custom_error_message="Input should be a string, a list of strings, token ids or a list of lists of token ids",
    ),
]


class StreamOptions(Strict):
    include_usage: bool | None = None


class Common(Strict):
    """What both generation endpoints know. top_k, min_tokens, ignore_eos and stop_token_ids are extensions."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: Texts | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    top_k: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Many[int] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def check(self) -> None:
        """Rules between fields. Raises InvalidRequest."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options: it is allowed with stream: true only", "stream_options")

    def _common(self, prompt: tuple[int, ...], logprobs: int | None, timeout: float | None) -> Parameters:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Parameters(
            prompt=prompt,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,  # -1 keeps all, as other servers have it
            seed=self.seed,
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            n=1 if self.n is None else self.n,
            tenant=self.user or "",
            tenant_field="user",
            timeout=timeout,
        )


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: Prompt
    logprobs: int | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None
    logit_bias: None = None

    def prompts(self) -> list[str] | list[tuple[int, ...]]:
        """Texts or token ids, one entry per prompt. Raises InvalidRequest."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = tuple(entry for entry in self.prompt if isinstance(entry, int))
        if tokens:
            return [tokens]
        count = len(self.prompt)
        if not 1 <= count <= MAX_PROMPTS:
            raise InvalidRequest(f"prompt: give 1 to {MAX_PROMPTS} prompts, not {count}", "prompt")
        if count * (self.n or 1) > MAX_CHOICES:
            raise InvalidRequest(f"n: {self.n} times {count} prompts are more than {MAX_CHOICES} choices", "n")
        texts = [entry for entry in self.prompt if isinstance(entry, str)]
        return texts or [tuple(entry) for entry in self.prompt if isinstance(entry, list)]

    def parameters(self, prompt: tuple[int, ...], timeout: float | None) -> Parameters:
        parameters = self._common(prompt, self.logprobs, timeout)
        return replace(parameters, default_max_tokens=COMPLETION_MAX_TOKENS)


class TextPart(Strict):
    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Many[TextPart], Tag("<list>")],
    Discriminator(
        _text_or_list, custom_error_type="union", custom_error_message="Input should be a string or a list of text parts"
    ),
]


class ChatMessage(Strict):
    """One message. The fields that only other APIs' answers carry may be null, so that answers can be sent back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: None = None

    def plain(self) -> Message:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(self.role, content)


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], _FirstMistake(), Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    logit_bias: None = None
    tools: None = None
    tool_choice: Literal["none"] | None = None
    response_format: None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs: it is allowed with logprobs: true only", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequest("max_tokens: give either this or max_completion_tokens", "max_tokens")

    def parameters(self, prompt: tuple[int, ...], timeout: float | None) -> Parameters:
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        parameters = replace(self._common(prompt, logprobs, timeout), prompt_field="messages")
        if self.max_completion_tokens is None:
            return parameters
        return replace(parameters, max_tokens=self.max_completion_tokens, max_tokens_field="max_completion_tokens")
