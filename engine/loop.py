"""The engine's loop: plan, run, commit.

All state lives on the event loop's thread; only `Executor.submit` works elsewhere. The loop sleeps
when there is nothing to plan and is woken by whoever adds work.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable

from ..core.clock import Clock
from ..core.step import SequenceEvent, StepOutput, StepPlan
from .executor import Executor
from .scheduler import Scheduler
from .step_log import StepLog
from .timing import StepTimes

MAX_FAILURES = 10  # steps that fail in a row before the device counts as broken; more than one bad request gets attempts
# Seconds before the expected end of a step at which the next one is planned, so that the device does not wait for the
# host. Not earlier: what arrives after a plan was made waits a step longer.
PLAN_AHEAD = 0.003

logger = logging.getLogger("baton.engine")


class EngineLoop:
    """Drives one scheduler and one executor.

    times      learns from every committed step; may come with what the warm-up measured
    log        remembers some of them
    on_events  called on the event loop with the number of each committed step and what it made, in order
    on_failed  called when the executor raised; the scheduler has already given up the plan's sequences
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        times: StepTimes,
        clock: Clock,
        on_events: Callable[[int, list[SequenceEvent]], None],
        on_failed: Callable[[StepPlan, Exception], None],
        log: StepLog | None = None,
    ) -> None:
        self.times = times
        self.log = log or StepLog()
        self._scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self._on_events = on_events
        self._on_failed = on_failed
        self._in_flight: deque[tuple[StepPlan, asyncio.Future[StepOutput]]] = deque()
        self._began = 0.0  # when the oldest step in flight began, as far as is known here
        self._wake = asyncio.Event()
        self._last_step = 0
        self._num_failures = 0
        self._failed_through = 0  # plans up to this step were made before the last failure was known

    @property
    def step(self) -> int:
        """Number of the last step started."""
        return self._last_step

    @property
    def in_step(self) -> bool:
        return bool(self._in_flight)

    @property
    def predicted_step(self) -> float:
        """Seconds that the running step (or the next one) is expected to take."""
        if self._in_flight:
            return self.times.predict(self._in_flight[0][0])
        return max(self.times.decode_step, self.times.last_step)

    def wake(self) -> None:
        """New work may exist."""
        self._wake.set()

    async def run(self) -> None:
        """Run until cancelled. Raises what the executor raised when it fails step after step: a new process may do better."""
        while True:
            if self._submit_next():
                continue
            if self._in_flight:
                if await self._oldest_ended():
                    await self._commit_oldest()
                continue
            self._wake.clear()
            await self._wake.wait()

    def _submit_next(self) -> bool:
        if self._until_due() > 0.0:
            return False
        plan = self._scheduler.plan(self._clock.now())
        events = self._scheduler.take_events()
        if events:
            self._on_events(self._last_step, events)
        if plan is None:
            return bool(events)  # what was preempted has left blocks for others
        self._last_step = plan.step
        if not self._in_flight:
            self._began = self._clock.now()
        self._in_flight.append((plan, asyncio.wrap_future(self._executor.submit(plan))))
        return True

    def _until_due(self) -> float:
        """Seconds until the next plan is due, 0 or less if it is; infinite while two are in flight."""
        if not self._in_flight:
            return 0.0
        if len(self._in_flight) > 1:
            return math.inf
        return self._began + self.times.predict(self._in_flight[0][0]) - PLAN_AHEAD - self._clock.now()

    async def _oldest_ended(self) -> bool:
        """Wait for the end of the oldest step in flight, but not longer than until the next plan is due."""
        left = self._until_due()  # if it is due and yet nothing was planned, the step's end is all there is to wait for
        timeout = left if 0.0 < left < math.inf else None
        done, _ = await asyncio.wait([self._in_flight[0][1]], timeout=timeout)
        return bool(done)

    async def _commit_oldest(self) -> None:
        plan, future = self._in_flight[0]
        try:
            output = await future
        except Exception as error:
            self._advance()
            logger.exception("step %d failed", plan.step)
            self._scheduler.fail(plan)
            self._on_failed(plan, error)
            if plan.step > self._failed_through:  # else it may have failed because the plan before it did
                self._num_failures += 1
            self._failed_through = self._last_step
            if self._num_failures >= MAX_FAILURES:
                raise
            return
        self._num_failures = 0
        period = self._clock.now() - self._began
        self._advance()
        self.times.observe(plan, output.seconds)
        self.log.add(plan, output.seconds, period)
        self._on_events(plan.step, self._scheduler.commit(plan, output, self._clock.now()))

    def _advance(self) -> None:
        """The oldest step is over, and the one behind it begins."""
        self._in_flight.popleft()
        self._began = self._clock.now()
