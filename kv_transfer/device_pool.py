"""A KV pool in a device's memory, as whatever moves bytes between workers sees it.

Bytes that leave for the host are packed on the device and copied into pinned memory, a segment ahead of whoever sends them;
bytes that come are copied in behind each other. Both happen on streams of their own, beside the engine's steps: a step that
must see what came runs behind `arrivals`, and the host waits for neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.device import Device, Event
from .cuts import cut
from .frames import Runs
from .tensor_bytes import TensorBytes, as_checksum, check_words, digest_of
from .transport import Copy

POLL = 1e-4  # seconds between looks at an event: a thread that waits would have to fight for the interpreter


class DevicePool:
    """kv [N, ...] contiguous, on `device`, in blocks of `block_bytes`. See `pool.KvMemory`.

    arrivals  recorded behind every write
    """

    path = ""  # no process can map it as a file

    def __init__(self, kv: Tensor, block_bytes: int, device: Device) -> None:
        self.device = device
        self.flat = kv.flatten().view(torch.uint8)
        self.bytes = TensorBytes(self.flat, block_bytes)
        self.num_bytes = self.bytes.num_bytes
        self.outgoing = device.stream()
        self.incoming = device.stream()
        self.arrivals: Event = self.incoming.event()

    async def staged(self, copies: Sequence[Copy], num_bytes: int) -> AsyncIterator[tuple[Sequence[Copy], memoryview]]:
        """See `pool.KvMemory.staged`: one segment is on its way to the host while the one before is being sent."""
        ahead: list[tuple[Sequence[Copy], Tensor, Event]] = []
        for segment in cut(copies, num_bytes):
            ahead.append(self._bring(segment))
            if len(ahead) > 1:
                yield await self._brought(*ahead.pop(0))
        for item in ahead:
            yield await self._brought(*item)

    def write(self, runs: Runs, payload: memoryview) -> None:
        """Copy bytes of the host to the runs. They may change once this has returned."""
        check_words(runs)
        host = self.device.pinned(len(payload))
        _bytes_of(host)[:] = payload
        self.launch_in(lambda: self.bytes.unpack(runs, host.to(self.device.torch_device, non_blocking=True)))

    def digest(self, runs: Runs) -> int:
        """See `pool.KvMemory.digest`. Waits for the device, behind everything that came."""
        check_words(runs)
        found: list[Tensor] = []
        self.launch_in(lambda: found.append(digest_of(self.bytes.pack(runs))))
        self.arrivals.wait()
        return as_checksum(found[0])

    def launch_in(self, work: Callable[[], None]) -> None:
        """Let `work` write to the pool, behind what came before it."""
        self.incoming.launch(work)
        self.arrivals.record()

    def close(self) -> None:
        """Give the memory up: it goes with the last tensor over it."""
        del self.flat, self.bytes

    def _bring(self, segment: Sequence[Copy]) -> tuple[Sequence[Copy], Tensor, Event]:
        """Launch the packing of a segment and its copy to the host."""
        runs = tuple((copy.source_offset, copy.num_bytes) for copy in segment)
        check_words(runs)
        host, there, at = self.device.pinned(sum(length for _, length in runs)), self.outgoing.event(), 0
        moved = []
        for copy in segment:
            moved.append(Copy(at, copy.target_offset, copy.num_bytes, copy.source_rank, copy.target_rank))
            at += copy.num_bytes
        self.outgoing.launch(lambda: _copy(host, self.bytes.pack(runs)))
        there.record()
        return moved, host, there

    async def _brought(self, segment: Sequence[Copy], host: Tensor, there: Event) -> tuple[Sequence[Copy], memoryview]:
        await reached(there)
        return segment, _bytes_of(host)


async def reached(event: Event) -> None:
    """Return when the device has come to `event`, without holding the event loop."""
    await asyncio.sleep(0)
    while not event.is_reached():  # noqa: ASYNC110 (the device sets no asyncio.Event)
        await asyncio.sleep(POLL)
    event.wait()  # at once; raises what went wrong on the device


def _bytes_of(host: Tensor) -> memoryview:
    """The memory of a tensor of the CPU."""
    array: NDArray[np.uint8] = host.numpy()
    return array.data


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)
