"""One conformance suite for every transport."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
from baton.core.errors import PeerLost, TransferDamaged, TransferRefused
from baton.core.kv import Endpoint
from baton.core.request import WorkerRef
from baton.kv_transfer.cuda_ipc import CudaIpcTransport
from baton.kv_transfer.grpc_stream import GrpcTransport
from baton.kv_transfer.link import PeerLinks
from baton.kv_transfer.local import LocalPeer, LocalTransport
from baton.kv_transfer.registry import host_identity
from baton.kv_transfer.shm import ShmTransport
from baton.kv_transfer.torch_dist import DeviceEnd, HostEnd, TorchDistTransport
from baton.kv_transfer.transport import Header, Note, Transport
from baton.tests.kv_transfer.conftest import LAYOUT, NUM_BLOCKS, SOURCE, SharedMappings, as_device_pool, handle_on

ON_TWIN = ("cuda_ipc", "grpc_between_devices", "shm_from_device", "torch_dist_between_devices")  # of a device
WIRED = ("shm", "grpc", "torch_dist", *ON_TWIN)
NAMES = ("local", *WIRED)

Make = Callable[..., Transport]


@pytest.fixture
async def make(source) -> AsyncIterator[Make]:
    """Makes transports and closes them after the test."""
    made: list[Transport] = []

    def build(name, targets=(), checksum=True, tamper=None, patience=5.0, max_in_flight=64 << 20) -> Transport:
        links = PeerLinks(patience, max_in_flight)
        transport: Transport
        if name == "local":
            peers = {target.endpoint.worker: LocalPeer(target.memory, target.sink) for target in targets}
            transport = LocalTransport(source.memory, peers, checksum, tamper)
        elif name.startswith("shm"):
            memory = as_device_pool(source.memory) if name == "shm_from_device" else source.memory
            transport = ShmTransport(memory, host_identity(), links, checksum, tamper)
        elif name == "cuda_ipc":
            packed = None if tamper is None else lambda header, tensor: tamper(header, tensor.numpy().data)
            pool = as_device_pool(source.memory)
            transport = CudaIpcTransport(pool, host_identity(), links, SharedMappings(), checksum, packed)
        elif name.startswith("torch_dist"):
            on_device = name == "torch_dist_between_devices"
            own = Endpoint(
                SOURCE, "127.0.0.1:1", host_identity(), "", NUM_BLOCKS, LAYOUT, handle_on("here") if on_device else b""
            )
            end = DeviceEnd(as_device_pool(source.memory)) if on_device else HostEnd(source.memory)
            changed = None if tamper is None else lambda header, tensor: tamper(header, tensor.numpy().data)
            transport = TorchDistTransport(end, own, links, patience, checksum, changed)
        else:
            memory = as_device_pool(source.memory) if name == "grpc_between_devices" else source.memory
            transport = GrpcTransport(memory, links, checksum, tamper)
        made.append(transport)
        return transport

    yield build
    for transport in made:
        await transport.close()


def flip(_: Header, view: memoryview) -> None:
    view[len(view) // 2] ^= 1


@pytest.mark.parametrize("name", NAMES)
class TestBytes:
    async def test_permuted_blocks_arrive_exactly(self, name, make, source, target):
        transport = make(name, [target])
        mine = tuple(random.Random(2).sample(range(64), 40))
        theirs = tuple(random.Random(3).sample(range(64), 40))
        ticket = target.ticket("r", theirs)
        before = [target.block(index) for index in range(64)]
        stats = await source.push(transport, ticket, mine)
        for ours, its in zip(mine, theirs, strict=True):
            assert target.block(its) == source.block(ours)
        for index in set(range(64)) - set(theirs):
            assert target.block(index) == before[index]
        assert [h.note for h in target.sink.landings][-1] == Note(0, 40, last=True, first_token=42)
        assert stats.num_bytes == 40 * 131072
        assert name.startswith(stats.transport)
        assert stats.seconds >= stats.copy_seconds > 0

    async def test_chunks_land_one_by_one(self, name, make, source, target):
        transport = make(name, [target])
        mine, theirs = (5, 6, 7, 1), (9, 3, 4, 5)
        ticket = target.ticket("r", theirs, num_held=1)
        held = target.block(9)
        await source.push(transport, ticket, mine, Note(1, 0))
        await source.push(transport, ticket, mine, Note(1, 2))
        assert target.block(5) != source.block(1)
        await source.push(transport, ticket, mine, Note(3, 1, last=True, first_token=7))
        assert [target.block(its) for its in theirs[1:]] == [source.block(ours) for ours in mine[1:]]
        assert target.block(9) == held
        assert [h.note for h in target.sink.landings] == [Note(1, 0), Note(1, 2), Note(3, 1, last=True, first_token=7)]

    async def test_a_push_of_nothing_completes_a_held_prompt(self, name, make, source, target):
        transport = make(name, [target])
        ticket = target.ticket("r", (1, 2), num_held=2)
        stats = await source.push(transport, ticket, (3, 4))
        assert stats.num_bytes == 0
        assert target.sink.landings == [
            Header(ticket.attempt, ticket.source, ticket.target, 1, Note(2, 0, last=True, first_token=42))
        ]

    async def test_many_pushes_at_once(self, name, make, source, target):
        transport = make(name, [target])
        tickets = [target.ticket(f"r{i}", (2 * i, 2 * i + 1)) for i in range(32)]
        await asyncio.gather(*(source.push(transport, ticket, (63 - i, i)) for i, ticket in enumerate(tickets)))
        for i in range(32):
            assert target.block(2 * i) == source.block(63 - i)
            assert target.block(2 * i + 1) == source.block(i)
        assert len([h for h in target.sink.landings if h.note.last]) == 32

    async def test_without_checksums(self, name, make, source, start_target):
        target = await start_target()
        transport = make(name, [target], checksum=False)
        ticket = target.ticket("r", (1,))
        if name == "local":
            await source.push(transport, ticket, (3,))
            assert target.block(1) == source.block(3)
        else:  # this receiver insists on them
            with pytest.raises(TransferDamaged, match="without a checksum"):
                await source.push(transport, ticket, (3,))


@pytest.mark.parametrize("name", NAMES)
class TestRefusals:
    async def test_stale_tickets_write_nothing(self, name, make, source, target, refused_variants):
        transport = make(name, [target])
        good = target.ticket("r", (1, 2))
        before = [target.block(index) for index in range(64)]
        for _, variant in refused_variants:
            with pytest.raises(TransferRefused):
                await source.push(transport, variant(good), (3, 4))
        assert [target.block(index) for index in range(64)] == before
        assert target.sink.landings == []
        await source.push(transport, good, (3, 4))
        assert target.block(1) == source.block(3)

    async def test_an_expired_ticket_is_refused(self, name, make, source, target):
        transport = make(name, [target])
        ticket = target.ticket("r", (1, 2))
        del target.sink.live[ticket.attempt]
        before = [target.block(index) for index in range(64)]
        with pytest.raises(TransferRefused, match="no such ticket"):
            await source.push(transport, ticket, (3, 4))
        assert [target.block(index) for index in range(64)] == before

    @pytest.mark.parametrize("num_blocks", [1, 30])
    async def test_damage_is_noticed(self, name, make, source, target, num_blocks):
        transport = make(name, [target], tamper=flip)
        ticket = target.ticket("r", tuple(range(num_blocks)))
        with pytest.raises(TransferDamaged):
            await source.push(transport, ticket, tuple(range(num_blocks)))
        assert [h.attempt for h in target.sink.damages] == [ticket.attempt]
        assert [h for h in target.sink.landings if h.note.num_blocks] == []

    async def test_stop_reaches_the_sink(self, name, make, source, target):
        transport = make(name, [target])
        ticket = target.ticket("r", (1, 2))
        await source.push(transport, ticket, (3, 4), Note(0, 1))
        await transport.stop(ticket.source, ticket.attempt, target.endpoint)
        assert target.sink.stops == [(ticket.source, ticket.attempt)]

    async def test_several_ranks_are_refused(self, name, make, source, target):
        transport = make(name, [target])
        ticket = replace(target.ticket("r", (1,)), endpoints=(target.endpoint, target.endpoint))
        with pytest.raises(TransferRefused, match="one rank"):
            await source.push(transport, ticket, (3,))

    async def test_an_unknown_peer_is_lost(self, name, make, source, start_target):
        target = await start_target()
        transport = make(name, [])
        await target.server.stop(None)
        with pytest.raises(PeerLost):
            await source.push(transport, target.ticket("r", (1,)), (3,))


@pytest.mark.parametrize("name", WIRED)
class TestPeers:
    async def test_a_killed_peer_is_lost_at_once(self, name, make, source, start_target):
        target = await start_target(WorkerRef("decode-1", 5), child=True)
        transport = make(name, patience=60.0)
        await source.push(transport, target.ticket("r0", (1,)), (1,))
        target.process.send_signal(signal.SIGSTOP)
        pushes = [asyncio.create_task(source.push(transport, target.ticket(f"r{i}", (i,)), (i,))) for i in range(1, 4)]
        await asyncio.sleep(0)
        target.process.kill()
        outcomes = await asyncio.wait_for(asyncio.gather(*pushes, return_exceptions=True), 30)
        assert [type(outcome) for outcome in outcomes] == [PeerLost] * 3

    async def test_a_stopped_peer_counts_as_lost_when_patience_ends(self, name, make, source, start_target):
        target = await start_target(WorkerRef("decode-1", 5), child=True)
        transport = make(name, patience=0.3)
        target.process.send_signal(signal.SIGSTOP)
        with pytest.raises(PeerLost):
            await asyncio.wait_for(source.push(transport, target.ticket("r", tuple(range(60))), tuple(range(60))), 30)

    async def test_a_slow_peer_stalls_nobody_else(self, name, make, source, target, start_target):
        slow = await start_target(WorkerRef("decode-1", 5), child=True)
        transport = make(name, patience=60.0)
        slow.process.send_signal(signal.SIGSTOP)
        waiting = asyncio.create_task(source.push(transport, slow.ticket("s", tuple(range(60))), tuple(range(60))))
        for i in range(3):
            await source.push(transport, target.ticket(f"r{i}", (i,)), (i,))
        assert not waiting.done()
        slow.process.send_signal(signal.SIGCONT)
        await asyncio.wait_for(waiting, 30)
        assert slow.block(59) == source.block(59)

    async def test_a_peer_that_returns_is_dialled_again(self, name, make, source, start_target):
        first = await start_target()
        transport = make(name, patience=20.0)
        await source.push(transport, first.ticket("r0", (1,)), (1,))
        port = int(first.endpoint.address.rpartition(":")[2])
        await first.server.stop(None)
        with pytest.raises(PeerLost):
            await source.push(transport, first.ticket("r1", (1,)), (1,))
        second = await start_target(port=port)
        assert second.endpoint.address == first.endpoint.address
        ticket = second.ticket("r2", (1,))
        await source.push(transport, ticket, (5,))
        assert second.block(1) == source.block(5)

    async def test_a_stop_is_delivered_after_the_peer_returned(self, name, make, source, start_target):
        first = await start_target()
        transport = make(name)
        ticket = first.ticket("r", (1, 2))
        await source.push(transport, ticket, (1, 2), Note(0, 1))
        port = int(first.endpoint.address.rpartition(":")[2])
        await first.server.stop(None)
        stopping = asyncio.create_task(transport.stop(ticket.source, ticket.attempt, first.endpoint))
        await asyncio.sleep(0)
        second = await start_target(port=port)
        await asyncio.wait_for(second.sink.stop_seen.wait(), 30)
        await asyncio.wait_for(stopping, 30)
        assert second.sink.stops == [(ticket.source, ticket.attempt)]

    async def test_bytes_in_flight_are_bounded(self, name, make, source, target):
        limit = 4 * 131072
        transport = make(name, max_in_flight=limit)
        budget = transport._links.to(target.endpoint).budget
        tickets = [target.ticket(f"r{i}", tuple(range(3 * i, 3 * i + 3))) for i in range(8)]
        seen = []
        check = target.sink.check
        target.sink.check = lambda header: (seen.append(budget.num_used), check(header))[1]
        await asyncio.gather(*(source.push(transport, ticket, tuple(range(3))) for ticket in tickets))
        assert seen
        assert max(seen) <= limit
        assert budget.num_used == 0

    async def test_cancelled_pushes_leave_the_link_usable(self, name, make, source, target):
        transport = make(name)
        await source.push(transport, target.ticket("warm", (0,)), (0,))
        for steps in range(12):
            ticket = target.ticket(f"r{steps}", tuple(range(40)))
            push = asyncio.create_task(source.push(transport, ticket, tuple(range(40))))
            for _ in range(steps):
                await asyncio.sleep(0)
            push.cancel()
            await asyncio.gather(push, return_exceptions=True)
        ticket = target.ticket("after", (50, 51))
        await source.push(transport, ticket, (7, 8))
        assert target.block(51) == source.block(8)

    async def test_a_push_under_way_when_the_transport_closes_is_lost(self, name, make, source, start_target):
        slow = await start_target(WorkerRef("decode-1", 5), child=True)
        transport = make(name, patience=60.0)
        slow.process.send_signal(signal.SIGSTOP)
        waiting = asyncio.create_task(source.push(transport, slow.ticket("s", (1,)), (1,)))
        await asyncio.sleep(0.05)  # whatever it waits for by then, it must not wait for ever
        await transport.close()
        with pytest.raises(PeerLost):
            await asyncio.wait_for(waiting, 30)


async def test_shm_asks_before_it_writes(make, source, target):
    """Whatever the header says later, nothing is written under a ticket that the receiver does not know."""
    transport = make("shm")
    checked = []
    before = target.block(1)

    def check(header: Header) -> None:
        checked.append((header.note, target.block(1) == before))

    target.sink.check = check
    await source.push(transport, target.ticket("r", (1,)), (3,))
    assert checked[0] == (Note(0, 0), True)
    assert checked[-1] == (Note(0, 1, last=True, first_token=42), False)


async def test_shm_refuses_another_machine(make, source, target):
    transport = make("shm")
    ticket = replace(target.ticket("r", (1,)), endpoints=(replace(target.endpoint, host="elsewhere"),))
    assert not transport.reaches(ticket.endpoints[0])
    with pytest.raises(TransferRefused, match="cannot be mapped"):
        await source.push(transport, ticket, (3,))


async def test_transports_share_one_connection(source, target):
    links = PeerLinks()
    shm = ShmTransport(source.memory, host_identity(), links)
    stream = GrpcTransport(source.memory, links)
    await source.push(shm, target.ticket("a", (1,)), (2,))
    await source.push(stream, target.ticket("b", (2,)), (3,))
    assert len(links._links) == 1
    assert target.block(1) == source.block(2)
    assert target.block(2) == source.block(3)
    await shm.close()
    await stream.close()
