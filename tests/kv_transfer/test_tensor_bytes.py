"""Byte runs of a tensor: packed, unpacked, and what the digest notices."""

from __future__ import annotations

import random

import pytest
import torch
from baton.core.errors import TransferRefused
from baton.kv_transfer.tensor_bytes import TensorBytes, as_checksum, check_words, digest_of
from torch import Tensor

BLOCK = 64


def pool(num_blocks: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (num_blocks * BLOCK,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "runs",
    [
        ((3 * BLOCK, 2 * BLOCK), (0, BLOCK), (7 * BLOCK, BLOCK)),  # whole blocks
        ((8, 16), (3 * BLOCK + 24, 8), (5 * BLOCK, BLOCK)),  # parts of some
    ],
)
def test_what_is_packed_is_what_lies_there_and_back(runs: tuple[tuple[int, int], ...]) -> None:
    source, target = pool(), pool(seed=1)
    before = target.clone()
    packed = TensorBytes(source, BLOCK).pack(runs)
    assert bytes(packed.tolist()) == b"".join(bytes(source[at : at + length].tolist()) for at, length in runs)
    TensorBytes(target, BLOCK).unpack(runs, packed)
    touched = torch.zeros(len(target), dtype=torch.bool)
    for at, length in runs:
        assert torch.equal(target[at : at + length], source[at : at + length])
        touched[at : at + length] = True
    assert torch.equal(target[~touched], before[~touched])


def test_the_digest_is_the_sum_it_says_and_notices_every_bit_and_every_swap() -> None:
    packed = pool(2)
    words = [int.from_bytes(bytes(packed[at : at + 8].tolist()), "little") for at in range(0, len(packed), 8)]
    digest = as_checksum(digest_of(packed))
    assert digest == sum(word * (2 * place + 1) for place, word in enumerate(words)) % 2**64
    for bit in random.Random(0).sample(range(8 * len(packed)), 200):
        damaged = packed.clone()
        damaged[bit // 8] ^= 1 << bit % 8
        assert as_checksum(digest_of(damaged)) != digest
    swapped = packed.view(torch.int64).flip(0).contiguous().view(torch.uint8)
    assert as_checksum(digest_of(swapped)) != digest


def test_runs_that_are_not_words_are_refused() -> None:
    check_words(((8, 16),))
    with pytest.raises(TransferRefused, match="words of 8 bytes"):
        check_words(((4, 16),))
