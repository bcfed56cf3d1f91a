"""What became of one simulated request. All times are seconds of virtual time."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.slo import Slo, time_per_output_token


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """One offered request and the moments of its life; None for what never happened.

    index          its place in the workload
    output_tokens  tokens that were wanted; `num_tokens` came
    prefill_worker, decode_worker   ids of those that served it last ("" for none; equal when one worker did all)
    prefill_start  the first plan that contained it was made
    first_token    the router had its first token: TTFT ends
    landed         all of its KV was adopted where it decodes; the first token's time when nothing was transferred
    end            the router had its last token, or gave it up
    error          code of `core.errors`, empty when it ended well
    attempts       1, and one more for every time it was started over
    """

    index: int
    tenant: str
    arrival: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    prefill_start: float | None = None
    first_token: float | None = None
    landed: float | None = None
    end: float | None = None
    num_tokens: int = 0
    error: str = ""
    attempts: int = 1

    @property
    def ok(self) -> bool:
        return not self.error and self.end is not None and self.num_tokens > 0

    @property
    def ttft(self) -> float | None:
        """Arrival to first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def tpot(self) -> float | None:
        """(last - first token) / (tokens - 1); None with fewer than two tokens."""
        if self.first_token is None or self.end is None:
            return None
        return time_per_output_token(self.first_token, self.end, self.num_tokens)

    def meets(self, slo: Slo) -> bool:
        """Whether it counts towards attainment: ended well and met both objectives."""
        return self.ok and slo.met_by(self.ttft, self.tpot)


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """What one simulated worker did.

    busy            seconds in which its device (the first pipeline stage) worked
    steps           steps that ran
    tokens          tokens fed, prefill and decode
    decode_row_seconds  integral over time of the decode rows in the running step: / busy is the mean batch
    kv_token_seconds    integral over time of the used share of its KV pool: / duration is the mean use
    peak_kv         largest used share of its KV pool
    waiting_seconds integral over time of sequences (and reservations) that held no blocks
    preemptions     sequences that lost their blocks
    """

    worker: str
    role: str
    busy: float
    steps: int
    tokens: int
    decode_row_seconds: float
    kv_token_seconds: float
    peak_kv: float
    waiting_seconds: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What one direction of one node's network did: bytes moved, seconds in which anything moved, largest backlog in bytes."""

    name: str
    bytes: float
    busy: float
    peak_backlog: float
