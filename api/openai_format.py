"""Answers of OpenAI's HTTP API: pieces of a generation become choices, chunks and log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..core.request import FinishReason, TokenLogprob
from .detokenizer import Detokenizer
from .generation import Generation, Piece
from .model_info import ModelInfo
from .tokenizer import TextTokenizer

Json = str | int | float | bool | None | Sequence["Json"] | dict[str, "Json"]
JsonObject = dict[str, Json]


class Style(Protocol):
    """One endpoint's way of writing choices. One object per answer: it counts text offsets per choice."""

    @property
    def id_prefix(self) -> str: ...

    @property
    def object_name(self) -> str: ...

    @property
    def chunk_name(self) -> str: ...

    def opening(self, index: int) -> JsonObject | None:
        """What a stream says of choice `index` before its first piece."""
        ...

    def delta(self, index: int, piece: Piece) -> JsonObject:
        """One piece as a choice of a chunk."""
        ...

    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish: FinishReason) -> JsonObject:
        """A whole choice."""
        ...


class CompletionStyle:
    """/v1/completions."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, tokenizer: TextTokenizer, with_logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._decoded: dict[int, tuple[Detokenizer, int]] = {}  # a decoder of each choice, and how many characters it gave

    def opening(self, index: int) -> JsonObject | None:
        return None

    def delta(self, index: int, piece: Piece) -> JsonObject:
        return self._choice(index, piece.text, piece.logprobs, piece.finish)

    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish: FinishReason) -> JsonObject:
        return self._choice(index, text, logprobs, finish)

    def _choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish: FinishReason | None) -> JsonObject:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, logprobs) if self._with_logprobs else None,
            "finish_reason": finish,
        }

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> JsonObject:
        token_text = self._tokenizer.token_text
        # Offsets count characters of the text as it is returned: special tokens have none, half a character has none yet.
        decoder, offset = self._decoded.get(index) or (self._tokenizer.detokenizer(), 0)
        tokens: list[str] = []
        offsets: list[int] = []
        tops: list[JsonObject] = []
        for entry in logprobs:
            text = token_text(entry.token)
            new = decoder.push(entry.token)
            before = len(new) - len(text) if new.endswith(text) else 0  # broken bytes of the tokens before it
            tokens.append(text)
            offsets.append(offset + before)
            offset += len(new)
            top: JsonObject = {}
            for token, value in (*entry.top, (entry.token, entry.logprob)):
                top.setdefault(token_text(token), value)  # two tokens may read the same: the likelier one stays
            tops.append(top)
        self._decoded[index] = decoder, offset
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class ChatStyle:
    """/v1/chat/completions."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, tokenizer: TextTokenizer, with_logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs

    def opening(self, index: int) -> JsonObject | None:
        delta: JsonObject = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, piece: Piece) -> JsonObject:
        return {
            "index": index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece.logprobs),
            "finish_reason": piece.finish,
        }

    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish: FinishReason) -> JsonObject:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(logprobs),
            "finish_reason": finish,
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> JsonObject | None:
        if not self._with_logprobs:
            return None
        content: list[JsonObject] = []
        for entry in logprobs:
            top = [self._token(token, value) for token, value in entry.top]
            content.append({**self._token(entry.token, entry.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> JsonObject:
        text, raw = self._tokenizer.token_text(token), self._tokenizer.token_bytes(token)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}


def usage(generations: Sequence[Generation], n: int) -> JsonObject:
    """Token counts of all prompts and sequences together."""
    prompt = sum(generation.num_prompt_tokens for generation in generations)
    output = sum(generation.num_output_tokens(index) for generation in generations for index in range(n))
    cached = sum(generation.num_cached_tokens for generation in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def model_list(model: ModelInfo, created: int) -> JsonObject:
    """GET /v1/models."""
    return {"object": "list", "data": [model_entry(model, created)]}


def model_entry(model: ModelInfo, created: int) -> JsonObject:
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "baton",
        "max_model_len": model.max_model_len,
    }
