"""Blocks packed and unpacked against the reference, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from baton.core.errors import InternalError
from baton.kernels import reference
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from baton.kernels.triton import blocks as module
from baton.kernels.triton.blocks import PoolCut

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def some_pool(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """kv[N, L, 2, K, S, D] of any magnitudes, and scales [L, 2, K]."""
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).exp() ** 3
    return kv.to(dtype).to(DEVICE), (0.05 + torch.rand(shape[1], 2, shape[3], generator=generator)).to(DEVICE)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.element_size()])


@settings(max_examples=30, deadline=None)
@given(
    layers=st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(1, 3)),
    heads=st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(1, 3)),
    slots=st.sampled_from([2, 16]),
    size=st.sampled_from([8, 80, 128]),
    pool_type=st.sampled_from(TYPES),
    staged_type=st.sampled_from(TYPES),
    order=st.permutations(range(5)),
    num_blocks=st.integers(0, 4),
    seed=st.integers(0, 10**6),
)
def test_there_and_back_as_the_reference(
    layers: tuple[int, int, int],
    heads: tuple[int, int, int],
    slots: int,
    size: int,
    pool_type: torch.dtype,
    staged_type: torch.dtype,
    order: list[int],
    num_blocks: int,
    seed: int,
) -> None:
    (num_layers, before, behind), (num_heads, left, right) = layers, heads
    kv, scales = some_pool((5, before + num_layers + behind, 2, left + num_heads + right, slots, size), pool_type, seed)
    layer_range, head_range = range(before, before + num_layers), range(left, left + num_heads)
    ids = list(order[:num_blocks])
    cut = PoolCut(kv, layer_range, head_range, scales)
    staged = torch.empty(cut.staged_shape(num_blocks), dtype=staged_type, device=DEVICE)
    cut.gather(cut.index(ids), staged)
    expected = reference.gather_blocks(kv, ids, layer_range, head_range, staged_type, scales)
    assert torch.equal(bits(staged), bits(expected))
    target, _ = some_pool(tuple(kv.shape), pool_type, seed + 1)
    plain = target.clone()
    PoolCut(target, layer_range, head_range, scales).scatter(cut.index(ids), staged)
    reference.scatter_blocks(plain, ids, staged, layer_range, head_range, scales)
    assert torch.equal(bits(target), bits(plain))


def test_what_memory_held_before_is_moved_bit_for_bit() -> None:
    kv = torch.randint(-(2**15), 2**15, (3, 1, 2, 2, 16, 16), dtype=torch.int16).view(torch.bfloat16).to(DEVICE)
    cut = PoolCut.whole(kv)
    staged = torch.zeros(cut.staged_shape(2), dtype=torch.bfloat16, device=DEVICE)
    cut.gather(cut.index([2, 0]), staged)
    assert torch.equal(bits(staged), bits(kv[[2, 0]]))


def test_runs_longer_than_a_program_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_BYTES", 256)
    kv, scales = some_pool((4, 2, 2, 3, 16, 24), torch.float32, 0)
    cut = PoolCut.whole(kv, scales)
    staged = torch.empty(cut.staged_shape(3), dtype=torch.float8_e4m3fn, device=DEVICE)
    cut.gather(cut.index([3, 1, 0]), staged)
    expected = reference.gather_blocks(kv, [3, 1, 0], range(2), range(3), torch.float8_e4m3fn, scales)
    assert torch.equal(bits(staged), bits(expected))


def test_numbers_beyond_8_bits_become_the_largest_there_are() -> None:
    kv = torch.tensor([1e6, -1e6, 448.0, 0.0] * 4, device=DEVICE).view(1, 1, 2, 1, 2, 4)
    cut = PoolCut.whole(kv, torch.ones(1, 2, 1, device=DEVICE))
    staged = torch.empty(cut.staged_shape(1), dtype=torch.float8_e4m3fn, device=DEVICE)
    cut.gather(cut.index([0]), staged)
    assert staged.float().flatten().tolist() == [448.0, -448.0, 448.0, 0.0] * 4


def test_what_cannot_be_moved_is_refused() -> None:
    kv, scales = some_pool((3, 2, 2, 2, 16, 8), torch.bfloat16, 0)
    cut = PoolCut.whole(kv)
    with pytest.raises(InternalError, match=r"blocks \[3, -1\] are not among the 3"):
        cut.index([0, 3, -1])
    index = cut.index([1])
    with pytest.raises(InternalError, match=r"staging for 1 blocks is contiguous \[1, 2, 2, 2, 16, 8\]"):
        cut.gather(index, torch.empty(1, 2, 2, 2, 16, 4, dtype=torch.bfloat16))
    with pytest.raises(InternalError, match="need scales"):
        cut.scatter(index, torch.empty(cut.staged_shape(1), dtype=torch.float8_e4m3fn))
    for layers, heads, named in (
        (range(1, 3), range(2), "layers"),
        (range(2), range(1, 1), "heads"),
        (range(0, 2, 2), range(2), "layers"),
    ):
        with pytest.raises(InternalError, match=named):
            PoolCut(kv, layers, heads)
    with pytest.raises(InternalError, match=r"scales must be float32 \[2, 2, 2\]"):
        PoolCut.whole(kv, scales[:1])
    with pytest.raises(InternalError, match="contiguous"):
        PoolCut.whole(kv.transpose(3, 4))
    with pytest.raises(InternalError, match="a pool is"):
        PoolCut.whole(kv[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("staged_type", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_pools_of_more_than_2_to_the_31_elements(staged_type: torch.dtype) -> None:
    kv = torch.zeros(2200, 32, 2, 8, 16, 128, dtype=torch.bfloat16, device=DEVICE)
    ids = [2199, 0, 2100, 7]
    kv[ids] = torch.randn(4, *kv.shape[1:], dtype=torch.bfloat16, device=DEVICE)
    scales = torch.full((32, 2, 8), 0.02, device=DEVICE)
    cut = PoolCut(kv, range(30, 32), range(3, 8), scales)
    staged = torch.empty(cut.staged_shape(4), dtype=staged_type, device=DEVICE)
    cut.gather(cut.index(ids), staged)
    expected = reference.gather_blocks(kv, ids, cut.layers, cut.heads, staged_type, scales)
    # A quotient that is approximated may round the other way, rarely, by one step of 8 bits.
    assert ((staged.float() - expected.float()).abs() <= expected.float().abs() / 8 + 1e-3).all()
    assert float((bits(staged) != bits(expected)).float().mean()) < 1e-4
