"""One simulated request at the router: what the service's token log and stream know of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.request import Attempt, Request, WorkerRef
from ..kv_transfer.ticket import Ticket
from .port import TokenNews
from .records import RequestOutcome
from .timeline import Timeline
from .workload.planned import PlannedRequest


@dataclass(slots=True, eq=False)
class RequestLog:
    """A request from its arrival to its end.

    attempt     the attempt in flight; None before the first
    first, rest where its first token and the others come from
    begun       the attempt has given its first token
    base        output tokens that the attempt started from
    num_tokens  output tokens that the router has, as far as it was told: exact when an attempt begins or ends
    ticket      of the attempt in flight, on its way to the prefill worker
    timers      when each of its timers is due
    """

    planned: PlannedRequest
    request: Request
    attempt: Attempt | None = None
    first: WorkerRef | None = None
    rest: WorkerRef | None = None
    begun: bool = False
    base: int = 0
    num_tokens: int = 0
    ticket: Ticket | None = None
    cached_tokens: int = 0
    prefill_start: float | None = None
    first_token: float | None = None
    landed: float | None = None
    timers: dict[object, float] = field(default_factory=dict)

    def place(self, attempt: Attempt, first: WorkerRef | None, rest: WorkerRef | None) -> None:
        """`attempt` goes to a worker that makes its first token, or the rest, or both."""
        if attempt != self.attempt:
            self.attempt, self.first, self.rest = attempt, None, None
            self.begun, self.base, self.ticket = False, self.num_tokens, None
        self.first = first or self.first
        self.rest = rest or self.rest

    def take(self, news: TokenNews, now: float) -> bool:
        """Note new tokens. Returns whether they are the first of the attempt."""
        first = not self.begun
        if first:
            self.begun = True
            if self.first_token is None:
                self.first_token, self.cached_tokens = now, news.cached
            if self.prefill_start is None:
                self.prefill_start = news.started
        self.num_tokens = max(self.num_tokens, news.num_output)
        return first

    def outcome(self, end: float, error: str) -> RequestOutcome:
        planned, ended_well = self.planned, not error
        landed = self.landed
        if landed is None and ended_well:
            landed = self.first_token  # nothing was transferred
        return RequestOutcome(
            index=planned.index,
            tenant=planned.tenant,
            arrival=self.request.arrival,
            prompt_tokens=planned.input_tokens,
            output_tokens=planned.output_tokens,
            cached_tokens=self.cached_tokens,
            prefill_worker=self.first.worker_id if self.first else "",
            decode_worker=self.rest.worker_id if self.rest else "",
            prefill_start=self.prefill_start,
            first_token=self.first_token,
            landed=landed,
            end=end,
            num_tokens=self.num_tokens,
            error=error,
            attempts=self.attempt.number if self.attempt else 1,
        )


def draw(timeline: Timeline, outcome: RequestOutcome) -> None:
    """Show the stages of a request that is over on a track of its own."""
    track, end = f"requests/{outcome.index}", outcome.end
    if end is None:
        return
    started, first, landed = outcome.prefill_start, outcome.first_token, outcome.landed
    if started is None or first is None:
        timeline.span(track, "queue", outcome.arrival, end, error=outcome.error)
        return
    timeline.span(track, "queue", outcome.arrival, started)
    timeline.span(track, "prefill", started, first, worker=outcome.prefill_worker, tokens=outcome.prompt_tokens)
    decode = first
    if landed is not None and landed > first:
        decode = min(landed, end)
        timeline.span(track, "transfer", first, decode)
    timeline.span(track, "decode", decode, end, worker=outcome.decode_worker, tokens=outcome.num_tokens, error=outcome.error)
