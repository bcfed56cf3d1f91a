"""A pool on a device that lags: what leaves and what comes waits for the device, and never the other way round."""

from __future__ import annotations

import asyncio

import pytest
import torch
from baton.core.errors import TransferRefused
from baton.kernels.device import HostDevice
from baton.kv_transfer.cuda_ipc import CudaIpcTransport, CudaMappings
from baton.kv_transfer.device_pool import DevicePool, reached
from baton.kv_transfer.link import PeerLinks
from baton.kv_transfer.registry import host_identity
from baton.kv_transfer.transport import Copy
from baton.tests.engine.lagging_device import LaggingDevice
from baton.tests.kv_transfer.conftest import LAYOUT, SharedMappings, as_device_pool

BLOCK = 64


def fresh(num_blocks: int = 8) -> torch.Tensor:
    return torch.arange(num_blocks * BLOCK, dtype=torch.int64).to(torch.uint8)


async def test_a_segment_is_handed_over_when_it_is_there_and_the_next_one_is_on_its_way() -> None:
    device, flat = LaggingDevice(), fresh()
    pool = DevicePool(flat, BLOCK, device)
    device.gate.clear()
    segments = pool.staged([Copy(2 * BLOCK, 0, 3 * BLOCK)], BLOCK)
    first = asyncio.create_task(anext(segments))
    await asyncio.sleep(0.01)
    assert not first.done()
    assert [what for what, _ in device.log].count("launch") == 2  # the second is packed while the first travels
    device.gate.set()
    found = [await first, *[item async for item in segments]]
    assert [copies for copies, _ in found] == [[Copy(0, i * BLOCK, BLOCK)] for i in range(3)]
    assert b"".join(bytes(memory) for _, memory in found) == bytes(flat[2 * BLOCK : 5 * BLOCK].tolist())


def test_what_comes_may_change_behind_the_call_and_is_counted_as_arrived_later() -> None:
    device, flat = LaggingDevice(), torch.zeros(8 * BLOCK, dtype=torch.uint8)
    pool = DevicePool(flat, BLOCK, device)
    payload = bytearray(b"\x07" * 2 * BLOCK)
    device.gate.clear()
    pool.write(((BLOCK, BLOCK), (5 * BLOCK, BLOCK)), memoryview(payload))
    payload[:] = bytes(len(payload))
    assert not pool.arrivals.is_reached()
    assert int(flat.sum()) == 0
    device.gate.set()
    pool.arrivals.wait()
    assert flat.view(8, BLOCK).float().mean(1).tolist() == [0, 7, 0, 0, 0, 7, 0, 0]


def test_the_digest_runs_behind_what_came() -> None:
    device = LaggingDevice()
    lagging, plain = (
        DevicePool(torch.zeros(8 * BLOCK, dtype=torch.uint8), BLOCK, device),
        DevicePool(fresh(), BLOCK, HostDevice()),
    )
    lagging.write(((0, 8 * BLOCK),), memoryview(bytes(fresh().tolist())))
    assert lagging.digest(((BLOCK, BLOCK),)) == plain.digest(((BLOCK, BLOCK),))
    assert lagging.digest(((BLOCK, BLOCK),)) != plain.digest(((2 * BLOCK, BLOCK),))


async def test_what_went_wrong_on_the_device_is_raised() -> None:
    device = LaggingDevice()
    pool = DevicePool(fresh(), BLOCK, device)
    pool.launch_in(lambda: torch.ones(2).view(3))  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError, match="shape"):
        await reached(pool.arrivals)


async def test_cuda_ipc_announces_nothing_before_its_copy_is_done(source, start_target) -> None:  # type: ignore[no-untyped-def]
    target = await start_target(on_device=True)
    device = LaggingDevice()
    transport = CudaIpcTransport(as_device_pool(source.memory, device), host_identity(), PeerLinks(), SharedMappings())
    device.gate.clear()
    ticket = target.ticket("r", (1, 2))
    push = asyncio.create_task(source.push(transport, ticket, (3, 4)))
    while "launch" not in [what for what, _ in device.log]:
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    assert [header.note.num_blocks for header in target.sink.landings] == [0]  # it has asked, no more
    device.gate.set()
    await asyncio.wait_for(push, 30)
    assert target.block(1) == source.block(3)
    await transport.close()


def test_a_handle_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    mappings = CudaMappings()
    assert not mappings.reaches(b"")
    with pytest.raises(TransferRefused, match="no handle"):
        mappings.open(b"\xc1")
    assert LAYOUT.block_bytes % 8 == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_handle_names_its_gpu() -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    assert CudaMappings().reaches(CudaMappings.export(memory))
