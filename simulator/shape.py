"""Who turns the shape of a step into seconds."""

from __future__ import annotations

from typing import Protocol

from ..core.shape import StepShape


class StepCost(Protocol):
    """Prices the steps of one worker: one model on one kind of device with one tensor and pipeline parallelism.

    Pure: the same question has the same answer. With `stages` > 1 every answer is the seconds of one pipeline stage;
    a step takes `stages` of them end to end, and the next step may enter as soon as the first stage is free.
    """

    @property
    def stages(self) -> int: ...

    def seconds(self, shape: StepShape) -> float:
        """Seconds of one step (of one of its stages), above 0."""
        ...

    def decode_seconds(self, rows: int, context: int, steps: int) -> float:
        """Seconds of `steps` decode-only steps in a row of the same `rows` sequences: the first reads the KV of `context`
        tokens, each later one of `rows` tokens more. Equals the sum of `seconds` over them."""
        ...
