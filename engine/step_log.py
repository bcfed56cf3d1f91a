"""Which steps a worker ran and how long they took: a few of every size, so that a fit sees rare sizes beside common ones.

Steps are classed by the powers of two of their rows, tokens and context; of each class the latest are kept. So memory is bounded
however long a worker lives, a burst of an hour ago still tells what a large batch costs, and a million steps of one size push
out none of another. Of steps that only decode, every `STRIDE`th is looked at: the others cost nothing.
"""

from __future__ import annotations

from collections import deque

from ..core.observed import ObservedStep
from ..core.shape import StepShape, shape_of
from ..core.step import StepPlan
from .timing import is_decode_only

PER_CLASS = 32
MAX_CLASSES = 192
STRIDE = 4


class StepLog:
    """Lives on the event loop's thread."""

    def __init__(self) -> None:
        self._classes: dict[tuple[int, ...], deque[ObservedStep]] = {}
        self._num_decoding = 0

    def add(self, plan: StepPlan, seconds: float, period: float) -> None:
        """A step was committed."""
        if is_decode_only(plan):
            self._num_decoding += 1
            if self._num_decoding % STRIDE:
                return
        if seconds <= 0 or not plan.rows:
            return
        shape = shape_of(plan)
        kind = _class_of(shape)
        if kind not in self._classes and len(self._classes) >= MAX_CLASSES:
            self._classes.pop(next(iter(self._classes)))
        self._classes.setdefault(kind, deque(maxlen=PER_CLASS)).append(ObservedStep(shape, seconds, max(seconds, period)))

    def steps(self) -> list[ObservedStep]:
        """All that is kept."""
        return [step for kept in self._classes.values() for step in kept]


def _class_of(shape: StepShape) -> tuple[int, ...]:
    return tuple(
        number.bit_length() for number in (shape.prefill_rows, shape.prefill_tokens, shape.decode_rows, shape.decode_context)
    )
