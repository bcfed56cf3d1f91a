"""What a running cluster remembers of its work, for whoever plans the next one: bounded samples, never a token."""

from __future__ import annotations

from dataclasses import dataclass

from .shape import StepShape


@dataclass(frozen=True, slots=True)
class ObservedStep:
    """A step that ran.

    seconds  the device was busy with it
    period   seconds from the end of the step before it (or from its own submission, when the device was idle) to its end as the
             loop saw it: `seconds` and what the host added
    """

    shape: StepShape
    seconds: float
    period: float


@dataclass(frozen=True, slots=True)
class ObservedRequest:
    """One sequence that a router served or refused.

    arrival seconds, by the clock of whoever holds this
    ok      whether it ended well: else its output is not as long as it was meant to be
    cached_tokens   of its prompt, found in a prefix cache
    ttft, tpot      None where it never got so far
    """

    arrival: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    ok: bool
    ttft: float | None = None
    tpot: float | None = None
