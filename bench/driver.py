"""Offer a workload to a server at its planned times and record what happens to each request.

Open loop: requests leave at their times whether or not earlier ones were answered, so a slow server cannot slow its
own load down. With a limit of concurrent requests the loop is closed, and the result says so. Failures of requests
become records, never exceptions. The driver shares its cores with the server on small machines: nothing here may cost
more than microseconds per token.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol

from ..core.errors import Unavailable
from ..simulator.workload.planned import PlannedRequest
from .metrics import percentile
from .records import LoadProgress, LoadResult, RequestRecord

OnProgress = Callable[[LoadProgress], None]
REPORT_INTERVAL = 0.25
LAG_INTERVAL = 0.05
WARM_UP_INDEX = 1 << 31
"""Prompts are keyed by index; these are no measured request's."""
RECENT = 100
"""Requests whose TTFT the live median is over."""


class RequestFailed(Exception):
    """One request went wrong. `kind` is short and countable: "http 429", "grpc UNAVAILABLE", "disconnected"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


@dataclass(slots=True)
class Exchange:
    """What a target notes down while it serves one request. Times are `time.monotonic()`."""

    chunk_times: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    num_tokens: int = 0
    prompt_tokens: int | None = None
    finish_reason: str = ""


class Target(Protocol):
    """A server under load."""

    @property
    def name(self) -> str:
        """For people: the server's address and the model."""
        ...

    def prepare(self, planned: PlannedRequest) -> bytes:
        """The request in wire form. Called before its time comes, so that making prompts does not make it late."""
        ...

    async def exchange(self, prepared: bytes, exchange: Exchange) -> None:
        """Send it and note every chunk in `exchange`. Raises RequestFailed; leaves nothing open when cancelled."""
        ...

    async def close(self) -> None: ...


async def run_load(
    target: Target,
    workload: Sequence[PlannedRequest],
    on_progress: OnProgress | None = None,
    *,
    concurrency: int | None = None,
    request_timeout: float = 600.0,
    stop: asyncio.Event | None = None,
) -> LoadResult:
    """Offer all of `workload` and wait for every answer.

    concurrency      closed loop: at most so many requests at once
    request_timeout  seconds after its sending at which a request is given up (and counts as failed)
    stop             when set, nothing more is offered and what runs is given up as "unfinished"
    """
    run = _Run(target, workload, concurrency, request_timeout)
    observer = asyncio.create_task(run.observe(on_progress))
    offering = asyncio.create_task(run.offer())
    stopping = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait({offering, stopping}, return_when=asyncio.FIRST_COMPLETED)
        interrupted = not offering.done()
    finally:
        for task in (stopping, offering, observer):
            task.cancel()
        await run.give_up()
        await asyncio.gather(stopping, observer, return_exceptions=True)
    with contextlib.suppress(asyncio.CancelledError):
        await offering  # a defect of a target's `prepare` surfaces here
    if on_progress is not None:
        on_progress(run.progress())
    return run.result(interrupted)


async def warm_up(target: Target, like: PlannedRequest, num_requests: int = 1, request_timeout: float = 600.0) -> None:
    """Send requests like `like`, one after another, that no result holds. Raises Unavailable when one fails: so would all."""
    for number in range(num_requests):
        planned = replace(like, at=0.0, index=WARM_UP_INDEX + number, block_ids=())
        result = await run_load(target, [planned], request_timeout=request_timeout)
        record = result.records[0]
        if not record.ok:
            reason = f"{record.error}: {record.message}" if record.error else "it ended without a token"
            raise Unavailable(
                f"{target.name}: a first request of {like.input_tokens} tokens in, {like.output_tokens} out failed: {reason}"
            )


class _Run:
    """The state of one run."""

    def __init__(self, target: Target, workload: Sequence[PlannedRequest], concurrency: int | None, request_timeout: float):
        self._target = target
        self._workload = workload
        self._places = asyncio.Semaphore(concurrency) if concurrency else None
        self._request_timeout = request_timeout
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._start = time.monotonic()
        self._records: dict[int, RequestRecord] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_offered = self._num_finished = self._num_failed = self._num_tokens = 0
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._loop_lags: list[float] = []

    async def offer(self) -> None:
        """Send everything at its time; returns when all have ended."""
        for planned in self._workload:
            prepared = self._target.prepare(planned)
            offered = await self._its_turn(planned)
            self._num_offered += 1
            task = asyncio.create_task(self._one(planned, prepared, offered))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _its_turn(self, planned: PlannedRequest) -> float:
        """Wait until the request is due; the moment (since the start) from which its TTFT counts."""
        if self._places is not None:
            await self._places.acquire()
            free_at = time.monotonic() - self._start
        else:
            free_at = 0.0
        wait = self._start + planned.at - time.monotonic()
        # Zero, too, lets the loop read answers between requests that are all due at once.
        await asyncio.sleep(max(wait, 0.0))
        return max(planned.at, free_at)

    async def _one(self, planned: PlannedRequest, prepared: bytes, offered: float) -> None:
        exchange = Exchange()
        sent = time.monotonic() - self._start
        kind = message = ""
        end: float | None = None
        try:
            async with asyncio.timeout(self._request_timeout):
                await self._target.exchange(prepared, exchange)
        except RequestFailed as error:
            kind, message = error.kind, error.message
        except TimeoutError:
            kind, message = "timeout", f"no end within {self._request_timeout:g} s"
        except asyncio.CancelledError:
            kind, message = "unfinished", "the run was stopped before it ended"
        except OSError as error:
            kind, message = "connection", str(error) or type(error).__name__
        except Exception as error:  # a defect of the client must not cost the records of all other requests
            kind, message = "client defect", repr(error)
        if kind != "unfinished":
            end = time.monotonic() - self._start
        self._keep(
            RequestRecord(
                index=planned.index,
                input_tokens=planned.input_tokens,
                output_tokens=planned.output_tokens,
                offered=offered,
                sent=sent,
                chunk_times=tuple(moment - self._start for moment in exchange.chunk_times),
                chunk_tokens=tuple(exchange.chunk_tokens),
                num_tokens=exchange.num_tokens,
                prompt_tokens=exchange.prompt_tokens,
                end=end,
                finish_reason=exchange.finish_reason,
                error=kind,
                message=message,
            )
        )

    def _keep(self, record: RequestRecord) -> None:
        self._records[record.index] = record
        self._num_finished += record.ok
        self._num_failed += not record.ok
        self._num_tokens += record.num_tokens
        if record.ttft is not None:
            self._recent.append(record.ttft)
        if self._places is not None:
            self._places.release()

    async def observe(self, on_progress: OnProgress | None) -> None:
        """Report now and then, and measure how late this process's own timers are."""
        reported = self._start
        while True:
            due = time.monotonic() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            now = time.monotonic()
            self._loop_lags.append(max(0.0, now - due))
            if on_progress is not None and now - reported >= REPORT_INTERVAL:
                reported = now
                on_progress(self.progress())

    async def give_up(self) -> None:
        """End what still runs; every offered request has a record afterwards."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(set(self._tasks))

    def progress(self) -> LoadProgress:
        return LoadProgress(
            elapsed=time.monotonic() - self._start,
            num_planned=len(self._workload),
            num_offered=self._num_offered,
            num_finished=self._num_finished,
            num_failed=self._num_failed,
            num_tokens=self._num_tokens,
            ttft_p50=percentile(sorted(self._recent), 0.5) if self._recent else None,
        )

    def result(self, interrupted: bool) -> LoadResult:
        records = tuple(self._records[index] for index in sorted(self._records))
        ends = [record.offered if record.end is None else record.end for record in records]
        duration = time.monotonic() - self._start if interrupted else max(ends, default=0.0)
        return LoadResult(
            target=self._target.name,
            started_at=self._started_at,
            duration=duration,
            num_planned=len(self._workload),
            records=records,
            loop_lags=tuple(self._loop_lags),
            closed_loop=self._places is not None,
            interrupted=interrupted,
        )
