"""Requests of OpenAI's HTTP API, as far as Baton serves them. Anything else is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from ..core.errors import InvalidRequest
from .chat_types import ChatMessage, ToolChoice, Tools, tool_use
from .fields import FirstMistake, Many, Strict, Texts
from .structured import (
    Form,
    ResponseFormat,
    SchemaOrText,
    StructuredOutputs,
    choice_form,
    format_form,
    grammar_form,
    only_one,
    regex_form,
    schema_form,
)
from .tools import ToolUse
from .validation import MAX_BIASED_TOKENS, MAX_LOGPROBS, MAX_MESSAGES, Parameters, shown

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
MAX_PROMPTS = 128
MAX_CHOICES = 1024  # prompts times n
TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")


def _shape(value: object) -> str | None:
    """Which kind of text or list a value is meant to be, judged by its first entry: only that one is checked."""
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<entries>"


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


def _few(value: object) -> object:
    """Before pydantic looks, which would make an error for each of a million entries."""
    if isinstance(value, dict) and len(value) > MAX_BIASED_TOKENS:
        message = "at most {allowed} tokens are allowed, not {count}"
        raise PydanticCustomError("too_long", message, {"allowed": MAX_BIASED_TOKENS, "count": len(value)})
    return value


LogitBias = Annotated[dict[str, float], BeforeValidator(_few)]


class StreamOptions(Strict):
    include_usage: bool | None = None


class Common(Strict):
    """What both generation endpoints know. From top_k on they are extensions, under the names that vLLM gave them."""

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
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    bad_words: Many[str] | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    guided_regex: str | None = None
    guided_choice: Many[str] | None = None
    guided_grammar: str | None = None
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
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs: they are not streamed; leave out stream: true", "prompt_logprobs")

    def form(self) -> Form | None:
        """What the output must match, None for anything. Raises InvalidRequest."""
        forms = [
            None if self.response_format is None else format_form("response_format", self.response_format),
            None if self.structured_outputs is None else self.structured_outputs.form("structured_outputs"),
            None if self.guided_json is None else schema_form("guided_json", self.guided_json),
            None if self.guided_regex is None else regex_form("guided_regex", self.guided_regex),
            None if self.guided_choice is None else choice_form("guided_choice", self.guided_choice),
            None if self.guided_grammar is None else grammar_form("guided_grammar", self.guided_grammar),
        ]
        return only_one([form for form in forms if form is not None])

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
            min_p=self.min_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_logit_bias(self.logit_bias or {}),
            prompt_logprobs=self.prompt_logprobs,
            include_stop=bool(self.include_stop_str_in_output),
            n=1 if self.n is None else self.n,
            tenant=self.user or "",
            tenant_field="user",
            timeout=timeout,
        )


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: Prompt
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: None = None

    def check(self) -> None:
        super().check()
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise InvalidRequest(f"best_of: the best {self.n or 1} of {self.best_of} sequences cannot be streamed", "best_of")

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
        name, each = ("n", self.n or 1) if self.best_of is None else ("best_of", self.best_of)
        if count * each > MAX_CHOICES:
            raise InvalidRequest(f"{name}: {each} times {count} prompts are more than {MAX_CHOICES} choices", name)
        texts = [entry for entry in self.prompt if isinstance(entry, str)]
        return texts or [tuple(entry) for entry in self.prompt if isinstance(entry, list)]

    def parameters(self, prompt: tuple[int, ...], timeout: float | None) -> Parameters:
        parameters = self._common(prompt, self.logprobs, timeout)
        parameters = replace(parameters, default_max_tokens=COMPLETION_MAX_TOKENS, best_of=self.best_of)
        if not self.echo:
            return parameters
        wanted = max((count for count in (self.prompt_logprobs, self.logprobs) if count is not None), default=None)
        parameters = replace(parameters, prompt_logprobs=wanted)
        # Nothing but the prompt is asked for: how evaluations measure the likelihood of texts.
        return replace(parameters, max_tokens=1, prompt_only=True) if self.max_tokens == 0 else parameters


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], FirstMistake(), Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    def tool_use(self) -> ToolUse | None:
        """What it wants of tools. Raises InvalidRequest."""
        use, form = tool_use(self.tools or (), self.tool_choice, self.parallel_tool_calls), self.form()
        if use is not None and form is not None:
            field = form.field.partition(".")[0]
            raise InvalidRequest(f"{field}: it cannot be given together with tools, unless tool_choice is 'none'", field)
        return use

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


def _logit_bias(biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """Token ids come as the names of a JSON object's fields. Raises InvalidRequest."""
    for name in biases:
        if not TOKEN_ID.fullmatch(name):
            raise InvalidRequest(f"logit_bias: {shown(name)} is no token id", "logit_bias")
    return tuple((int(name), bias) for name, bias in biases.items())
