"""Every backend in the table against the reference."""

from __future__ import annotations

import random

import pytest
import torch
from baton.kernels import cpu, reference
from baton.kernels.batch import AttentionSpec, RowSpan
from baton.kernels.table import KERNELS
from hypothesis import given, settings
from hypothesis import strategies as st

LAYERS, KV_HEADS, BLOCK, DIM = 2, 2, 4, 8
SPEC = AttentionSpec(DIM**-0.5)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.005}


def make_rows(shapes: list[tuple[int, int]], seed: int, clear_tail: bool = True) -> tuple[list[RowSpan], int]:
    """Rows of (start, num_tokens) with shuffled blocks; returns them and the size of the pool."""
    counts = [-(-(start + n) // BLOCK) for start, n in shapes]
    blocks = list(range(sum(counts) + 3))
    random.Random(seed).shuffle(blocks)
    rows, offset = [], 0
    for (start, n), count in zip(shapes, counts, strict=True):
        rows.append(RowSpan(offset, n, start, tuple(blocks.pop() for _ in range(count)), clear_tail))
        offset += n
    return rows, sum(counts) + 3


def written_pool(rows: list[RowSpan], num_blocks: int, dtype: torch.dtype, window: int | None = None) -> torch.Tensor:
    """A pool of NaN in which only the positions that each row sees before its start hold keys and values."""
    kv = torch.full((num_blocks, LAYERS, 2, KV_HEADS, BLOCK, DIM), float("nan"), dtype=dtype)
    for row in rows:
        first = 0 if window is None else max(0, row.start + 1 - window)
        for layer in range(LAYERS):
            prefix = RowSpan(0, row.start - first, first, row.block_table)
            shape = (prefix.num_tokens, KV_HEADS, DIM)
            reference.write_kv(kv, layer, prefix, torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))
    return kv


DECODE_ROWS = st.tuples(st.integers(0, 25), st.just(1))
CHUNKS = st.tuples(st.integers(0, 12), st.integers(2, 9))
SHAPES = st.lists(st.one_of(DECODE_ROWS, CHUNKS), min_size=1, max_size=6)


WINDOWS = st.one_of(st.none(), st.integers(1, 30))
MIXED = [(0, 17), (13, 1), (30, 1), (7, 1), (12, 5), (0, 1), (3, 1)]


@settings(max_examples=30, deadline=None)
@given(
    shapes=SHAPES, seed=st.integers(0, 10**6), group=st.sampled_from([1, 3]), window=WINDOWS, softcap=st.sampled_from([None, 0.7])
)
def test_attention_equals_the_reference(
    shapes: list[tuple[int, int]], seed: int, group: int, window: int | None, softcap: float | None
) -> None:
    check_attention(shapes, seed, group, torch.float32, AttentionSpec(0.3, window, softcap))


@pytest.mark.parametrize("spec", [SPEC, AttentionSpec(0.5, 6, 1.5)], ids=["plain", "window and softcap"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision(dtype: torch.dtype, spec: AttentionSpec) -> None:
    check_attention(MIXED, 3, 3, dtype, spec)


@pytest.mark.parametrize("window", [None, 1, 3, cpu.QUERY_TILE, cpu.QUERY_TILE + 3])
def test_attention_of_a_chunk_longer_than_a_tile(window: int | None) -> None:
    length = cpu.QUERY_TILE + 5
    check_attention([(0, length), (6, length)], 0, 1, torch.float32, AttentionSpec(0.5, window))


def test_layers_of_one_step_may_see_differently_far() -> None:
    torch.manual_seed(0)
    rows, num_blocks = make_rows(MIXED, 0)
    kv = written_pool(rows, num_blocks, torch.float32)
    plain_kv = kv.clone()
    ours, plain = KERNELS["cpu"].attention(kv, rows), KERNELS["reference"].attention(plain_kv, rows)
    qkv = torch.randn(sum(row.num_tokens for row in rows), 3 * KV_HEADS, DIM)
    for layer, window in ((0, 5), (1, None), (0, None), (1, 5), (0, 9)):
        spec = AttentionSpec(0.5, window)
        got, expected = ours.run(layer, qkv.clone(), spec, None), plain.run(layer, qkv.clone(), spec, None)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def check_attention(shapes: list[tuple[int, int]], seed: int, group: int, dtype: torch.dtype, spec: AttentionSpec = SPEC) -> None:
    torch.manual_seed(seed)
    rows, num_blocks = make_rows(shapes, seed)
    kv = written_pool(rows, num_blocks, dtype, spec.window)
    expected_kv = kv.clone()
    qkv = torch.randn(sum(row.num_tokens for row in rows), (group + 2) * KV_HEADS, DIM).to(dtype)
    angles = torch.rand(len(qkv), DIM // 2)
    turn = angles.cos().to(dtype), angles.sin().to(dtype)
    ours, plain = KERNELS["cpu"].attention(kv, rows), KERNELS["reference"].attention(expected_kv, rows)
    for layer in range(LAYERS):
        got, expected = ours.run(layer, qkv.clone(), spec, turn), plain.run(layer, qkv.clone(), spec, turn)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    untouched = set(range(num_blocks)) - {block for row in rows for block in row.block_table}
    assert kv[sorted(untouched)].isnan().all()
    for row in rows:
        for layer in range(LAYERS):
            for a, b in zip(
                reference.read_kv(kv, layer, row.block_table, row.end),
                reference.read_kv(expected_kv, layer, row.block_table, row.end),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_tail_is_left_alone_unless_asked() -> None:
    rows, num_blocks = make_rows([(1, 1)], 0, clear_tail=False)
    kv = torch.ones(num_blocks, LAYERS, 2, KV_HEADS, BLOCK, DIM)
    KERNELS["cpu"].attention(kv, rows)
    assert (kv == 1).all()
    KERNELS["cpu"].attention(kv, make_rows([(1, 1)], 0)[0])
    block = rows[0].block_table[0]
    assert (kv[block, :, :, :, 2:] == 0).all()
    assert (kv[block, :, :, :, :2] == 1).all()


@given(blocks=st.lists(st.integers(1, 60), max_size=40), limit=st.integers(0, 200))
def test_groups_hold_every_row_once_within_bounds(blocks: list[int], limit: int) -> None:
    rows = [RowSpan(i, 1, n * BLOCK - 1, tuple(range(n))) for i, n in enumerate(blocks)]
    groups = cpu.group_rows(rows, limit)
    assert sorted(row.offset for group in groups for row in group) == list(range(len(rows)))
    for group in groups:
        sizes = [len(row.block_table) for row in group]
        assert len(sizes) == 1 or (len(sizes) * max(sizes) <= limit and max(sizes) <= 2 * min(sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_elementwise_kernels_equal_the_reference(dtype: torch.dtype, num_tokens: int) -> None:
    torch.manual_seed(0)
    ours, plain = KERNELS["cpu"], KERNELS["reference"]
    x, weight = torch.randn(num_tokens, 32).to(dtype), torch.randn(32).to(dtype)
    before = x.clone()
    heads, angles = torch.randn(num_tokens, 3, 16).to(dtype), torch.rand(num_tokens, 8)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    pairs = [
        (ours.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5)),
        (cpu.silu_mul(x), reference.silu_mul(x)),
        (cpu.rotary(heads, cos, sin), reference.rotary(heads, cos, sin)),
        (cpu.gelu_mul(x), reference.gelu_mul(x)),
    ]
    for got, expected in pairs:
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(x, before)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), sequence=st.integers(0, 2**31), output=st.integers(0, 2**31), size=st.integers(1, 11))
def test_random_words_equal_the_reference(seed: int, sequence: int, output: int, size: int) -> None:
    words = cpu.philox_words(torch.tensor([seed, 1]), torch.tensor([sequence, 0]), torch.tensor([output, 9]), size)
    assert words[0].tolist() == [reference.random_word(seed, sequence, output, token) for token in range(size)]
    assert words[1].tolist() == [reference.random_word(1, 0, 9, token) for token in range(size)]


def test_exponential_noise_equals_the_reference() -> None:
    words = torch.tensor([0, 1, 77, 1 << 31, 0xFFFFFF00, 0xFFFFFFFF])
    torch.testing.assert_close(cpu.exponential_noise(words), reference.exponential_noise(words))
