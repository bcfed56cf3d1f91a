"""Recorded workloads: the Azure LLM inference CSV and the Mooncake JSONL.

Every complaint names the file, the line and the reason. Traces are not corrected in silence: a line that cannot be
read ends the reading. Sources: Azure/AzurePublicDataset (AzureLLMInferenceTrace_*.csv), kvcache-ai/Mooncake
(FAST25-release/traces/*.jsonl).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TextIO

from ...core.errors import InvalidRequest
from .planned import PlannedRequest

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BLOCK_TOKENS = 512
"""Tokens of one Mooncake block."""


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """How a trace is cut to size.

    time_scale    times are multiplied by it: 0.5 replays twice as fast
    max_requests  only the first so many
    duration      only those that arrive in the first so many seconds (of the replay)
    max_input_tokens, max_output_tokens   longer ones are cut down to it
    """

    time_scale: float = 1.0
    max_requests: int | None = None
    duration: float | None = None
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None


def read_trace(path: Path, trace_format: str, options: TraceOptions | None = None) -> tuple[PlannedRequest, ...]:
    """The workload in a trace file, its first arrival at 0. Raises InvalidRequest naming file, line and reason."""
    return tuple(stream_trace(path, trace_format, options))


def stream_trace(path: Path, trace_format: str, options: TraceOptions | None = None) -> Iterator[PlannedRequest]:
    """As `read_trace`, one request at a time: memory does not grow with the file.

    What is wrong with the arguments is raised at once, what is wrong with the file when it is reached.
    """
    options = options or TraceOptions()
    if trace_format not in FORMATS:
        raise InvalidRequest(f"format: {trace_format!r} is unknown; allowed are {', '.join(FORMATS)}", "format")
    if not 0 < options.time_scale < math.inf:
        raise InvalidRequest(f"time-scale: {options.time_scale}; it must be a number above 0", "time-scale")
    return _requests(path, FORMATS[trace_format], options)


def guess_format(path: Path) -> str:
    """By the file's ending. Raises InvalidRequest when it does not tell."""
    guess = {".csv": "azure", ".jsonl": "mooncake"}.get(path.suffix)
    if guess is None:
        raise InvalidRequest(f"{path}: its ending does not tell the format; give --format {' or --format '.join(FORMATS)}")
    return guess


def repeat_trace(requests: Sequence[PlannedRequest], times: int, speed: float = 1.0) -> Iterator[PlannedRequest]:
    """A trace `times` times in a row, `speed` times as fast; lazy: only `requests` itself is in memory.

    A round begins one mean gap after the last request of the round before. Block ids differ from round to round, so that a
    repeated hour is another hour of the same kind and not one that the prefix cache already knows.
    """
    if not requests:
        raise InvalidRequest("an empty trace cannot be repeated; give at least one request", "trace")
    if times < 1 or not 0 < speed < math.inf:
        raise InvalidRequest(f"repeat {times} times at speed {speed}: both must be above 0", "speed")
    first, last = requests[0].at, requests[-1].at
    period = (last - first) * (1 + 1 / max(len(requests) - 1, 1))
    num_ids = 1 + max((block_id for request in requests for block_id in request.block_ids), default=-1)
    return (
        replace(
            request,
            index=number * len(requests) + place,
            at=(request.at - first + number * period) / speed,
            block_ids=tuple(block_id + number * num_ids for block_id in request.block_ids),
        )
        for number in range(times)
        for place, request in enumerate(requests)
    )


def _requests(
    path: Path, read: Callable[[Path, TextIO], Iterator[PlannedRequest]], options: TraceOptions
) -> Iterator[PlannedRequest]:
    index = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for request in read(path, file):
                scaled = replace(request, index=index, at=request.at * options.time_scale)
                past_end = options.duration is not None and scaled.at > options.duration
                if past_end or (options.max_requests is not None and index >= options.max_requests):
                    break
                yield _clip(scaled, options)
                index += 1
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror}", "trace") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path}: is not text in UTF-8: {error.reason} at byte {error.start}", "trace") from error
    if not index:
        raise InvalidRequest(f"{path}: holds no request (with these limits)", "trace")


def _clip(request: PlannedRequest, options: TraceOptions) -> PlannedRequest:
    inputs = min(request.input_tokens, options.max_input_tokens or request.input_tokens)
    outputs = min(request.output_tokens, options.max_output_tokens or request.output_tokens)
    return replace(request, input_tokens=inputs, output_tokens=outputs, block_ids=request.block_ids[: -(-inputs // BLOCK_TOKENS)])


def _read_azure(path: Path, file: TextIO) -> Iterator[PlannedRequest]:
    """Columns TIMESTAMP (ISO date and time), ContextTokens, GeneratedTokens; others are ignored."""
    reader = csv.DictReader(file)
    missing = [column for column in AZURE_COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise _bad(path, 1, f"the header lacks {', '.join(missing)}; it must name {', '.join(AZURE_COLUMNS)}")
    start: datetime | None = None
    previous = 0.0
    for row in reader:
        line = reader.line_num
        stamp, inputs, outputs = (row[column] or "" for column in AZURE_COLUMNS)
        try:
            moment = datetime.fromisoformat(stamp)
        except ValueError:
            raise _bad(path, line, f"TIMESTAMP {stamp!r} is no date and time like 2023-11-16 18:15:46.68") from None
        start = start or moment
        if (moment.tzinfo is None) != (start.tzinfo is None):
            raise _bad(path, line, f"TIMESTAMP {stamp!r} differs from the first line in naming a time zone")
        at = _in_order(path, line, (moment - start).total_seconds(), previous)
        previous = at
        yield PlannedRequest(0, at, _count(path, line, "ContextTokens", inputs), _count(path, line, "GeneratedTokens", outputs))


def _read_mooncake(path: Path, file: TextIO) -> Iterator[PlannedRequest]:
    """One JSON object a line: timestamp in ms, input_length, output_length, hash_ids of 512-token blocks (optional)."""
    start: float | None = None
    previous = 0.0
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            entry = json.loads(text)
        except json.JSONDecodeError as error:
            raise _bad(path, line, f"is no JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(entry, dict):
            raise _bad(path, line, f"is a JSON {type(entry).__name__}, not an object")
        stamp = entry.get("timestamp")
        if isinstance(stamp, bool) or not isinstance(stamp, int | float) or not math.isfinite(stamp):
            raise _bad(path, line, f"timestamp {stamp!r} is no number of milliseconds")
        start = stamp / 1000 if start is None else start
        at = _in_order(path, line, stamp / 1000 - start, previous)
        previous = at
        inputs = _count(path, line, "input_length", entry.get("input_length"))
        outputs = _count(path, line, "output_length", entry.get("output_length"))
        ids = entry.get("hash_ids", [])
        if not isinstance(ids, list) or not all(isinstance(item, int) and item >= 0 for item in ids):
            raise _bad(path, line, "hash_ids is no list of whole numbers >= 0")
        if len(ids) > -(-inputs // BLOCK_TOKENS):
            raise _bad(path, line, f"{len(ids)} hash_ids are more blocks of {BLOCK_TOKENS} tokens than input_length {inputs} has")
        yield PlannedRequest(0, at, inputs, outputs, tuple(ids))


FORMATS: dict[str, Callable[[Path, TextIO], Iterator[PlannedRequest]]] = {"azure": _read_azure, "mooncake": _read_mooncake}


def _count(path: Path, line: int, name: str, value: object) -> int:
    """A number of tokens. Real traces hold zeros (an empty answer): at least one token is asked for."""
    try:
        if isinstance(value, float | bool) or not isinstance(value, int | str):
            raise ValueError
        number = int(value)
    except ValueError:
        raise _bad(path, line, f"{name} {value!r} is no whole number of tokens") from None
    if number < 0:
        raise _bad(path, line, f"{name} {number} is below 0")
    return max(1, number)


def _in_order(path: Path, line: int, at: float, previous: float) -> float:
    if at < previous:
        raise _bad(path, line, f"goes back in time by {previous - at:.3f} s; sort the trace by time")
    return at


def _bad(path: Path, line: int, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{path}, line {line}: {reason}", "trace")
