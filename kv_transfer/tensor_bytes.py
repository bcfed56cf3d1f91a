"""Byte runs of a pool that is a tensor, on any device: packed into one run and back, and their digest.

Only launches operations; in which order they run beside others is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import TransferRefused
from .frames import Runs

WORD = 8  # bytes: KV runs are whole vectors of a head, which are multiples of it


class TensorBytes:
    """A pool's bytes uint8 [num_bytes], contiguous, in blocks of `block_bytes`."""

    def __init__(self, flat: Tensor, block_bytes: int) -> None:
        self._flat = flat
        self._block_bytes = block_bytes
        self._blocks = flat.view(torch.int64).view(-1, block_bytes // WORD)  # [N, words]

    @property
    def num_bytes(self) -> int:
        return self._flat.shape[0]

    def pack(self, runs: Runs) -> Tensor:
        """The bytes of the runs in order, uint8 [sum of their lengths], as a copy."""
        blocks = self._whole_blocks(runs)
        if blocks is not None:
            return self._blocks.index_select(0, self._index(blocks)).view(torch.uint8).flatten()
        return torch.cat([self._flat[offset : offset + length] for offset, length in runs])

    def unpack(self, runs: Runs, packed: Tensor) -> None:
        """The inverse: packed uint8 goes to the runs, in order."""
        blocks = self._whole_blocks(runs)
        if blocks is not None:
            self._blocks.index_copy_(0, self._index(blocks), packed.view(torch.int64).view(-1, self._block_bytes // WORD))
            return
        start = 0
        for offset, length in runs:
            self._flat[offset : offset + length].copy_(packed[start : start + length])
            start += length

    def _whole_blocks(self, runs: Runs) -> list[int] | None:
        """The blocks of the runs, None when some run is not made of whole ones: then each is copied by itself."""
        size = self._block_bytes
        if any(offset % size or length % size for offset, length in runs):
            return None
        return [block for offset, length in runs for block in range(offset // size, (offset + length) // size)]

    def _index(self, blocks: Sequence[int]) -> Tensor:
        on_cuda = self._flat.device.type == "cuda"
        return torch.tensor(blocks, dtype=torch.int64, pin_memory=on_cuda).to(self._flat.device, non_blocking=True)


def digest_of(packed: Tensor) -> Tensor:
    """Of uint8 [a multiple of 8], int64 []: the sum of its 64-bit words, each times an odd number of its place, modulo 2**64.

    Any single word that differs changes it for certain, and so do two words that changed places unless their difference times
    their distance is a multiple of 2**63. Runs where the bytes are: a checksum on the host would first have to bring them there.
    """
    words = packed.view(torch.int64)
    places = torch.arange(1, 2 * len(words), 2, dtype=torch.int64, device=packed.device)
    return (words * places).sum()


def as_checksum(digest: Tensor) -> int:
    """A digest as the unsigned number that frames carry. Waits for the device."""
    return int(digest) & (1 << 64) - 1


def check_words(runs: Runs) -> None:
    """Raise TransferRefused for runs that are not whole words."""
    if any(offset % WORD or length % WORD for offset, length in runs):
        raise TransferRefused(f"KV on a device moves in words of {WORD} bytes; these runs are not made of them")
