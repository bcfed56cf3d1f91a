"""Service-level objectives and what it means to meet them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slo:
    """Objectives in seconds. `attainment` is the share of all offered requests that must meet both."""

    ttft: float = 1.0
    tpot: float = 0.05
    attainment: float = 0.9

    def met_by(self, ttft: float | None, tpot: float | None) -> bool:
        """Whether one finished request met the objectives.

        `ttft` is None when no token ever arrived (a miss). `tpot` is None when fewer than two tokens
        were asked for, in which case only TTFT counts.
        """
        if ttft is None or ttft > self.ttft:
            return False
        return tpot is None or tpot <= self.tpot


def time_per_output_token(first_token: float, last_token: float, num_tokens: int) -> float | None:
    """TPOT: (last - first token) / (n - 1) in seconds; None when n < 2."""
    if num_tokens < 2:
        return None
    return (last_token - first_token) / (num_tokens - 1)
