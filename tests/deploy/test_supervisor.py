"""Restarts and deaths with a launcher that exists only in memory."""

from __future__ import annotations

import asyncio

import pytest
from baton.core.clock import VirtualClock
from baton.core.errors import Unavailable
from baton.core.request import WorkerRef
from baton.deploy.controller import Controller
from baton.deploy.launcher import Exit, MemberSpec
from baton.deploy.supervisor import Backoff
from baton.proto import worker_pb2 as pb

SPEC = MemberSpec("decode-0", "test", "decode", "nothing", "{}", "/nowhere")


class Handle:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.end: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()

    async def exited(self) -> Exit:
        return await asyncio.shield(self.end)


class MemoryLauncher:
    """Starts handles; the test decides when and how they end."""

    def __init__(self) -> None:
        self.started: asyncio.Queue[Handle] = asyncio.Queue()
        self.left_over: Handle | None = None
        self.confirms = True
        self.refuses = 0
        self._pid = 100

    async def start(self, spec: MemberSpec) -> Handle:
        if self.refuses:
            self.refuses -= 1
            raise Unavailable("no room")
        self._pid += 1
        handle = Handle(self._pid)
        self.started.put_nowait(handle)
        return handle

    async def attach(self, spec: MemberSpec) -> Handle | None:
        return self.left_over

    async def terminate(self, handle: Handle) -> None:
        handle.end.set_result(Exit("asked", confirmed=True))

    async def kill(self, handle: Handle) -> bool:
        handle.end.set_result(Exit("killed", self.confirms))
        return self.confirms

    async def close(self) -> None:
        return


@pytest.fixture
def launcher() -> MemoryLauncher:
    return MemoryLauncher()


@pytest.fixture
async def controller(launcher: MemoryLauncher):
    controller = Controller("test", [SPEC], launcher, Backoff(first=0.0, max_attempts=3))
    yield controller
    await controller.shutdown()


def _registration(handle: Handle, epoch: int) -> pb.Registration:
    return pb.Registration(worker=pb.WorkerId(worker_id="decode-0", epoch=epoch), role="decode", pid=handle.pid)


async def test_an_unconfirmed_death_is_never_called_one(controller, launcher):
    controller.start()
    first = await launcher.started.get()
    assert controller.register(_registration(first, 7)) == ""
    launcher.confirms = False
    assert not await controller.kill(WorkerRef("decode-0", 7), "hangs")
    second = await launcher.started.get()  # it is replaced all the same
    assert controller.register(_registration(second, 8)) == ""
    assert not controller.roster().dead
    assert not await controller.kill(WorkerRef("decode-0", 7), "again")
    assert second.end.done() is False
    assert "epoch 7 of decode-0 is over" in controller.register(_registration(first, 7))


async def test_a_process_of_an_earlier_controller_is_kept_and_can_be_killed(controller, launcher):
    left_over = launcher.left_over = Handle(55)
    await controller.attach()
    controller.start()
    await asyncio.sleep(0)
    assert launcher.started.empty()
    # It has not registered with this controller yet, so any epoch may be its own.
    assert await controller.kill(WorkerRef("decode-0", 3), "hangs")
    assert left_over.end.done()
    fresh = await launcher.started.get()
    # Nobody can know the epoch of the fresh one: 3 was the one that is gone, and the fresh one lives on.
    assert await controller.kill(WorkerRef("decode-0", 3), "again")
    assert not fresh.end.done()


async def test_an_epoch_that_is_not_the_present_one_is_dead(controller, launcher):
    controller.start()
    handle = await launcher.started.get()
    controller.register(_registration(handle, 7))
    assert await controller.kill(WorkerRef("decode-0", 6), "from before this controller")
    assert not handle.end.done()


async def test_a_launcher_that_refuses_is_asked_again_but_not_for_ever(controller, launcher):
    launcher.refuses = 2
    controller.start()
    await launcher.started.get()
    assert controller.state().members[0].restarts == 2


async def test_a_member_that_never_becomes_ready_fails(controller, launcher):
    launcher.refuses = 3
    states = []
    watching = asyncio.ensure_future(_collect(controller, states))
    controller.start()
    async with asyncio.timeout(5):
        while controller.state().members[0].state != "failed":
            await asyncio.sleep(0)
    assert controller.state().members[0].last_error == "no room"
    watching.cancel()


async def _collect(controller: Controller, rosters: list[pb.Roster]) -> None:
    async for roster in controller.rosters():
        rosters.append(roster)


async def test_lives_after_readiness_never_count_as_failures_to_start(controller, launcher):
    controller.start()
    for epoch in range(1, 8):  # more than max_attempts
        handle = await launcher.started.get()
        assert controller.register(_registration(handle, epoch)) == ""
        handle.end.set_result(Exit("crashed", confirmed=True))
    await launcher.started.get()
    assert [ref.epoch for ref in controller.roster().dead] == [1, 2, 3, 4, 5, 6, 7]


async def test_pauses_grow_until_a_member_has_lived_long(launcher):
    pauses: list[int] = []

    class Recorded(Backoff):
        def pause(self, num_short_lives: int) -> float:
            pauses.append(num_short_lives)
            return 0.0

    clock = VirtualClock()
    controller = Controller("test", [SPEC], launcher, Recorded(steady=30.0), clock)
    controller.start()
    for epoch, lived in enumerate((1.0, 1.0, 1.0, 31.0, 1.0), start=1):
        handle = await launcher.started.get()
        controller.register(_registration(handle, epoch))
        clock.advance(lived)
        handle.end.set_result(Exit("crashed", confirmed=True))
    await launcher.started.get()
    assert pauses == [1, 2, 3, 1, 2]
    await controller.shutdown()
