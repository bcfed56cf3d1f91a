"""Process groups of two workers: both ways at once, what is refused on the way, and NCCL where there are two GPUs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from baton.core.errors import PeerLost, TransferDamaged, TransferRefused
from baton.core.kv import Endpoint
from baton.kernels.device import HostDevice
from baton.kv_transfer.link import PeerLinks
from baton.kv_transfer.process_group import Invitation, Lane
from baton.kv_transfer.registry import host_identity
from baton.kv_transfer.torch_dist import DeviceEnd, HostEnd, Inbox, TorchDistTransport
from baton.tests.kv_transfer.conftest import (
    LAYOUT,
    NUM_BLOCKS,
    SOURCE,
    Source,
    StartTarget,
    Target,
    as_device_pool,
    handle_on,
)

OWN = Endpoint(SOURCE, "127.0.0.1:1", host_identity(), "", NUM_BLOCKS, LAYOUT)


def transport_from(source: Source, own: Endpoint = OWN) -> TorchDistTransport:
    return TorchDistTransport(HostEnd(source.memory), own, PeerLinks(), patience=20.0)


async def test_two_workers_push_to_each_other_at_once(start_target: StartTarget) -> None:
    """Each worker sends and receives: neither waits for the other to receive before it sends."""
    workers = [await start_target(worker=replace(SOURCE, worker_id=f"w{i}")) for i in range(2)]
    for number, worker in enumerate(workers):
        worker.memory.buffer[:] = bytes([number + 1]) * worker.memory.num_bytes
    transports = [transport_from(Source(worker.memory)) for worker in workers]
    pushes = []
    for i, (transport, mine, theirs) in enumerate(zip(transports, workers, reversed(workers), strict=True)):
        for turn in range(6):
            blocks = tuple(range(10 * turn, 10 * turn + 5))
            ticket = theirs.ticket(f"{i}/{turn}", tuple(block + 5 * (1 - i) for block in blocks))
            pushes.append(Source(mine.memory).push(transport, ticket, tuple(block + 5 * (1 - i) for block in blocks)))
    await asyncio.wait_for(asyncio.gather(*pushes), 60)
    for number, worker in enumerate(workers):
        got = {worker.block(10 * turn + 5 * number + i)[0] for turn in range(6) for i in range(5)}
        assert got == {2 - number}
    for transport in transports:
        await transport.close()


async def test_a_refused_push_leaves_the_ends_agreeing_about_what_comes_next(source: Source, target: Target) -> None:
    transport = transport_from(source)
    good = target.ticket("r", (1, 2))
    stale = replace(good, generation=9)
    outcomes = await asyncio.gather(
        *(source.push(transport, ticket, (3, 4)) for ticket in (stale, good, stale)), return_exceptions=True
    )
    assert [type(outcome).__name__ for outcome in outcomes] == ["TransferRefused", "TransferStats", "TransferRefused"]
    assert target.block(1) == source.block(3)
    assert len(transport._lanes) == 1
    await transport.close()


def test_it_reaches_pools_of_the_same_kind_and_no_second_one_on_a_gpu(source: Source) -> None:
    on_gpu = replace(OWN, handle=handle_on("GPU-a"))
    for own, peer, reached in (
        (OWN, OWN, True),
        (OWN, replace(OWN, address=""), False),
        (OWN, on_gpu, False),
        (on_gpu, OWN, False),
        (on_gpu, on_gpu, False),
        (on_gpu, replace(OWN, handle=handle_on("GPU-b")), True),
    ):
        assert transport_from(source, own).reaches(peer) is reached


async def test_invitations_are_looked_at(source: Source) -> None:
    inbox = Inbox(HostEnd(source.memory), 1.0)
    with pytest.raises(TransferRefused, match="over gloo, not over nccl"):
        await inbox.join(memoryview(Invitation("127.0.0.1", 1, "nccl").pack()))
    with pytest.raises(TransferDamaged, match="no invitation"):
        await inbox.join(memoryview(b"\x01"))
    with pytest.raises(PeerLost):
        await inbox.join(memoryview(Invitation("127.0.0.1", 1, "gloo").pack()))  # nobody is there
    assert DeviceEnd(as_device_pool(source.memory, HostDevice())).backend == "gloo"


async def test_a_closed_lane_takes_nothing_on() -> None:
    lane = Lane(1.0)
    lane.close()
    with pytest.raises(PeerLost, match="closed"):
        await lane.send(torch.zeros(8, dtype=torch.uint8))


NCCL = """
import asyncio, sys, torch
from baton.kv_transfer.process_group import Invitation, Lane, open_store

async def main():
    torch.cuda.set_device(1)
    lane = Lane(60.0)
    await lane.open(Invitation("127.0.0.1", int(sys.argv[1]), "nccl"), 1)
    got = await lane.receive(lambda: torch.empty(1 << 24, dtype=torch.uint8, device="cuda:1"))
    print(int(got.long().sum()))

asyncio.run(main())
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
async def test_nccl_carries_bytes_between_two_gpus(tmp_path: Path) -> None:
    from baton.kv_transfer.process_group import SENDER, open_store

    store = open_store("127.0.0.1", 60.0)
    (tmp_path / "receiver.py").write_text(NCCL)
    command = [sys.executable, str(tmp_path / "receiver.py"), str(store.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        lane = Lane(60.0)
        await lane.open(Invitation("127.0.0.1", store.port, "nccl"), SENDER, store)
        await lane.send(torch.full((1 << 24,), 3, dtype=torch.uint8, device="cuda:0"))
        said, _ = await asyncio.to_thread(child.communicate)
    assert int(said) == 3 << 24
