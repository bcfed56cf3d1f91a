"""Incremental decoding: tokens in, text out, never half a character and never part of a stop string.

The concatenation of everything emitted equals the decoding of all tokens at once (property-tested), cut before
the first stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
MAX_WINDOW = 64  # tokens without a complete character before the text is taken as it is


class Detokenizer(Protocol):
    """Decodes one sequence."""

    def push(self, token: int) -> str:
        """The text that is certain now."""
        ...

    def flush(self) -> str:
        """The rest, at the end of the sequence: an incomplete character becomes U+FFFD."""
        ...


class ByteDetokenizer:
    """For byte-level BPE, where tokens are byte strings: exact, and constant work per token."""

    def __init__(self, table: Mapping[int, bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._table.get(token, b""))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any tokenizer: decodes the last few tokens again with their predecessors, which decide about spaces.

    `_context` tokens have been emitted and give the window its left context; text that ends in U+FFFD may be
    half a character and waits.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._context = 0
        self._emitted = ""  # text of the window that is out already

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) < MAX_WINDOW:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        return self._emit(self._decode(self._window)) if len(self._window) > self._context else ""

    def _emit(self, text: str) -> str:
        new = text[len(self._emitted) :]
        if not new:  # special tokens: no context for what follows
            return ""
        del self._window[: self._context]
        self._context = len(self._window)
        self._emitted = self._decode(self._window)
        return new


class KeepingDetokenizer:
    """For text in which some special tokens mean something: they come out as they are, the rest is decoded between them."""

    def __init__(self, plain: Callable[[], Detokenizer], kept: Mapping[int, str]) -> None:
        self._plain = plain
        self._kept = kept
        self._between = plain()

    def push(self, token: int) -> str:
        text = self._kept.get(token)
        if text is None:
            return self._between.push(token)
        before, self._between = self._between.flush(), self._plain()
        return before + text

    def flush(self) -> str:
        return self._between.flush()


class StopStrings:
    """Cuts text before (or, with `include`, after) the stop string that is complete first, the longest of several.

    So the result does not depend on how the text comes in pieces. Holds back what could be the beginning of one.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may go out, whether a stop string has been met: then nothing may follow)."""
        if not self._stops:
            return text, False
        self._held += text
        met = min(((at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)
        if met is not None:
            end, start = met
            out, self._held = self._held[: end if self._include else start], ""
            return out, True
        keep = self._possible_start()
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out, False

    def flush(self) -> str:
        """The sequence ended: what was held back is ordinary text."""
        out, self._held = self._held, ""
        return out

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        for length in range(min(len(self._held), max(map(len, self._stops)) - 1), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
