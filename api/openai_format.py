"""Answers of OpenAI's HTTP API: pieces of a generation become choices, chunks and log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.request import TokenLogprob
from .detokenizer import Detokenizer
from .generation import Generation, Piece
from .model_info import ModelInfo
from .openai_types import ChatRequest, CompletionRequest
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

    def choice(self, index: int, piece: Piece) -> JsonObject:
        """A whole choice, in one piece."""
        ...

    def of_prompt(self, piece: Piece) -> JsonObject:
        """Fields of a whole answer beside its choices, of which `piece` is the first."""
        ...


@dataclass(frozen=True, slots=True)
class PromptText:
    """A prompt of a completion. `text` is None when the client gave token ids."""

    text: str | None
    tokens: tuple[int, ...]


class CompletionStyle:
    """/v1/completions. prompts[i] has the choices from i * n on."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, tokenizer: TextTokenizer, body: CompletionRequest, prompts: Sequence[PromptText]) -> None:
        self._tokenizer = tokenizer
        self._body = body
        self._prompts = prompts
        self._begun: set[int] = set()
        self._decoded: dict[int, tuple[Detokenizer, int]] = {}  # a decoder of each choice, and how many characters it gave

    def opening(self, index: int) -> JsonObject | None:
        return None

    def delta(self, index: int, piece: Piece) -> JsonObject:
        return self._choice(index, piece)

    def choice(self, index: int, piece: Piece) -> JsonObject:
        return self._choice(index, piece)

    def of_prompt(self, piece: Piece) -> JsonObject:
        return {}

    def _choice(self, index: int, piece: Piece) -> JsonObject:
        body, prompt = self._body, self._prompts[index // (self._body.n or 1)]
        echoed = prompt if body.echo and index not in self._begun else None  # the first piece of a choice begins with it
        self._begun.add(index)
        choice: JsonObject = {
            "index": index,
            "text": piece.text if echoed is None else self._text(echoed) + piece.text,
            "logprobs": None if body.logprobs is None else self._logprobs(index, echoed, piece),
            "finish_reason": piece.finish,
        }
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, piece.prompt_logprobs, body.prompt_logprobs)
        return choice

    def _text(self, prompt: PromptText) -> str:
        return self._tokenizer.decode(prompt.tokens) if prompt.text is None else prompt.text

    def _logprobs(self, index: int, echoed: PromptText | None, piece: Piece) -> JsonObject:
        texts = _TokenTexts(self._tokenizer, *(self._decoded.get(index) or (self._tokenizer.detokenizer(), 0)))
        values: list[float | None] = []
        tops: list[JsonObject | None] = []
        entries = piece.logprobs
        if echoed is not None:
            entries = (*piece.prompt_logprobs, *piece.logprobs)
            texts.add(echoed.tokens[0])
            values.append(None)  # nothing foretells the first token
            tops.append(None)
        for entry in entries:
            texts.add(entry.token)
            values.append(entry.logprob)
            top: JsonObject = {}
            for token, value in (*entry.top[: self._body.logprobs], (entry.token, entry.logprob)):
                top.setdefault(self._tokenizer.token_text(token), value)  # two may read the same: the likelier one stays
            tops.append(top)
        self._decoded[index] = texts.decoder, texts.offset
        return {"tokens": texts.tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": texts.offsets}


class _TokenTexts:
    """Texts of tokens and where they begin in the text that is returned.

    Offsets count its characters: special tokens have none, half a character has none yet.
    """

    def __init__(self, tokenizer: TextTokenizer, decoder: Detokenizer, offset: int) -> None:
        self.decoder = decoder
        self.offset = offset
        self.tokens: list[str] = []
        self.offsets: list[int] = []
        self._tokenizer = tokenizer

    def add(self, token: int) -> None:
        text = self._tokenizer.token_text(token)
        new = self.decoder.push(token)
        before = len(new) - len(text) if new.endswith(text) else 0  # broken bytes of the tokens before it
        self.tokens.append(text)
        self.offsets.append(self.offset + before)
        self.offset += len(new)


class ChatStyle:
    """/v1/chat/completions."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, tokenizer: TextTokenizer, body: ChatRequest) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = bool(body.logprobs)
        self._num_of_prompt = body.prompt_logprobs

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

    def choice(self, index: int, piece: Piece) -> JsonObject:
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece.logprobs),
            "finish_reason": piece.finish,
        }

    def of_prompt(self, piece: Piece) -> JsonObject:
        if self._num_of_prompt is None:
            return {}
        return {"prompt_logprobs": prompt_logprobs(self._tokenizer, piece.prompt_logprobs, self._num_of_prompt)}

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


def prompt_logprobs(tokenizer: TextTokenizer, entries: Sequence[TokenLogprob], num_top: int) -> list[Json]:
    """As vLLM writes them: one object per prompt token, null for the first; ranks only where they are known."""
    answer: list[Json] = [None]
    for entry in entries:
        ranked = [(token, value, rank) for rank, (token, value) in enumerate(entry.top[:num_top], 1)]
        tokens: JsonObject = {}
        for token, value, rank in (*ranked, (entry.token, entry.logprob, None)):
            text = tokenizer.token_text(token)
            tokens.setdefault(str(token), {"logprob": value, "rank": rank, "decoded_token": text})
        answer.append(tokens)
    return answer


def usage(generations: Sequence[Generation]) -> JsonObject:
    """Token counts of all prompts and of all sequences that were sampled for them."""
    prompt = sum(generation.num_prompt_tokens for generation in generations)
    output = sum(generation.num_sampled_tokens for generation in generations)
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
