"""A simulation as something to look at: spans and counters on named tracks, written as Chrome trace events.

Perfetto (ui.perfetto.dev) and chrome://tracing open the file. Format: "Trace Event Format", the JSON object form with
complete ("X"), counter ("C") and metadata ("M") events; times in microseconds. Memory is bounded: what
comes after `max_spans` is counted and left out, and the file says so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InternalError, InvalidRequest

MAX_SPANS = 500_000
"""About 100 MB of JSON: what Perfetto still opens with ease."""

Fact = float | int | str


@dataclass(frozen=True, slots=True)
class _Span:
    track: str
    name: str
    begin: float
    end: float
    facts: tuple[tuple[str, Fact], ...]


@dataclass(frozen=True, slots=True)
class _Level:
    track: str
    name: str
    at: float
    value: float


class Timeline:
    """Collects spans and counters, in any order of time.

    A track is named `group/row`, such as `workers/prefill-0` or `requests/17`: rows of one group stand together under
    its name, in the order in which they first appeared. A track without a group is a group of its own. Spans of one
    track may nest; those that cross (steps of a pipeline, say) are shown on more rows of it.
    """

    def __init__(self, max_spans: int = MAX_SPANS) -> None:
        if max_spans < 1:
            raise InvalidRequest(f"max_spans: {max_spans}; a timeline holds at least 1 span", "max_spans")
        self._max_spans = max_spans
        self._events: list[_Span | _Level] = []
        self._num_left_out = 0

    @property
    def num_left_out(self) -> int:
        """Spans and counter values that came after the bound was reached."""
        return self._num_left_out

    def span(self, track: str, name: str, begin: float, end: float, **facts: Fact) -> None:
        """Something that lasted from `begin` to `end` (seconds). `facts` are shown when it is clicked on."""
        if not -math.inf < begin <= end < math.inf:
            raise InternalError(f"{track}: {name} from {begin} s to {end} s; a span must end, and not before it begins")
        if self._has_room():
            self._events.append(_Span(track, name, begin, end, tuple(facts.items())))

    def counter(self, track: str, name: str, at: float, value: float) -> None:
        """A level that holds from `at` (seconds) until its next value."""
        if not (math.isfinite(at) and math.isfinite(value)):
            raise InternalError(f"{track}: {name} is {value} at {at} s; a counter needs finite numbers")
        if self._has_room():
            self._events.append(_Level(track, name, at, value))

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all. Makes missing folders."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                # One event a line: json.dump of the whole would hold a second copy in memory.
                file.write('{"displayTimeUnit":"ms","otherData":' + json.dumps({"left out": self._num_left_out}))
                file.write(',"traceEvents":[\n')
                for number, event in enumerate(self._trace_events()):
                    file.write((",\n" if number else "") + json.dumps(event, separators=(",", ":"), allow_nan=False))
                file.write("\n]}\n")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _has_room(self) -> bool:
        if len(self._events) < self._max_spans:
            return True
        self._num_left_out += 1
        return False

    def _trace_events(self) -> Iterator[dict[str, object]]:
        rows = self._rows()
        places = self._places(rows)
        yield from self._names(places)
        for event, row in zip(self._events, rows, strict=True):
            process, thread = places[event.track, row]
            if isinstance(event, _Span):
                # Rounding begin and end, not the length: spans that touch still touch, and never cross.
                begin, end = _microseconds(event.begin), _microseconds(event.end)
                yield {
                    "ph": "X", "name": event.name, "pid": process, "tid": thread,
                    "ts": begin, "dur": round(end - begin, 3), "args": {key: _writable(fact) for key, fact in event.facts},
                }  # fmt: skip
            else:
                # Perfetto keeps counters by process and name, whatever their thread: the row goes into the name.
                name = f"{_row(event.track)} {event.name}"
                yield {
                    "ph": "C", "name": name, "pid": process, "tid": thread,
                    "ts": _microseconds(event.at), "args": {event.name: event.value},
                }  # fmt: skip

    def _rows(self) -> list[int]:
        """On which row of its track every event is shown: the first on which no span crosses it. Viewers demand that."""
        rows = [0] * len(self._events)
        spans = [(event.begin, -event.end, place) for place, event in enumerate(self._events) if isinstance(event, _Span)]
        open_ends: dict[str, list[list[float]]] = {}  # by track and row: ends of the spans around the present, innermost last
        for begin, minus_end, place in sorted(spans):
            start, end = _microseconds(begin), _microseconds(-minus_end)
            tracks = open_ends.setdefault(self._events[place].track, [])
            for row, around in enumerate(tracks):
                while around and around[-1] <= start:
                    around.pop()
                if not around or end <= around[-1]:
                    rows[place] = row
                    around.append(end)
                    break
            else:
                rows[place] = len(tracks)
                tracks.append([end])
        return rows

    def _places(self, rows: list[int]) -> dict[tuple[str, int], tuple[int, int]]:
        """(track, row) to (process, thread), both counted from 1: tracks in the order of their first event."""
        num_rows: dict[str, int] = {}
        for event, row in zip(self._events, rows, strict=True):
            num_rows[event.track] = max(num_rows.get(event.track, 0), row + 1)
        processes: dict[str, int] = {}
        num_threads: dict[int, int] = {}
        places: dict[tuple[str, int], tuple[int, int]] = {}
        for track, count in num_rows.items():
            process = processes.setdefault(_group(track), len(processes) + 1)
            for row in range(count):
                num_threads[process] = num_threads.get(process, 0) + 1
                places[track, row] = (process, num_threads[process])
        return places

    def _names(self, places: dict[tuple[str, int], tuple[int, int]]) -> Iterator[dict[str, object]]:
        named: set[int] = set()
        for (track, row), (process, thread) in places.items():
            if process not in named:
                named.add(process)
                left_out = f" ({self._num_left_out} later events left out)" if self._num_left_out else ""
                yield _metadata("process_name", process, 0, {"name": _group(track) + left_out})
                yield _metadata("process_sort_index", process, 0, {"sort_index": process})
            yield _metadata("thread_name", process, thread, {"name": _row(track) + (f" ({row + 1})" if row else "")})
            yield _metadata("thread_sort_index", process, thread, {"sort_index": thread})


def _group(track: str) -> str:
    return track.partition("/")[0]


def _row(track: str) -> str:
    group, _, row = track.partition("/")
    return row or group


def _writable(fact: Fact) -> Fact:
    """JSON has no inf and no nan."""
    return str(fact) if isinstance(fact, float) and not math.isfinite(fact) else fact


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _metadata(kind: str, process: int, thread: int, facts: dict[str, object]) -> dict[str, object]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": facts}
