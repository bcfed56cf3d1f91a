"""The roster's consequences, without sockets: what is told to whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from baton.core.clock import VirtualClock
from baton.core.request import WorkerRef
from baton.proto import worker_pb2 as pb
from baton.router.events import Event, WorkerConfirmedDead
from baton.router.membership import Membership

ONE, GONE = WorkerRef("decode-0", 1), WorkerRef("prefill-0", 7)


class Owner:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.reset: list[WorkerRef] = []

    def post(self, event: Event) -> None:
        self.events.append(event)

    def worker_message(self, worker: WorkerRef, message: pb.WorkerMessage) -> None: ...

    def stream_reset(self, worker: WorkerRef, attempts: tuple[object, ...]) -> None:
        self.reset.append(worker)

    def worker_lost(self, worker: WorkerRef, place: object) -> None: ...

    def membership_changed(self) -> None: ...

    def routers_changed(self, routers: object) -> None: ...


class Link:
    def __init__(self) -> None:
        self.killed: list[WorkerRef] = []

    async def kill(self, worker: WorkerRef, reason: str) -> None:
        self.killed.append(worker)


@pytest.fixture
async def parts() -> AsyncIterator[tuple[Membership, Owner, Link]]:
    owner, link = Owner(), Link()
    membership = Membership("r0", 1, VirtualClock(), owner, link)  # type: ignore[arg-type]
    yield membership, owner, link
    await membership.close()


def roster(dead: list[WorkerRef]) -> pb.Roster:
    worker = pb.Registration(
        worker=pb.WorkerId(worker_id=ONE.worker_id, epoch=ONE.epoch), role="decode", address="127.0.0.1:1", pid=1
    )
    return pb.Roster(workers=[worker], dead=[pb.WorkerId(worker_id=ref.worker_id, epoch=ref.epoch) for ref in dead])


async def test_a_death_that_fell_into_a_broken_stream_is_told_again(parts: tuple[Membership, Owner, Link]) -> None:
    membership, owner, _ = parts
    membership.update_roster(roster([GONE]))
    assert any(isinstance(event, WorkerConfirmedDead) for event in owner.events)
    client = membership.members[0].client
    told: list[pb.RouterMessage] = []
    client.send = told.append  # type: ignore[method-assign]
    membership.connected(client, pb.WorkerHello(block_size=16, total_blocks=8), again=False)
    assert told == []  # the lifecycle tells a worker that joins
    membership.connected(client, pb.WorkerHello(block_size=16, total_blocks=8), again=True)
    assert [(m.gone.worker.worker_id, m.gone.worker.epoch) for m in told] == [(GONE.worker_id, GONE.epoch)]


async def test_a_worker_that_never_joined_is_ended_when_it_is_given_up(parts: tuple[Membership, Owner, Link]) -> None:
    membership, _, link = parts
    membership.update_roster(roster([]))
    client = membership.members[0].client
    membership.connected(client, pb.WorkerHello(block_size=16, total_blocks=8), again=False)
    membership.lost(client, "no heartbeat")
    while not link.killed:
        await asyncio.sleep(0)
    assert link.killed == [ONE]
    assert membership.members == []
