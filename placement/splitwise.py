"""The step times that Splitwise measured for whole machines of A100 or H100, as a `StepCost`: for comparisons with it only.

Between measurements lie straight lines, beyond the last one its line goes on. Source: `data/perf_model.csv` of
Mutinifni/splitwise-sim (Patel et al., ISCA 2024), times in ms; the medians of repeated runs count.

A prefill takes what as many tokens took, in one prompt or in several of 512. A decode step takes what as many rows took at 512
tokens of prompt, and for every token of context beyond those (or short of them) the slope of a lone sequence from 128 to
8,192 tokens. Nothing was measured of both in one step: it costs the sum.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from ..core.errors import InvalidRequest
from ..core.shape import StepShape
from ..simulator.cost import series

MEASURED_CONTEXT = 512
"""Tokens of every prompt in the measurements of a batch."""

Line = tuple[tuple[float, float], ...]
"""(tokens or rows, seconds), ascending."""

_COLUMNS = ("model", "hardware", "tensor_parallel", "prompt_size", "batch_size", "prompt_time", "token_time")
_MS = 1e-3


@dataclass(frozen=True, slots=True)
class SplitwiseCost:
    """A `StepCost`.

    prefill       seconds by prompt tokens; fewer than the first take as long as the first
    decode        seconds by rows, each of 512 tokens of context
    context       seconds per token of context more
    """

    prefill: Line
    decode: Line
    context: float
    stages: int = 1

    def __post_init__(self) -> None:
        for name, line in (("prefill", self.prefill), ("decode", self.decode)):
            if len(line) < 2 or any(second[0] <= first[0] for first, second in pairwise(line)) or line[0][1] <= 0:
                raise InvalidRequest(f"{name}: {line} must be at least two ascending points with times above 0", name)
        if not all(seconds > rows * MEASURED_CONTEXT * self.context for rows, seconds in self.decode):
            raise InvalidRequest(f"context: {self.context} s per token are more than whole steps take: {self.decode}", "context")

    def seconds(self, shape: StepShape) -> float:
        total = 0.0
        if shape.prefill_tokens or not shape.decode_rows:
            total = _at(self.prefill, max(shape.prefill_tokens, self.prefill[0][0]))
        if shape.decode_rows:
            total += self.decode_seconds(shape.decode_rows, shape.decode_context, 1)
        return total

    def decode_seconds(self, rows: int, context: int, steps: int) -> float:
        more = series(rows, context, steps) - steps * rows * MEASURED_CONTEXT
        return steps * _at(self.decode, rows) + self.context * more


def read_splitwise(file: Path, model: str, hardware: str, tensor_parallel: int = 8) -> SplitwiseCost:
    """The cost of `model` ("llama2-70b", "bloom-176b") on a machine of `hardware` ("a100-80gb", "h100-80gb").

    Raises InvalidRequest naming the file, the line or what it holds.
    """
    rows = _measurements(file)
    wanted = (model, hardware, str(tensor_parallel))
    mine = [numbers for key, numbers in rows if key == wanted]
    if not mine:
        known = "; ".join(sorted({" ".join(key) for key, _ in rows}))
        raise InvalidRequest(f"{file} holds nothing of {' '.join(wanted)}; it holds {known}")
    return SplitwiseCost(
        _medians((prompt * batch, prompt_time) for prompt, batch, prompt_time, _ in mine),
        _medians((batch, token_time) for prompt, batch, _, token_time in mine if prompt == MEASURED_CONTEXT),
        _slope(_medians((prompt, token_time) for prompt, batch, _, token_time in mine if batch == 1)),
    )


def _measurements(file: Path) -> list[tuple[tuple[str, str, str], tuple[float, float, float, float]]]:
    """(model, hardware, TP) and (prompt tokens, prompts, prefill seconds, seconds per token) of every row."""
    found = []
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines)
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise InvalidRequest(f"{file}, line 1: the header lacks {', '.join(missing)}")
            for row in reader:
                numbers = [_number(file, reader.line_num, column, row) for column in _COLUMNS[3:]]
                key = (row["model"], row["hardware"], row["tensor_parallel"])
                found.append((key, (numbers[0], numbers[1], numbers[2] * _MS, numbers[3] * _MS)))
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{file} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    return found


def _number(file: Path, line: int, column: str, row: Mapping[str, str | None]) -> float:
    try:
        number = float(row[column] or "")
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise InvalidRequest(f"{file}, line {line}: {column} is {row[column]!r}; it must be a number above 0")
    return number


def _medians(points: Iterable[tuple[float, float]]) -> Line:
    groups: dict[float, list[float]] = {}
    for place, value in points:
        groups.setdefault(place, []).append(value)
    return tuple((place, median(values)) for place, values in sorted(groups.items()))


def _slope(line: Line) -> float:
    """Of the straight line through all points (least squares), at least 0."""
    middle = sum(place for place, _ in line) / len(line)
    spread = math.fsum((place - middle) ** 2 for place, _ in line)
    return max(0.0, math.fsum((place - middle) * value for place, value in line) / spread) if spread else 0.0


def _at(line: Line, place: float) -> float:
    above = min(max(bisect_right(line, place, key=lambda point: point[0]), 1), len(line) - 1)
    (left, low), (right, high) = line[above - 1], line[above]
    return low + (high - low) * (place - left) / (right - left)
