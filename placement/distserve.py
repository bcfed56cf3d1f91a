"""The step times that DistServe's simulator published for OPT on A100-80GB, as a `StepCost`: for comparisons with it only.

A prefill of lengths l takes (a + b * sum(l) + c * sum(l * l)) / stages + 1 ms * stages per stage, a decode step of n rows
(a + b * sum(context) + c * n) / stages, with other constants from a threshold of n on; on top, the first stage works 2 ms and
0.1 us per token of context on the host. Source of the formulas: `simdistserve/estimators/time_estimator.py` and
`base/worker.py` of DistServe (Zhong et al., OSDI 2024); the constants are a file that is passed in.

That simulator runs one decode step more than a request has tokens after the first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InvalidRequest
from ..core.shape import StepShape
from ..simulator.cost import series

STAGE_SECONDS = 1e-3  # of a prefill, per stage and stage
HOST_SECONDS = 2e-3
HOST_TOKEN_SECONDS = 1e-7

_MS = 1e-3
_KINDS = ("prefill", "decoding_smallbs", "decoding_largebs")
_THRESHOLD = "decoding_large_small_bs_threshold"

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class DistServeCost:
    """A `StepCost`. The triples are (a, b, c) of the module's formulas, in seconds.

    threshold     decode rows from which `large_decode` holds
    host          seconds of host work per step, which the original charges to the first stage alone. It is spread over the
                  stages here: exact with one. With more, set 0 and give `PoolSetup.overhead` the 2 ms instead
    host_token    the same per token of context

    A step that mixes both phases costs what a prefill and a decode step after it cost: engines of that time ran them so.
    """

    prefill: Triple
    small_decode: Triple
    large_decode: Triple
    threshold: int
    stages: int = 1
    host: float = HOST_SECONDS
    host_token: float = HOST_TOKEN_SECONDS

    def seconds(self, shape: StepShape) -> float:
        total = 0.0
        if shape.prefill_rows or not shape.decode_rows:
            a, b, c = self.prefill
            # Of whole prompts: pairs are sum(l * (l + 1)) / 2.
            squares = 2 * shape.prefill_pairs - shape.prefill_tokens
            work = a + b * shape.prefill_tokens + c * squares + self.host + self.host_token * shape.prefill_context
            total = work / self.stages + STAGE_SECONDS * self.stages
        if shape.decode_rows:
            total += self.decode_seconds(shape.decode_rows, shape.decode_context, 1)
        return total

    def decode_seconds(self, rows: int, context: int, steps: int) -> float:
        a, b, c = self.small_decode if rows < self.threshold else self.large_decode
        # `context` counts the token that a row feeds; the host's share does not.
        tokens = series(rows, context, steps)
        each = a + c * rows + self.host - self.host_token * rows
        return (steps * each + (b + self.host_token) * tokens) / self.stages


def read_distserve(file: Path, model: str, tensor_parallel: int, pipeline_parallel: int = 1) -> DistServeCost:
    """The cost of `model` ("facebook/opt-13b") in a profile file of that simulator.

    Raises InvalidRequest naming the file and what it holds.
    """
    by_degree = _section(
        file, _section(file, _read(file), model, "model"), str(tensor_parallel), f"tensor parallelism of {model}"
    )
    prefill, small, large = (_triple(file, by_degree, kind) for kind in _KINDS)
    threshold = by_degree.get(_THRESHOLD)
    if isinstance(threshold, bool) or not isinstance(threshold, int) or threshold < 1:
        raise InvalidRequest(f"{file}: {_THRESHOLD} is {threshold!r}; it must be a whole number of at least 1")
    if pipeline_parallel < 1:
        raise InvalidRequest(f"pipeline_parallel is {pipeline_parallel}; it must be at least 1", "pipeline_parallel")
    return DistServeCost(prefill, small, large, threshold, pipeline_parallel)


def _read(file: Path) -> Mapping[str, object]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidRequest(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidRequest(f"{file} holds a JSON {type(values).__name__}; it must be an object of models")
    return values


def _section(file: Path, values: Mapping[str, object], key: str, what: str) -> Mapping[str, object]:
    found = values.get(key)
    if not isinstance(found, dict):
        raise InvalidRequest(f"{file}: there is no {what} {key!r}; it holds {', '.join(values)}")
    return found


def _triple(file: Path, values: Mapping[str, object], key: str) -> Triple:
    found = values.get(key)
    numbers = [_number(value) for value in found] if isinstance(found, list) else []
    if len(numbers) != 3 or not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise InvalidRequest(f"{file}: {key} is {found!r}; it must be a list of three numbers of milliseconds")
    return numbers[0] * _MS, numbers[1] * _MS, numbers[2] * _MS


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
