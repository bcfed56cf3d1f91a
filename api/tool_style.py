"""Answers to chat completions with tools: the text of a choice is split into content and calls."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from ..core.request import FinishReason
from .call_text import CallParser, CallStart, Part
from .generation import Piece
from .openai_format import ChatStyle, Json, JsonObject
from .openai_types import ChatRequest
from .tokenizer import TextTokenizer
from .tools import ToolFormat, ToolUse


class ToolStyle(ChatStyle):
    """/v1/chat/completions of a request with tools. One object per answer: it has a parser for each choice."""

    def __init__(self, tokenizer: TextTokenizer, body: ChatRequest, use: ToolUse, written: ToolFormat) -> None:
        super().__init__(tokenizer, body)
        self._use = use
        self._format = written
        self._parsers: dict[int, CallParser] = {}

    def opening(self, index: int) -> JsonObject | None:
        delta: JsonObject = {"role": "assistant", "content": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, piece: Piece) -> JsonObject:
        parts, finish = self._parsed(index, piece)
        content, calls = _content(parts), self._calls(parts)
        delta: JsonObject = {"content": content} if content else {}
        if calls:
            delta["tool_calls"] = [{"index": number, **call} for number, call in calls.items()]
        return {**super().delta(index, piece), "delta": delta, "finish_reason": finish}

    def choice(self, index: int, piece: Piece) -> JsonObject:
        parts, finish = self._parsed(index, piece)
        calls: list[Json] = list(self._calls(parts).values())
        message: JsonObject = {"role": "assistant", "content": _content(parts) or None, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        return {**super().choice(index, piece), "message": message, "finish_reason": finish}

    def _parsed(self, index: int, piece: Piece) -> tuple[Sequence[Part], str | None]:
        """What a piece brings, and why the choice ends if it does."""
        parser = self._parsers.get(index)
        if parser is None:
            parser = self._parsers[index] = self._format.parser(self._use)
        parts = parser.push(piece.text)
        if piece.finish is not None:
            parts += parser.flush()
        return parts, "tool_calls" if parser.num_calls and piece.finish is FinishReason.STOP else piece.finish

    def _calls(self, parts: Sequence[Part]) -> dict[int, JsonObject]:
        """What is new of each call, by its number: id, type and name where it begins, arguments where there are more."""
        calls: dict[int, JsonObject] = {}
        for part in parts:
            if isinstance(part, str):
                continue
            call = calls.setdefault(part.index, {})
            if isinstance(part, CallStart):
                call.update(id=self._new_id(), type="function", function={"name": part.name, "arguments": ""})
            else:
                begun = call.get("function")
                known: JsonObject = begun if isinstance(begun, dict) else {}
                call["function"] = {**known, "arguments": part.text}
        return calls

    def _new_id(self) -> str:
        return secrets.token_hex(5)[:9] if self._format.short_ids else f"call_{secrets.token_hex(12)}"


def _content(parts: Sequence[Part]) -> str:
    return "".join(part for part in parts if isinstance(part, str))
