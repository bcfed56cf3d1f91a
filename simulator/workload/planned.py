"""One request of a workload: when it is offered and how long it is, never what stands in it.

A workload is a sequence (or an iterator) of `PlannedRequest` in order of their times, so that a trace of a million
tokens is a small list. The bench offers it to a server, the simulator to a simulated cluster. Must never read a clock:
times are seconds after the start of a run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request to offer.

    index         its place in the workload: prompts are keyed by it
    at            seconds after the start of the run
    block_ids     ids of the leading 512-token blocks of the prompt; equal ids mean equal tokens
    prompt        text to send instead of a made-up prompt
    tenant        on whose behalf; "" is nobody in particular
    priority      higher goes first, where the ordering looks at it
    """

    index: int
    at: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()
    prompt: str | None = None
    tenant: str = ""
    priority: int = 0
