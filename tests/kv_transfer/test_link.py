"""The budget of bytes in flight, and work that must not be left half done."""

from __future__ import annotations

import asyncio

import pytest
from baton.core.errors import PeerLost
from baton.core.kv import Endpoint, KVLayout
from baton.core.request import WorkerRef
from baton.kv_transfer.link import Budget, PeerLinks, to_the_end

LAYOUT = KVLayout(1, 1, 8, 16, "float32")


async def hold(budget: Budget, num_bytes: int, log: list[int], release: asyncio.Event) -> None:
    async with budget.take(num_bytes):
        log.append(num_bytes)
        await release.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class TestBudget:
    async def test_first_come_first_served(self):
        budget, log = Budget(10), []
        releases = [asyncio.Event() for _ in range(4)]
        tasks = [asyncio.create_task(hold(budget, n, log, e)) for n, e in zip((6, 7, 3, 1), releases, strict=True)]
        await settle()
        assert log == [6], "3 would fit, but 7 came first"
        releases[0].set()
        await settle()
        assert log == [6, 7, 3]
        assert budget.num_used == 10
        for release in releases:
            release.set()
        await asyncio.gather(*tasks)
        assert budget.num_used == 0

    async def test_something_larger_than_the_limit_goes_alone(self):
        budget, log, release = Budget(10), [], asyncio.Event()
        tasks = [asyncio.create_task(hold(budget, n, log, release)) for n in (1, 50, 2)]
        await settle()
        assert log == [1]
        release.set()
        await asyncio.gather(*tasks)
        assert log == [1, 50, 2]

    async def test_who_is_cancelled_while_waiting_leaves_the_queue(self):
        budget, log, release = Budget(10), [], asyncio.Event()
        first = asyncio.create_task(hold(budget, 6, log, release))
        second = asyncio.create_task(hold(budget, 7, log, release))
        third = asyncio.create_task(hold(budget, 4, log, release))
        await settle()
        second.cancel()
        await settle()
        assert log == [6, 4]
        release.set()
        await asyncio.gather(first, third)
        assert budget.num_used == 0

    async def test_who_is_cancelled_when_its_turn_came_gives_it_back(self):
        budget, log, release = Budget(10), [], asyncio.Event()
        first = asyncio.create_task(hold(budget, 6, log, release))
        second = asyncio.create_task(hold(budget, 7, log, release))
        await settle()
        release.set()
        await first
        second.cancel()  # its turn has come, but it has not run yet
        await asyncio.gather(second, return_exceptions=True)
        assert budget.num_used == 0


class TestToTheEnd:
    async def test_a_cancelled_caller_still_waits(self):
        work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        caller = asyncio.create_task(to_the_end(work))
        await settle()
        caller.cancel()
        await settle()
        assert not caller.done()
        work.set_result(3)
        with pytest.raises(asyncio.CancelledError):
            await caller

    async def test_results_and_errors_come_through(self):
        work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        work.set_exception(PeerLost("gone"))
        with pytest.raises(PeerLost, match="gone"):
            await to_the_end(work)

    async def test_patience_ends(self):
        work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        with pytest.raises(TimeoutError):
            await to_the_end(work, timeout=0.01)
        assert not work.done()


async def test_links_that_nobody_uses_are_forgotten():
    links = PeerLinks(patience=5.0)
    for epoch in range(5):
        endpoint = Endpoint(WorkerRef("decode-0", epoch), "127.0.0.1:1", "", "", 1, LAYOUT)
        with pytest.raises(PeerLost, match="cannot be reached"):
            async with links.to(endpoint).connected():
                pass
    assert len(links._links) == 1
    await links.close()
