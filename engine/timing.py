"""How long steps take, learnt from the steps that ran. Feeds heartbeats, stage deadlines and admission."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.step import StepPlan

FIRST_GUESS = 30.0  # seconds allowed to a step of a kind that was never seen: first steps compile and page in
DECAY = 0.2  # weight of the newest sample in the moving averages


@dataclass(slots=True)
class StepTimes:
    """Moving averages over committed steps.

    prefill_rate  tokens per second of steps that prefilled; 0 until one ran
    decode_step   seconds of steps that only decoded; 0 until one ran
    """

    prefill_rate: float = 0.0
    decode_step: float = 0.0
    last_step: float = field(default=0.0)

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Learn from a committed step that kept the device busy for `seconds`."""
        self.last_step = seconds
        if seconds <= 0:
            return
        if is_decode_only(plan):
            self.decode_step = _blend(self.decode_step, seconds)
        else:
            self.prefill_rate = _blend(self.prefill_rate, plan.num_tokens / seconds)

    def predict(self, plan: StepPlan) -> float:
        """Seconds that `plan` is expected to take; `FIRST_GUESS` when nothing like it was seen."""
        if is_decode_only(plan):
            return self.decode_step or FIRST_GUESS
        if self.prefill_rate == 0.0:
            return FIRST_GUESS
        return max(self.decode_step, plan.num_tokens / self.prefill_rate)


def is_decode_only(plan: StepPlan) -> bool:
    """Whether every row feeds the one token that its sequence sampled last."""
    return all(row.num_tokens == 1 and row.output_index > 0 for row in plan.rows)


def _blend(average: float, sample: float) -> float:
    return sample if average == 0.0 else average + DECAY * (sample - average)
