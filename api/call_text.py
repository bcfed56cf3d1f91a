"""Tool calls in a model's text, as it comes: markup out, calls and plain text apart. Pure.

Three ways of writing are known, and one state machine reads them all (`Writing` says what differs):

    hermes   text <tool_call>{"name": ..., "arguments": {...}}</tool_call> <tool_call>...</tool_call>    (Qwen, Hermes)
    llama    {"name": ..., "parameters": {...}}, alone or after <|python_tag|>, several between semicolons
    mistral  text [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]name[ARGS]{...}

The arguments go out piece by piece, character for character as the model writes them. What turns out not to be a call is
text after all; the markup itself never is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

MAX_NAME_LENGTH = 256  # characters of a function's name that are waited for


@dataclass(frozen=True, slots=True)
class CallStart:
    """Call number `index` begins."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of call number `index`."""

    index: int
    text: str


Part = str | CallStart | CallArguments


@dataclass(frozen=True, slots=True)
class Writing:
    """How a family writes calls.

    opening  text that says: calls follow
    closing  text after each call or list of calls, "" where there is none
    bare     an answer that begins with the object of a known function is a call, without `opening`
    named    the name may stand before its arguments, outside of the object
    """

    opening: str
    closing: str = ""
    bare: bool = False
    named: bool = False


class CallParser:
    """Reads one answer. `known` says whether there is a function of that name; `limit` drops all calls beyond it."""

    def __init__(self, writing: Writing, known: Callable[[str], bool], limit: int | None = None) -> None:
        self.num_calls = 0
        self._writing = writing
        self._known = known
        self._limit = limit
        self._read = self._start if writing.bare else self._text
        self._rest = ""  # not decided yet
        self._blank = ""  # white space that is dropped if a call follows
        self._guess = False  # the object may be an answer in JSON
        self._object = _CallObject()
        self._parts: list[Part] = []

    def push(self, text: str) -> list[Part]:
        """What is certain now."""
        self._rest += text
        while self._read():
            pass
        parts, self._parts = self._parts, []
        return _joined(parts)

    def flush(self) -> list[Part]:
        """The answer is over: what was held back is text, unless it belongs to a call."""
        if self._read == self._call:
            self._end_object()
        elif self._read != self._between or self._rest.strip() not in ("", *_beginnings(self._writing.closing)):
            self._say(self._rest)
        if not self.num_calls and self._blank:
            self._parts.append(self._blank)
        self._rest = self._blank = ""
        parts, self._parts = self._parts, []
        return _joined(parts)

    # ---- states: each returns whether there is more to read --------------------------------------

    def _start(self) -> bool:
        """Nothing but white space so far: a call may stand here without markup."""
        stripped = self._rest.lstrip()
        if not stripped:
            return False
        if stripped[0] == "{":
            self._blank, self._rest, self._guess = self._rest[: -len(stripped)], stripped, True
            self._begin_object(_CallObject())
        else:
            self._read = self._text
        return True

    def _text(self) -> bool:
        """Plain text, until `opening`. A `closing` that closes nothing is dropped."""
        marks = [mark for mark in (self._writing.opening, self._writing.closing) if mark]
        at, mark = min(((at, mark) for mark in marks if (at := self._rest.find(mark)) >= 0), default=(-1, ""))
        if mark:
            self._say(self._rest[:at])
            self._rest = self._rest[at + len(mark) :]
            self._read = self._between if mark == self._writing.opening else self._text
            return True
        keep = max(_overlap(self._rest, mark) for mark in marks)
        self._say(self._rest[: len(self._rest) - keep])
        self._rest = self._rest[len(self._rest) - keep :]
        return False

    def _between(self) -> bool:
        """After `opening`, or after a call: white space, separators, the next call, or the end of calls."""
        writing = self._writing
        rest = self._rest = self._rest.lstrip(" \t\r\n,;]" if writing.named else " \t\r\n,;")
        if not rest:
            return False
        if rest[0] == "{":
            self._begin_object(_CallObject())
            return True
        for mark in (writing.closing, writing.opening):
            if mark and rest.startswith(mark):
                self._rest = rest[len(mark) :]
                self._read = self._between if mark == writing.opening else self._text
                return True
            if mark.startswith(rest):
                return False
        if writing.named and rest[0] == "[":
            self._rest = rest[1:]
            return True
        if writing.named and len(rest) <= MAX_NAME_LENGTH:
            name, brace, arguments = rest.partition("{")
            if not brace:
                return False
            self._rest = brace + arguments
            self._begin_object(_CallObject(name.partition("[")[0].strip()))
            return True
        self._read = self._text
        return True

    def _call(self) -> bool:
        """Inside the object of a call."""
        call = self._object
        used = call.push(self._rest)
        self._rest = self._rest[used:]
        if call.name is not None and not call.announced and not (self._guess and not self._known(call.name)):
            call.announced = True
            self._blank = ""
            self._emit(CallStart(self.num_calls, call.name))
            self.num_calls += 1
        if call.announced and (new := call.take()):
            self._emit(CallArguments(self.num_calls - 1, new))
        if not call.over and not (self._guess and call.name is not None and not call.announced):
            return False
        self._end_object()
        return True

    # ---- inside ----------------------------------------------------------------------------------

    def _begin_object(self, call: _CallObject) -> None:
        self._object, self._read = call, self._call

    def _end_object(self) -> None:
        call = self._object
        self._read = self._between
        if not call.announced:
            self._say(call.raw)
            self._read = self._text
        elif not call.has_arguments and call.complete:
            self._emit(CallArguments(self.num_calls - 1, "{}"))
        self._guess = False

    def _emit(self, part: CallStart | CallArguments) -> None:
        if self._limit is None or part.index < self._limit:
            self._parts.append(part)

    def _say(self, text: str) -> None:
        """Text for the reader; white space waits for what follows it."""
        text = self._blank + text
        solid = text.rstrip()
        self._blank = text[len(solid) :]
        if solid:
            self._parts.append(solid)


class _Place(Enum):
    """Where in the object the next character stands."""

    OPEN = 0  # before the brace
    KEY = 1  # before a key, or the closing brace
    IN_KEY = 2
    COLON = 3
    VALUE = 4  # before a value
    IN_VALUE = 5
    OVER = 6


class _CallObject:
    """{"name": ..., "arguments" or "parameters": ...}, one character after the other; with `name`, the arguments alone."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.announced = False
        self.has_arguments = False
        self.complete = False  # read to its end, well-formed
        self._text: list[str] = []
        self._place = _Place.OPEN if name is None else _Place.VALUE
        self._alone = name is not None
        self._key = "" if name is None else "arguments"
        self._value: list[str] = []  # of the key or the value
        self._depth = 0
        self._quoted = self._escaped = False
        self._new: list[str] = []  # of the arguments, not taken yet

    @property
    def over(self) -> bool:
        return self._place is _Place.OVER

    @property
    def raw(self) -> str:
        """Everything that was read."""
        return "".join(self._text)

    def push(self, text: str) -> int:
        """Read until the object ends; returns the number of characters used."""
        for count, character in enumerate(text):
            if self.over:
                return count
            self._text.append(character)
            self._step(character)
        return len(text)

    def take(self) -> str:
        """What is new of the arguments."""
        new = "".join(self._new)
        self._new.clear()
        return new

    def _step(self, character: str) -> None:
        match self._place:
            case _Place.IN_KEY:
                self._in_string(character)
                if not self._quoted:
                    self._key = _text_of("".join(self._value)) or ""
                    self._place = _Place.COLON
            case _Place.IN_VALUE:
                self._in_value(character)
            case _ if character in " \t\r\n":
                return
            case _Place.OPEN if character == "{":
                self._place = _Place.KEY
            case _Place.KEY if character == '"':
                self._value, self._quoted, self._place = [character], True, _Place.IN_KEY
            case _Place.KEY if character == ",":
                return
            case _Place.KEY if character == "}":
                self._finish()
            case _Place.COLON if character == ":":
                self._place = _Place.VALUE
            case _Place.VALUE:
                self._value, self._depth, self._place = [], 0, _Place.IN_VALUE
                self._in_value(character)
            case _:
                self._place = _Place.OVER  # this is no JSON object

    def _in_string(self, character: str) -> None:
        self._value.append(character)
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._quoted = not self._quoted

    def _in_value(self, character: str) -> None:
        if self._quoted or character == '"':
            self._in_string(character)
            self._stream(character)
            return
        closing = character in "}]"
        if self._depth == 0 and (closing or character == ","):
            self._end_value()
            self._place = _Place.KEY
            if closing:
                self._finish()
            return
        self._depth += (character in "{[") - closing
        self._value.append(character)
        if self._depth or closing:
            self._stream(character)
        if self._alone and self._depth == 0:
            self._finish()

    def _stream(self, character: str) -> None:
        """Arguments that are an object or a list go out as they come."""
        if self._key in ("arguments", "parameters") and self._value[0] in "{[":
            self.has_arguments = True
            self._new.append(character)

    def _end_value(self) -> None:
        raw = "".join(self._value).strip()
        if self._key == "name":
            self.name = _text_of(raw) or self.name
        elif self._key in ("arguments", "parameters") and raw[:1] not in ("{", "[", "n"):  # not null
            self.has_arguments = True
            self._new.append(_text_of(raw) or raw)  # an object as JSON in a string, as some models write it

    def _finish(self) -> None:
        self._place, self.complete = _Place.OVER, True


def _text_of(raw: str) -> str | None:
    """The text that a JSON string stands for; None when it is none."""
    try:
        value = json.loads(raw)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((length for length in range(longest, 0, -1) if mark.startswith(text[-length:])), 0)


def _beginnings(mark: str) -> list[str]:
    return [mark[:length] for length in range(1, len(mark))]


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbouring pieces of the same text or arguments in one."""
    joined: list[Part] = []
    for part in parts:
        before = joined[-1] if joined else None
        if isinstance(part, str) and isinstance(before, str):
            joined[-1] = before + part
        elif isinstance(part, CallArguments) and isinstance(before, CallArguments) and part.index == before.index:
            joined[-1] = CallArguments(part.index, before.text + part.text)
        else:
            joined.append(part)
    return joined
