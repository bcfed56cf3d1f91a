"""The memory of a KV pool, as bytes: shared with the processes of this host, or private.

Knows nothing of blocks or tensors. Whoever dies, however, the kernel takes the memory back: it has no name in
any file system, only a descriptor that peers open through /proc.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from ..core.errors import TransferRefused
from .cuts import cut
from .frames import Runs, checksum_of
from .transport import Copy


class KvMemory(Protocol):
    """The memory of a KV pool as transports and the peer server use it, wherever it is.

    path  where processes of this host can open it; empty when they cannot
    """

    @property
    def path(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    def staged(self, copies: Sequence[Copy], num_bytes: int) -> AsyncIterator[tuple[Sequence[Copy], memoryview]]:
        """The same copies in segments of at most `num_bytes`, each with host memory that its source offsets count in.

        That memory holds the bytes until the next segment is asked for.
        """
        ...

    def write(self, runs: Runs, payload: memoryview) -> None:
        """Copy bytes to where they belong, in the order of `runs`."""
        ...

    def digest(self, runs: Runs) -> int:
        """The checksum of bytes that lie in the pool, as whoever can write straight to this kind of memory computes it."""
        ...

    def close(self) -> None:
        """Give the memory up."""
        ...


class PoolMemory:
    """`num_bytes` of page-aligned memory, touched at birth: a first touch is ten times slower than a copy."""

    def __init__(self, mapping: mmap.mmap, path: str, descriptor: int | None) -> None:
        self._mapping = mapping
        self._descriptor = descriptor
        self.path = path
        self.num_bytes = len(mapping)
        self.buffer = memoryview(mapping)

    @classmethod
    def shared(cls, num_bytes: int) -> PoolMemory:
        """Memory that processes of this host can open at `path` while this process lives."""
        _check_size(num_bytes)
        descriptor = os.memfd_create("baton-kv-pool", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, num_bytes)
            mapping = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except (OSError, ValueError):
            os.close(descriptor)
            raise
        return cls(mapping, f"/proc/{os.getpid()}/fd/{descriptor}", descriptor)

    @classmethod
    def private(cls, num_bytes: int) -> PoolMemory:
        """Memory of this process only; `path` is empty."""
        _check_size(num_bytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        return cls(mmap.mmap(-1, num_bytes, flags=flags), "", None)

    @classmethod
    def open(cls, path: str, num_bytes: int) -> PoolMemory:
        """Map a peer's shared memory. Raises TransferRefused when it is not there or has another size."""
        _check_size(num_bytes)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TransferRefused(f"the shared pool at {path} cannot be opened: {error.strerror}") from error
        try:
            size = os.fstat(descriptor).st_size
            if size != num_bytes:
                raise TransferRefused(f"the shared pool at {path} has {size} bytes, expected {num_bytes}")
            mapping = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            raise TransferRefused(f"the shared pool at {path} cannot be mapped: {error.strerror}") from error
        finally:
            os.close(descriptor)
        return cls(mapping, path, None)

    async def staged(self, copies: Sequence[Copy], num_bytes: int) -> AsyncIterator[tuple[Sequence[Copy], memoryview]]:
        """See `KvMemory.staged`: the bytes are where the host can read them."""
        for segment in cut(copies, num_bytes):
            yield segment, self.buffer

    def write(self, runs: Runs, payload: memoryview) -> None:
        """See `KvMemory.write`."""
        buffer, start = self.buffer, 0
        for offset, length in runs:
            buffer[offset : offset + length] = payload[start : start + length]
            start += length

    def digest(self, runs: Runs) -> int:
        """See `KvMemory.digest`: xxh3_64."""
        buffer = self.buffer
        return checksum_of(buffer[offset : offset + length] for offset, length in runs)

    def close(self) -> None:
        """Give the memory up. Views of `buffer` taken by others stay valid; the memory goes with the last of them."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        try:
            self.buffer.release()
            self._mapping.close()
        except BufferError:
            # A tensor or array over this memory is still alive: the mapping ends with it.
            return


def _check_size(num_bytes: int) -> None:
    if num_bytes <= 0:
        raise ValueError(f"a pool needs at least one byte, got {num_bytes}")
