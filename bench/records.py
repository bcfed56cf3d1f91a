"""What a run leaves behind: the raw times of every offered request.

All times are seconds since the run's start, read from one monotonic clock. Nothing here is averaged; `metrics`
draws conclusions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..core.slo import time_per_output_token


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One offered request.

    offered       when the workload wanted it out; TTFT counts from here, so a slow client counts too
    sent          when the client began with it (before it connects); None: it never got to it
    input_tokens, output_tokens   what was planned
    chunk_times   arrival of every chunk that carries tokens or text
    chunk_tokens  tokens in each chunk, where the server says so; else empty
    num_tokens    tokens received: from the server's usage, else counted
    prompt_tokens from the server's usage; None when it gave none
    end           when the stream ended, well or not; None: it was still running at the end of the run
    error         kind of failure, empty when the request ended well: "http 429", "grpc UNAVAILABLE", "timeout", ...
    message       what the server (or the client) said about the failure
    """

    index: int
    input_tokens: int
    output_tokens: int
    offered: float
    sent: float | None = None
    chunk_times: tuple[float, ...] = ()
    chunk_tokens: tuple[int, ...] = ()
    num_tokens: int = 0
    prompt_tokens: int | None = None
    end: float | None = None
    finish_reason: str = ""
    error: str = ""
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether it ended well with at least one token."""
        return not self.error and self.end is not None and bool(self.chunk_times)

    @property
    def lag(self) -> float | None:
        """Seconds by which the client itself was late with it."""
        return None if self.sent is None else self.sent - self.offered

    @property
    def ttft(self) -> float | None:
        """Offered to first chunk; None when there was none."""
        return self.chunk_times[0] - self.offered if self.chunk_times else None

    @property
    def tpot(self) -> float | None:
        """(last - first chunk) / (tokens - 1); None with fewer than two tokens."""
        if not self.chunk_times:
            return None
        return time_per_output_token(self.chunk_times[0], self.chunk_times[-1], self.num_tokens)

    @property
    def latency(self) -> float | None:
        """Offered to the end of the stream."""
        return None if self.end is None else self.end - self.offered

    @property
    def gaps(self) -> tuple[float, ...]:
        """Times between successive chunks. A chunk of several tokens is one gap: that is what a reader sees."""
        return tuple(later - earlier for earlier, later in pairwise(self.chunk_times))


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a run is; `ttft_p50` is over the last requests that got a first token."""

    elapsed: float
    num_planned: int
    num_offered: int
    num_finished: int
    num_failed: int
    num_tokens: int
    ttft_p50: float | None = None

    @property
    def num_in_flight(self) -> int:
        return self.num_offered - self.num_finished - self.num_failed


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A whole run.

    started_at    wall-clock time of the start, ISO 8601, for people
    duration      seconds from the start to the end of the last request
    closed_loop   True when a limit of concurrent requests held requests back; their `offered` is then the moment a
                  place became free
    loop_lags     how late the client's own timers fired, sampled all through the run: large values mean that this
                  client was too slow to be believed
    interrupted   the run was stopped before everything planned was offered or finished
    """

    target: str
    started_at: str
    duration: float
    num_planned: int
    records: tuple[RequestRecord, ...]
    loop_lags: tuple[float, ...] = ()
    closed_loop: bool = False
    interrupted: bool = False
