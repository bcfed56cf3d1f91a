"""The event tape: every event that the lifecycle was given, with the actions that it answered.

A tape of a live run, replayed through a fresh lifecycle, must give exactly the same actions: the parity test.
Format: msgpack objects one after the other, one (event, actions) pair each; dataclasses, enums and tuples are
extension types, so that a round trip gives equal objects of the same types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Protocol, cast, get_args

import msgpack

from ..core.errors import InternalError
from ..core.request import Attempt, FinishReason, Request, SamplingParams, WorkerRef
from ..core.slo import Slo
from ..core.view import Role, WorkerLoad
from .events import Action, Event, Timer

Tape = Callable[[Event, Sequence[Action]], None]

_DATACLASS, _ENUM, _TUPLE = 1, 2, 3
_CLASSES: tuple[type, ...] = (
    *get_args(Event),
    *get_args(Action),
    *(Attempt, Request, SamplingParams, WorkerRef, Slo, WorkerLoad, Timer),
)
_CLASS_BY_NAME = {cls.__name__: cls for cls in _CLASSES}
_ENUM_BY_NAME = {cls.__name__: cls for cls in (FinishReason, Role)}


class Brain(Protocol):
    """What takes the decisions: `Lifecycle`, or a stand-in for it."""

    def handle(self, event: Event) -> list[Action]: ...


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first place where a replay departs from the tape."""

    index: int
    event: Event
    recorded: list[Action]
    replayed: list[Action]


class TapeWriter:
    """A tape in a file. Call it with every event and its actions; close it at the end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def __call__(self, event: Event, actions: Sequence[Action]) -> None:
        self._file.write(pack(event, actions))

    def close(self) -> None:
        self._file.close()


def pack(event: Event, actions: Sequence[Action]) -> bytes:
    """One entry of a tape."""
    return _pack((event, tuple(actions)))


def read_tape(source: Path | bytes) -> Iterator[tuple[Event, list[Action]]]:
    """The entries of a tape, in order."""
    file: BufferedReader | BytesIO = BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    with file:
        for entry in msgpack.Unpacker(file, ext_hook=_unpack_extension, strict_map_key=False):
            event, actions = entry
            yield cast(Event, event), list(cast(Sequence[Action], actions))


def replay(tape: Iterable[tuple[Event, list[Action]]], brain: Brain) -> Mismatch | None:
    """Give a fresh brain the events of a tape; the first mismatch, or None when every action is the same."""
    for index, (event, recorded) in enumerate(tape):
        replayed = brain.handle(event)
        if replayed != recorded:
            return Mismatch(index, event, recorded, replayed)
    return None


def _pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value, default=_extend, strict_types=True)
    return packed


def _extend(value: object) -> msgpack.ExtType:
    if isinstance(value, StrEnum):
        return msgpack.ExtType(_ENUM, _pack([type(value).__name__, str(value)]))
    if isinstance(value, tuple):
        return msgpack.ExtType(_TUPLE, _pack(list(value)))
    if is_dataclass(value) and type(value).__name__ in _CLASS_BY_NAME:
        values = [getattr(value, field.name) for field in fields(value)]
        return msgpack.ExtType(_DATACLASS, _pack([type(value).__name__, *values]))
    raise InternalError(f"{type(value).__name__} cannot go on an event tape: add it to the classes of router.tape")


def _unpack_extension(code: int, data: bytes) -> object:
    values = msgpack.unpackb(data, ext_hook=_unpack_extension, strict_map_key=False)
    if code == _TUPLE:
        return tuple(values)
    if code == _ENUM:
        return _ENUM_BY_NAME[values[0]](values[1])
    return _CLASS_BY_NAME[values[0]](*values[1:])
