"""The loop with a real scheduler and an executor that the test holds in its hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager

from baton.core.clock import VirtualClock
from baton.core.request import Attempt, SamplingParams, SequenceSpec
from baton.core.step import RowOutput, SequenceEvent, StepOutput, StepPlan, TokenEvent
from baton.engine.blocks import BlockPool
from baton.engine.loop import PLAN_AHEAD, EngineLoop
from baton.engine.scheduler import Scheduler, SchedulerConfig
from baton.engine.timing import StepTimes
from baton.policy.ordering import ORDERING


class Held:
    """An executor whose steps end when the test says so."""

    def __init__(self) -> None:
        self.submitted: asyncio.Queue[tuple[StepPlan, Future[StepOutput]]] = asyncio.Queue()

    def submit(self, plan: StepPlan) -> Future[StepOutput]:
        future: Future[StepOutput] = Future()
        self.submitted.put_nowait((plan, future))
        return future

    def forget(self, attempt: Attempt) -> None: ...

    def close(self) -> None: ...

    async def next_plan(self) -> tuple[StepPlan, Future[StepOutput]]:
        async with asyncio.timeout(5):
            return await self.submitted.get()


class Bench:
    def __init__(self) -> None:
        self.executor, self.times, self.clock = Held(), StepTimes(), VirtualClock()
        self.blocks = BlockPool(16, 4)
        self.scheduler = Scheduler(self.blocks, SchedulerConfig(64, 8, 64), ORDERING["fcfs"])
        self.tokens: list[int] = []
        self.failed: list[StepPlan] = []
        self.loop = EngineLoop(
            self.scheduler, self.executor, self.times, self.clock, self._on_events, lambda plan, _: self.failed.append(plan)
        )

    def _on_events(self, step: int, events: list[SequenceEvent]) -> None:
        self.tokens += [token for event in events if isinstance(event, TokenEvent) for token in event.tokens]

    def add(self, max_tokens: int = 4, name: str = "r") -> None:
        self.scheduler.add(SequenceSpec(Attempt(name, 0), (1, 2, 3), SamplingParams(max_tokens=max_tokens)), 0.0)
        self.loop.wake()


def done(plan: StepPlan, token: int, seconds: float = 0.0) -> StepOutput:
    return StepOutput(plan.step, tuple(RowOutput((token,)) for _ in plan.rows), seconds)


@asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[None]:
    task = asyncio.create_task(bench.loop.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_it_sleeps_until_woken_and_commits_in_order() -> None:
    bench = Bench()
    async with running(bench):
        await asyncio.sleep(0)
        assert bench.executor.submitted.empty()
        bench.add(max_tokens=3)
        for token in (7, 8, 9):
            plan, future = await bench.executor.next_plan()
            assert bench.loop.step == plan.step
            assert bench.loop.in_step
            future.set_result(done(plan, token))
        await asyncio.sleep(0.01)
        assert bench.tokens == [7, 8, 9]
        assert not bench.loop.in_step
        assert not bench.scheduler.has_work


async def test_the_next_step_is_planned_shortly_before_the_end_of_the_last() -> None:
    for seconds in (PLAN_AHEAD / 2, 0.02):
        bench = Bench()
        async with running(bench):
            bench.add(max_tokens=8)
            for token in (5, 6):  # a prefill and a decode step teach what to expect
                plan, future = await bench.executor.next_plan()
                await asyncio.sleep(0.03)
                assert bench.executor.submitted.empty(), "planned ahead of a step whose length nobody knows"
                future.set_result(done(plan, token, seconds))
            first, _ = await bench.executor.next_plan()
            if seconds > PLAN_AHEAD:
                await asyncio.sleep(0.03)
                assert bench.executor.submitted.empty(), "planned before the step's expected end"
                bench.clock.advance(seconds - PLAN_AHEAD)
            second, _ = await bench.executor.next_plan()
            assert second.step == first.step + 1
            assert second.rows[0].pending
            bench.clock.advance(1.0)
            await asyncio.sleep(0.03)
            assert bench.executor.submitted.empty(), "more than two steps in flight"


async def test_a_failed_step_gives_up_its_sequences_and_the_loop_goes_on() -> None:
    bench = Bench()
    async with running(bench):
        bench.add(name="bad")
        plan, future = await bench.executor.next_plan()
        future.set_exception(RuntimeError("device is on fire"))
        await asyncio.sleep(0.01)
        assert bench.failed == [plan]
        bench.add(max_tokens=1, name="good")
        plan, future = await bench.executor.next_plan()
        future.set_result(done(plan, 3))
        await asyncio.sleep(0.01)
        assert bench.tokens == [3]
    assert bench.blocks.num_free == bench.blocks.num_blocks
