"""Random words and noise against the reference, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from baton.kernels import cpu, reference
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from baton.kernels.triton.noise import gumbel_noise, random_words  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def words_kernel(key, out, first, size: tl.constexpr):
    """key int32 [4]: seed low and high, sequence and output index; out int32 [4 * size]."""
    words = random_words(
        (first + tl.arange(0, size)).to(tl.uint32),
        tl.load(key + 3).to(tl.uint32, bitcast=True),
        tl.load(key + 2).to(tl.uint32, bitcast=True),
        tl.load(key).to(tl.uint32, bitcast=True),
        tl.load(key + 1).to(tl.uint32, bitcast=True),
    )
    tl.store(out + tl.arange(0, 4 * size), words.to(tl.int32, bitcast=True))


@triton.jit
def noise_kernel(words, out, size: tl.constexpr):
    place = tl.arange(0, size)
    tl.store(out + place, gumbel_noise(tl.load(words + place).to(tl.uint32, bitcast=True)))


def as_int32(words: list[int]) -> torch.Tensor:
    return torch.tensor([word - (1 << 32) if word >> 31 else word for word in words], dtype=torch.int32, device=DEVICE)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    sequence=st.integers(0, 2**32 - 1),
    output=st.integers(0, 2**32 - 1),
    first=st.integers(0, 10**6),
)
def test_random_words_equal_the_reference(seed: int, sequence: int, output: int, first: int) -> None:
    out = torch.empty(64, dtype=torch.int32, device=DEVICE)
    words_kernel[(1,)](as_int32([seed & 0xFFFFFFFF, seed >> 32, sequence, output]), out, first, 16)
    expected = [reference.random_word(seed, sequence, output, 4 * first + token) for token in range(64)]
    assert [word & 0xFFFFFFFF for word in out.tolist()] == expected


def test_noise_is_within_1e_6_of_the_cpu_s() -> None:
    torch.manual_seed(0)
    ends = [0, 1, 2, 77, 127, 128, (1 << 31) - 1, 1 << 31, 0xFFFFFE00, 0xFFFFFF7F, 0xFFFFFF80, 0xFFFFFFFE, 0xFFFFFFFF]
    words = ends + torch.randint(0, 1 << 32, (4096 - len(ends),)).tolist()
    out = torch.empty(4096, device=DEVICE)
    noise_kernel[(1,)](as_int32(words), out, 4096)
    for noise in (cpu.exponential_noise, reference.exponential_noise):
        torch.testing.assert_close(out.cpu(), -noise(torch.tensor(words)).log(), rtol=1e-6, atol=1e-6)
    # What the bound in `sampling` on who can still win rests on.
    assert float(out.max() - out.min()) < 25.8
