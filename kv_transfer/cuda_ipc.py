"""CUDA IPC: the source opens the target's pool, on the same GPU or another of this host, and copies device to device.

The copies run on a stream of their own beside the engine's steps. A segment is announced once its copy has completed, so
the receiver never sees less than it is told; it computes the segment's digest from its own memory and compares. The memory
itself is guarded by the hardware (ECC): the digest is there for what software can get wrong, a wrong place or a copy that
read or was read too early.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgpack
import torch
from torch import Tensor

from ..core.errors import TransferRefused
from ..core.kv import Endpoint
from ..kernels.device import Event
from .cuts import cut, runs_of
from .device_pool import DevicePool, reached
from .link import PeerLinks
from .one_sided import OneSidedTransport
from .tensor_bytes import TensorBytes, as_checksum, check_words, digest_of
from .transport import Copy, Header

SEGMENT_BYTES = 64 << 20  # copied and announced at a time: the receiver checks one while the next is being copied

Tamper = Callable[[Header, Tensor], None]


class Mappings(Protocol):
    """How pools of other processes become tensors here."""

    def reaches(self, handle: bytes) -> bool:
        """Whether the memory behind `handle` is on a device that this process sees."""
        ...

    def open(self, handle: bytes) -> Tensor:
        """The memory, uint8 [bytes]. Raises TransferRefused when it cannot be opened."""
        ...


class CudaMappings:
    """Memory of GPUs by CUDA IPC. A handle names the GPU by its UUID: processes may number them differently."""

    def __init__(self) -> None:
        self._numbers = {_uuid(number): number for number in range(torch.cuda.device_count())}

    @staticmethod
    def export(memory: Tensor) -> bytes:
        """A handle on uint8 [bytes], which must live as long as anybody may open it."""
        shared = memory.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
        number, *rest = shared  # handle, size, offset, and what counts who else uses it
        packed: bytes = msgpack.packb((_uuid(number), memory.storage_offset(), memory.numel(), rest))
        return packed

    def reaches(self, handle: bytes) -> bool:
        return bool(handle) and _unpack(handle)[0] in self._numbers

    def open(self, handle: bytes) -> Tensor:
        uuid, offset, num_bytes, rest = _unpack(handle)
        if uuid not in self._numbers:
            raise TransferRefused(f"the pool is on GPU {uuid}, which this process does not see")
        number = self._numbers[uuid]
        try:
            storage = torch.UntypedStorage._new_shared_cuda(number, *rest)
        except RuntimeError as error:
            raise TransferRefused(f"the pool on GPU {uuid} cannot be opened: {error}") from error
        whole = torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", number)).set_(storage)
        return whole[offset : offset + num_bytes]


def gpu_of(handle: bytes) -> str:
    """The UUID of the GPU on which the memory behind `handle` is."""
    return _unpack(handle)[0]


def _unpack(handle: bytes) -> tuple[str, int, int, list[object]]:
    try:
        uuid, offset, num_bytes, rest = msgpack.unpackb(handle)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise TransferRefused(f"these {len(handle)} bytes are no handle on a device's memory: {error}") from error
    return uuid, offset, num_bytes, rest


def _uuid(number: int) -> str:
    return str(torch.cuda.get_device_properties(number).uuid)


@dataclass(slots=True)
class OpenedPool:
    """A peer's pool. Closing lets go of it: copies that still run keep it until they are done."""

    bytes: TensorBytes | None

    def close(self) -> None:
        self.bytes = None


class CudaIpcTransport(OneSidedTransport[OpenedPool]):
    """Pushes from a pool on a device into pools on devices of the machine `host`.

    tamper  for tests: called with the packed bytes after their digest was taken
    """

    name = "cuda_ipc"

    def __init__(
        self,
        pool: DevicePool,
        host: str,
        links: PeerLinks,
        mappings: Mappings,
        checksum: bool = True,
        tamper: Tamper | None = None,
    ) -> None:
        super().__init__(host, links)
        self._pool = pool
        self._mappings = mappings
        self._checksum = checksum
        self._tamper = tamper

    def reaches(self, endpoint: Endpoint) -> bool:
        """Only pools on devices of this machine that this process sees."""
        return bool(endpoint.handle) and endpoint.host == self._host and self._mappings.reaches(endpoint.handle)

    def _open(self, endpoint: Endpoint) -> OpenedPool:
        flat, wanted = self._mappings.open(endpoint.handle), endpoint.num_blocks * endpoint.layout.block_bytes
        if flat.numel() < wanted:
            raise TransferRefused(f"the pool of {endpoint.worker} has {flat.numel()} bytes, expected {wanted}")
        return OpenedPool(TensorBytes(flat, endpoint.layout.block_bytes))

    async def _write(
        self, copies: Sequence[Copy], memory: OpenedPool, header: Header
    ) -> AsyncIterator[tuple[Sequence[Copy], int | None]]:
        ahead: list[tuple[Sequence[Copy], list[Tensor], Event]] = []
        for segment in cut(copies, SEGMENT_BYTES):
            ahead.append(self._launch(segment, memory, header))
            if len(ahead) > 1:
                yield await self._copied(*ahead.pop(0))
        for item in ahead:
            yield await self._copied(*item)

    def _launch(self, segment: Sequence[Copy], memory: OpenedPool, header: Header) -> tuple[Sequence[Copy], list[Tensor], Event]:
        """Launch the copy of a segment, and its digest, which is in the list once the event is reached."""
        source, target = self._pool.bytes, memory.bytes
        if target is None:
            raise TransferRefused(f"the pool of {header.target} is not open any more")
        runs, digests = tuple((copy.source_offset, copy.num_bytes) for copy in segment), list[Tensor]()
        check_words(runs)
        check_words(runs_of(segment))

        def work() -> None:
            packed = source.pack(runs)
            if self._checksum:
                digests.append(digest_of(packed))
            if self._tamper is not None:
                self._tamper(header, packed)
            target.unpack(runs_of(segment), packed)

        self._pool.outgoing.launch(work)
        done = self._pool.outgoing.event()
        done.record()
        return segment, digests, done

    @staticmethod
    async def _copied(segment: Sequence[Copy], digests: list[Tensor], done: Event) -> tuple[Sequence[Copy], int | None]:
        await reached(done)
        return segment, as_checksum(digests[0]) if digests else None
