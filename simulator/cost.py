"""What a step costs, as a linear model with a floor: seconds that were measured, or made of a model's and a device's numbers.

    seconds = step + token * max(tokens fed, floor_tokens)
              + pair * prefill pairs + prefill_context * prefill context + prefill_row * prefill rows
              + decode_context * decode context + decode_row * decode rows + sampled * sampled rows

The products of a step read every weight once however few tokens they multiply: below `floor_tokens` they take the time of
streaming the weights. Attention runs beside no product but after it, so that it adds to them and has no part in the floor.
One formula prices prefill (the sum of l is `token`, the sum of l squared `pair`), decode and mixed steps alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..core.errors import InvalidRequest
from ..core.shape import StepShape


@dataclass(frozen=True, slots=True)
class LinearCost:
    """A `StepCost`. Every coefficient is in seconds and at least 0, `floor_tokens` in tokens.

    step             once per step: launches, host work, norms
    token            per token fed: products with the weights
    floor_tokens     tokens whose products take as long as reading the weights
    pair             per pair of a fed and an attended token of a prompt: attention's products
    prefill_context  per token whose KV prefill rows read or write
    prefill_row      per prefill row
    decode_context   per token whose KV decode rows read
    decode_row       per decode row, beyond `token`
    sampled          per row that is sampled from: logits over the vocabulary and the draw
    stages           pipeline stages; all other numbers are those of one stage

    Raises InvalidRequest, naming the field, for a number that is negative or not finite, or when a step would cost nothing.
    """

    step: float
    token: float = 0.0
    floor_tokens: float = 0.0
    pair: float = 0.0
    prefill_context: float = 0.0
    prefill_row: float = 0.0
    decode_context: float = 0.0
    decode_row: float = 0.0
    sampled: float = 0.0
    stages: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidRequest(f"{field.name} of a step's cost is {value!r}; it must be a number of at least 0", field.name)
        if self.stages < 1:
            raise InvalidRequest(f"stages of a step's cost is {self.stages}; it must be at least 1", "stages")
        if self.step + self.token * self.floor_tokens <= 0:
            raise InvalidRequest("step of a step's cost is 0 and there is no floor; an empty step must cost something", "step")

    def seconds(self, shape: StepShape) -> float:
        return (
            self.step
            + self.token * max(shape.prefill_tokens + shape.decode_rows, self.floor_tokens)
            + self.pair * shape.prefill_pairs
            + self.prefill_context * shape.prefill_context
            + self.prefill_row * shape.prefill_rows
            + self.decode_context * shape.decode_context
            + self.decode_row * shape.decode_rows
            + self.sampled * shape.sampled
        )

    def decode_seconds(self, rows: int, context: int, steps: int) -> float:
        """An arithmetic series: from step to step nothing grows but the context, by `rows` tokens."""
        each = self.step + self.token * max(rows, self.floor_tokens) + (self.decode_row + self.sampled) * rows
        return steps * each + self.decode_context * series(rows, context, steps)


def series(rows: int, context: int, steps: int) -> int:
    """Tokens whose KV `steps` decode steps read in all: context + (context + rows) + (context + 2 rows) + ..."""
    return steps * context + rows * (steps * (steps - 1) // 2)
