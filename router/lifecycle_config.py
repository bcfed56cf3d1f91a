"""The numbers that the lifecycle's rules are tuned with."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.slo import Slo


@dataclass(frozen=True, slots=True)
class LifecycleConfig:
    """Times are in seconds.

    slo              objectives of requests that bring none of their own
    lease            how long a ticket lives without being renewed; renewals go out three times as often
    request_timeout  after which a request without a deadline of its own is given up
    local_prefill_tokens  prompts up to this length are prefilled on the decode worker (0: never)
    max_attempts     failed attempts after which a request ends with `unavailable`; preemptions do not count
    stage_floor, stage_factor  a stage may take max(stage_floor, stage_factor * its predicted time)
    head_room        output tokens counted in advance on the worker that will decode a request
    """

    slo: Slo = Slo()
    lease: float = 3.0
    request_timeout: float = 600.0
    local_prefill_tokens: int = 0
    max_attempts: int = 8
    stage_floor: float = 2.0
    stage_factor: float = 3.0
    head_room: int = 0
