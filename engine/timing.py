"""How long steps take, learnt from the steps that ran. Feeds heartbeats, stage deadlines and admission.

A step that prefills is taken to cost a fixed part, which every step pays and a decode step measures, and a part that
grows with its tokens. Samples count by their tokens: many tiny prompts say little about a long one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.step import StepPlan

FIRST_GUESS = 30.0  # seconds allowed to a step of a kind that was never seen: first steps compile and page in
DECAY = 0.2  # weight of the newest decode step in the moving average
MEMORY_TOKENS = 4096  # prefilled tokens after which an older sample weighs 1/e
LEAST_SHARE = 0.1  # of a prefill step's seconds that is put down to its tokens, however large the fixed part seems


@dataclass(slots=True)
class StepTimes:
    """What committed steps have taught.

    decode_step  seconds of steps that only decoded; 0 until one ran
    last_step    seconds of the last step
    """

    decode_step: float = 0.0
    last_step: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Tokens per second of prefill, beyond a step's fixed cost; 0 until a step prefilled."""
        return self._tokens / self._seconds if self._seconds > 0.0 else 0.0

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Learn from a committed step that kept the device busy for `seconds`."""
        if is_decode_only(plan):
            self.observe_decode(seconds, seconds, 1)
        else:
            self.observe_prefill(plan.num_tokens, seconds)

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step that fed `num_tokens` tokens, not all of them for decode."""
        self.last_step = seconds
        if seconds <= 0:
            return
        keep = math.exp(-num_tokens / MEMORY_TOKENS)
        self._tokens = keep * self._tokens + num_tokens
        self._seconds = keep * self._seconds + max(seconds - self.decode_step, LEAST_SHARE * seconds)

    def observe_decode(self, first: float, last: float, steps: int) -> None:
        """Learn from `steps` decode steps in a row, whose seconds went evenly from `first` to `last`."""
        self.last_step = last
        if first <= 0 or last <= 0:
            return
        if steps > 1:  # the moving average of a ramp, in closed form
            slope = (last - first) / (steps - 1)
            if not self.decode_step:
                self.decode_step, first, steps = first, first + slope, steps - 1
            keep = (1.0 - DECAY) ** steps
            lag = slope * ((1.0 - DECAY) * (1.0 - keep) / DECAY - steps * keep)
            self.decode_step = keep * self.decode_step + last * (1.0 - keep) - lag
        else:
            self.decode_step += (DECAY if self.decode_step else 1.0) * (last - self.decode_step)

    def predict(self, plan: StepPlan) -> float:
        """Seconds that `plan` is expected to take; `FIRST_GUESS` when nothing like it was seen."""
        if is_decode_only(plan):
            return self.decode_step or FIRST_GUESS
        rate = self.prefill_rate
        return self.decode_step + plan.num_tokens / rate if rate > 0.0 else FIRST_GUESS


def is_decode_only(plan: StepPlan) -> bool:
    """Whether every row feeds the one token that its sequence sampled last."""
    return all(row.num_tokens == 1 and row.output_index > 0 for row in plan.rows)
