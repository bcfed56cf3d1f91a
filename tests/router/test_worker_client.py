"""The client of one worker: hello, reconnecting, giving up."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from baton.core.request import WorkerRef
from baton.core.view import Role
from baton.proto import worker_pb2 as pb
from baton.router.worker_client import MAX_MORE, WorkerClient
from baton.tests.router.fake_cluster import FakeWorker, running_cluster


@dataclass
class Recorder:
    """A listener that lets a test wait for what it hears."""

    heard: list[tuple[str, object]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def _note(self, kind: str, what: object) -> None:
        self.heard.append((kind, what))
        self.changed.set()

    def connected(self, client: WorkerClient, hello: pb.WorkerHello, again: bool) -> None:
        self._note("connected", again)

    def received(self, client: WorkerClient, message: pb.WorkerMessage) -> None:
        self._note("received", message)

    def heartbeat(self, client: WorkerClient, message: pb.Heartbeat) -> None:
        self._note("heartbeat", message)

    def disconnected(self, client: WorkerClient, reason: str) -> None:
        self._note("disconnected", reason)

    def lost(self, client: WorkerClient, reason: str) -> None:
        self._note("lost", reason)

    async def until(self, kind: str, count: int = 1) -> object:
        while len(found := [what for heard, what in self.heard if heard == kind]) < count:
            self.changed.clear()
            await self.changed.wait()
        return found[-1]

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.heard if kind != "heartbeat"]


def client_of(worker: FakeWorker, listener: Recorder, epoch: int | None = None) -> WorkerClient:
    ref = WorkerRef(worker.worker_id, worker.epoch if epoch is None else epoch)
    client = WorkerClient(ref, worker.address, "r0", 1, listener)
    client.start()
    return client


async def test_talks_both_ways_and_hears_heartbeats() -> None:
    async with running_cluster(Role.DECODE) as cluster:
        worker, listener = cluster.workers["d0"], Recorder()
        client = client_of(worker, listener)
        assert await listener.until("connected") is False
        await listener.until("heartbeat", 2)
        spec = pb.SequenceSpec(attempt=pb.AttemptId(request_id="r", number=1), prompt=[1, 2])
        client.send(pb.RouterMessage(reserve=pb.Reserve(sequence=spec)))
        await client.flush()
        message = await listener.until("received")
        assert isinstance(message, pb.WorkerMessage)
        assert message.granted.attempt == spec.attempt
        await client.close()
        assert "lost" not in listener.kinds()


async def test_commands_of_one_moment_travel_together_and_in_order() -> None:
    async with running_cluster(Role.DECODE) as cluster:
        worker, listener = cluster.workers["d0"], Recorder()
        client = client_of(worker, listener)
        await listener.until("connected")
        count = MAX_MORE + 3
        for number in range(count):
            client.send(pb.RouterMessage(grant=pb.Grant(attempt=pb.AttemptId(request_id="r", number=number))))
        await client.flush()
        await worker.until_received("grant", count)
        numbers = [message.grant.attempt.number for message in worker.received if message.WhichOneof("body") == "grant"]
        assert numbers == list(range(count))
        assert worker.batches == [MAX_MORE + 1, 2]
        await client.close()


async def test_what_a_worker_says_at_once_is_heard_in_order() -> None:
    async with running_cluster(Role.DECODE) as cluster:
        worker, listener = cluster.workers["d0"], Recorder()
        client = client_of(worker, listener)
        await listener.until("connected")
        adopted = [pb.WorkerMessage(adopted=pb.Adopted(attempt=pb.AttemptId(request_id="r", number=n))) for n in range(3)]
        adopted[0].more.extend(adopted[1:])
        worker.sessions[0].put_nowait(adopted[0])
        await listener.until("received", 3)
        heard = [message for kind, message in listener.heard if kind == "received"]
        assert [message.adopted.attempt.number for message in heard if isinstance(message, pb.WorkerMessage)] == [0, 1, 2]
        await client.close()


async def test_broken_stream_comes_back_and_says_so() -> None:
    async with running_cluster(Role.DECODE) as cluster:
        worker, listener = cluster.workers["d0"], Recorder()
        client = client_of(worker, listener)
        await listener.until("connected")
        await worker.break_streams()
        assert await listener.until("connected", 2) is True
        assert listener.kinds() == ["connected", "disconnected", "connected"]
        await client.close()


async def test_refused_connection_means_lost_at_once() -> None:
    async with running_cluster(Role.DECODE) as cluster:
        worker, listener = cluster.workers["d0"], Recorder()
        client = client_of(worker, listener)
        await listener.until("connected")
        await worker.die()
        assert "refused" in str(await listener.until("lost")).lower()
        assert not client.up
        await client.close()


async def test_other_epoch_is_refused() -> None:
    async with running_cluster(Role.DECODE) as cluster:
        listener = Recorder()
        client = client_of(cluster.workers["d0"], listener, epoch=5)
        assert "FAILED_PRECONDITION" in str(await listener.until("lost"))
        assert listener.kinds() == ["lost"]
        await client.close()


async def test_worker_that_is_not_there_yet_is_dialled_again() -> None:
    async with running_cluster(Role.DECODE) as cluster:
        worker, listener = cluster.workers["d0"], Recorder()
        port = int(worker.address.rpartition(":")[2])
        await worker.die()
        client = client_of(worker, listener)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await listener.until("connected")
        await worker.start(port)
        await listener.until("connected")
        assert listener.kinds() == ["connected"]
        await client.close()
