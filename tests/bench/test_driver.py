"""The driver: open and closed loops, and an end for every request."""

from __future__ import annotations

import asyncio
import time

import pytest
from baton.bench.driver import Exchange, RequestFailed, run_load
from baton.bench.records import LoadProgress
from baton.simulator.workload.planned import PlannedRequest

NEVER = 10**9


class Scripted:
    """A target in this process. Requests end once `release_at` have arrived; `full` is set when `full_at` have."""

    name = "scripted"

    def __init__(self, release_at: int = 0, full_at: int = 0) -> None:
        self.release, self.full = asyncio.Event(), asyncio.Event()
        self.running = self.peak = self.arrived = 0
        self._release_at, self._full_at = release_at, full_at

    def prepare(self, planned: PlannedRequest) -> bytes:
        return str(planned.index).encode()

    async def exchange(self, prepared: bytes, exchange: Exchange) -> None:
        self.arrived += 1
        self.running += 1
        self.peak = max(self.peak, self.running)
        if self.arrived >= self._release_at:
            self.release.set()
        if self.arrived >= self._full_at:
            self.full.set()
        try:
            await self.release.wait()
            exchange.chunk_times.append(time.monotonic())
            exchange.num_tokens = 1
        finally:
            self.running -= 1

    async def close(self) -> None: ...


def burst(count: int, gap: float = 0.0) -> list[PlannedRequest]:
    return [PlannedRequest(index, index * gap, 1, 1) for index in range(count)]


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    target = Scripted(release_at=20)
    result = await asyncio.wait_for(run_load(target, burst(20, 0.001)), 10)
    assert [record.index for record in result.records] == list(range(20))
    assert all(record.ok for record in result.records)
    assert not result.closed_loop


async def test_requests_leave_at_their_times_and_ttft_counts_from_there() -> None:
    result = await run_load(Scripted(), burst(5, 0.02))
    for number, record in enumerate(result.records):
        assert record.offered == number * 0.02
        assert record.lag is not None
        assert record.lag >= 0
        assert record.ttft == record.chunk_times[0] - record.offered
    assert result.duration == max(record.end or 0.0 for record in result.records) >= 0.08


async def test_a_client_that_is_late_pays_for_it_in_ttft() -> None:
    class Slow(Scripted):
        def prepare(self, planned: PlannedRequest) -> bytes:
            if planned.index == 1:
                time.sleep(0.05)  # the whole client stands still
            return b""

    second = (await run_load(Slow(), burst(2))).records[1]
    assert second.lag is not None
    assert second.lag >= 0.04
    assert second.ttft is not None
    assert second.ttft >= second.lag


async def test_a_closed_loop_keeps_its_limit_and_says_so() -> None:
    target = Scripted()
    result = await run_load(target, burst(30), concurrency=3)
    assert target.peak <= 3
    assert result.closed_loop
    assert sum(record.ok for record in result.records) == 30
    assert all(record.sent is not None and record.sent - record.offered < 5 for record in result.records)


async def test_a_closed_loop_holds_requests_back_until_a_place_is_free() -> None:
    target = Scripted(NEVER, full_at=2)
    running = asyncio.create_task(run_load(target, burst(4), concurrency=2))
    await target.full.wait()
    for _ in range(50):
        await asyncio.sleep(0)
    assert target.arrived == 2
    target.release.set()
    result = await running
    assert result.records[2].offered > result.records[1].offered, "TTFT of a held request starts when it may go"


async def test_stopping_keeps_what_was_offered_as_unfinished() -> None:
    target, stop = Scripted(NEVER, full_at=3), asyncio.Event()
    workload = [*burst(3), PlannedRequest(3, 3600.0, 1, 1)]
    running = asyncio.create_task(run_load(target, workload, stop=stop))
    await target.full.wait()
    stop.set()
    result = await asyncio.wait_for(running, 5)
    assert result.interrupted
    assert [record.error for record in result.records] == ["unfinished"] * 3
    assert (result.num_planned, target.running) == (4, 0)


async def test_cancelling_a_run_leaves_nothing_behind() -> None:
    target = Scripted(NEVER, full_at=3)
    running = asyncio.create_task(run_load(target, burst(3)))
    await target.full.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert target.running == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_failures_become_records_and_do_not_stop_a_closed_loop() -> None:
    class Failing(Scripted):
        async def exchange(self, prepared: bytes, exchange: Exchange) -> None:
            number = int(prepared)
            if number % 4 == 0:
                raise RequestFailed("http 500", "boom")
            if number % 4 == 1:
                raise ValueError("a bug")
            if number % 4 == 2:
                await asyncio.Event().wait()
            return await super().exchange(prepared, exchange)

    result = await asyncio.wait_for(run_load(Failing(), burst(8), concurrency=1, request_timeout=0.05), 10)
    assert [record.error for record in result.records] == ["http 500", "client defect", "timeout", ""] * 2
    assert "a bug" in result.records[1].message


async def test_a_workload_that_cannot_be_prepared_is_an_error_of_the_caller() -> None:
    class Broken(Scripted):
        def prepare(self, planned: PlannedRequest) -> bytes:
            raise TypeError("no such prompt")

    with pytest.raises(TypeError, match="no such prompt"):
        await run_load(Broken(), burst(2))


async def test_progress_ends_with_the_whole_truth() -> None:
    seen: list[LoadProgress] = []
    result = await run_load(Scripted(), burst(20, 0.02), seen.append)
    assert len(seen) >= 2
    last = seen[-1]
    assert (last.num_planned, last.num_offered, last.num_finished, last.num_failed, last.num_in_flight) == (20, 20, 20, 0, 0)
    assert last.num_tokens == 20
    assert last.ttft_p50 is not None
    assert [progress.num_offered for progress in seen] == sorted(progress.num_offered for progress in seen)
    assert result.loop_lags
