"""The copy plan against a plain gather and scatter over the whole model's KV."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from baton.core.errors import TransferRefused
from baton.core.kv import KVLayout
from baton.kv_transfer.plan import plan_copies
from baton.kv_transfer.transport import Copy
from hypothesis import given, settings
from hypothesis import strategies as st

NUM_BLOCKS = 9


def cuts(draw, total: int) -> list[tuple[int, int]]:
    """[0, total) in consecutive (start, length) pieces."""
    inner = draw(st.sets(st.integers(1, total - 1), max_size=3)) if total > 1 else set()
    edges = [0, *sorted(inner), total]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


@st.composite
def ends(draw):
    """Layouts of all ranks of two workers that serve the same model, and a sequence."""
    num_layers, num_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    head_dim, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(["float32", "bfloat16"]))

    def worker(block_size: int) -> list[KVLayout]:
        layers, heads = cuts(draw, num_layers), cuts(draw, num_heads)
        copies = draw(st.integers(1, 2))  # replicated KV heads
        return [
            KVLayout(nl, nh, head_dim, block_size, dtype, fl, fh) for fl, nl in layers for fh, nh in heads for _ in range(copies)
        ]

    source_size = draw(st.integers(1, 5))
    target_size = draw(st.one_of(st.just(source_size), st.integers(1, 5)))
    num_tokens = draw(st.integers(1, NUM_BLOCKS * min(source_size, target_size)))
    source_table = draw(st.permutations(range(NUM_BLOCKS)))[: -(-num_tokens // source_size)]
    target_table = draw(st.permutations(range(NUM_BLOCKS)))[: -(-num_tokens // target_size)]
    first = draw(st.integers(0, len(target_table)))
    count = draw(st.integers(0, len(target_table) - first))
    return worker(source_size), worker(target_size), source_table, target_table, num_tokens, first, count


def pool_array(layout: KVLayout) -> np.ndarray:
    shape = (NUM_BLOCKS, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim, layout.item_bytes)
    return np.zeros(shape, np.uint8)


def model_slice(model: np.ndarray, layout: KVLayout, position: int) -> np.ndarray:
    """The part of `model[token, layer, 2, head, dim, byte]` that a rank holds for one token."""
    layers = slice(layout.first_layer, layout.first_layer + layout.num_layers)
    heads = slice(layout.first_head, layout.first_head + layout.num_kv_heads)
    return model[position, layers, :, heads]


@settings(max_examples=250, deadline=None)
@given(ends())
def test_equals_gather_and_scatter(case):
    sources, targets, source_table, target_table, num_tokens, first, count = case
    num_layers = max(layout.first_layer + layout.num_layers for layout in sources)
    num_heads = max(layout.first_head + layout.num_kv_heads for layout in sources)
    layout = sources[0]
    shape = (num_tokens, num_layers, 2, num_heads, layout.head_dim, layout.item_bytes)
    model = np.random.default_rng(0).integers(1, 256, shape, np.uint8)
    source_pools, target_pools = [pool_array(s) for s in sources], [pool_array(t) for t in targets]
    for rank, source in enumerate(sources):
        for position in range(num_tokens):
            block, slot = source_table[position // source.block_size], position % source.block_size
            source_pools[rank][block, :, :, :, slot] = model_slice(model, source, position)

    copies = plan_copies(sources, targets, source_table, target_table, num_tokens, first, count)

    written = [np.zeros(pool.size, np.uint8) for pool in target_pools]
    for copy in copies:
        assert copy.num_bytes > 0
        start, end = copy.target_offset, copy.target_offset + copy.num_bytes
        origin = source_pools[copy.source_rank].reshape(-1)[copy.source_offset : copy.source_offset + copy.num_bytes]
        assert len(origin) == copy.num_bytes
        target_pools[copy.target_rank].reshape(-1)[start:end] = origin
        written[copy.target_rank][start:end] += 1
    for rank, target in enumerate(targets):
        assert written[rank].max(initial=0) <= 1, "a byte is written once"
        blocks = set(target_table[first : first + count])
        touched = written[rank].reshape(NUM_BLOCKS, -1).any(axis=1)
        assert {int(b) for b in touched.nonzero()[0]} <= blocks
        for position in range(first * target.block_size, min(num_tokens, (first + count) * target.block_size)):
            block, slot = target_table[position // target.block_size], position % target.block_size
            expected = model_slice(model, target, position)
            assert (target_pools[rank][block, :, :, :, slot] == expected).all()


LAYOUT = KVLayout(num_layers=3, num_kv_heads=4, head_dim=8, block_size=16, dtype="bfloat16")
SIZE = LAYOUT.block_bytes


def test_equal_layouts_need_one_run_per_contiguous_stretch():
    copies = plan_copies([LAYOUT], [LAYOUT], [4, 5, 6, 9, 2], [1, 2, 3, 4, 8], num_tokens=5 * 16)
    assert copies == [
        Copy(4 * SIZE, 1 * SIZE, 3 * SIZE),
        Copy(9 * SIZE, 4 * SIZE, SIZE),
        Copy(2 * SIZE, 8 * SIZE, SIZE),
    ]


def test_a_partial_last_block_is_copied_whole():
    assert plan_copies([LAYOUT], [LAYOUT], [4, 5], [1, 2], num_tokens=17) == [Copy(4 * SIZE, SIZE, 2 * SIZE)]


def test_pipeline_ranks_need_one_run_per_block():
    stages = [replace(LAYOUT, num_layers=2), replace(LAYOUT, num_layers=1, first_layer=2)]
    copies = plan_copies([LAYOUT], stages, [3, 5], [0, 1], num_tokens=32)
    assert [copy.target_rank for copy in copies] == [0, 0, 1, 1]
    assert copies[2] == Copy(3 * SIZE + 2 * SIZE // 3, 0, SIZE // 3, 0, 1)


def test_replicated_heads_come_from_one_rank():
    copies = plan_copies([LAYOUT, LAYOUT], [LAYOUT], [0], [0], num_tokens=16)
    assert copies == [Copy(0, 0, SIZE)]


def test_nothing_to_copy():
    assert plan_copies([LAYOUT], [LAYOUT], [], [3, 4], num_tokens=32, first_block=2) == []


@pytest.mark.parametrize(
    ("source", "target", "table", "match"),
    [
        (LAYOUT, replace(LAYOUT, dtype="float32"), [0, 1], "bfloat16 cannot be copied into a pool of dtype float32"),
        (LAYOUT, replace(LAYOUT, head_dim=16), [0, 1], "head_dim 8 cannot be copied into a pool with 16"),
        (LAYOUT, replace(LAYOUT, num_layers=4), [0, 1], "no source rank has KV of layer 3, head 0"),
        (LAYOUT, replace(LAYOUT, num_kv_heads=6), [0, 1], "no source rank has KV of layer 0, head 4"),
        (LAYOUT, LAYOUT, [0], "KV of 32 tokens lies in 2 source blocks, the table has 1"),
    ],
)
def test_what_cannot_be_copied_is_refused(source, target, table, match):
    with pytest.raises(TransferRefused, match=match):
        plan_copies([source], [target], table, [3, 4], num_tokens=32)


def test_ranks_of_one_worker_must_agree():
    with pytest.raises(TransferRefused, match="differ in block size"):
        plan_copies([LAYOUT, replace(LAYOUT, block_size=8)], [LAYOUT], [0], [0], num_tokens=16)
    with pytest.raises(TransferRefused, match="at least one rank"):
        plan_copies([], [LAYOUT], [0], [0], num_tokens=16)
    with pytest.raises(TransferRefused, match="not within a table of 1"):
        plan_copies([LAYOUT], [LAYOUT], [0, 1], [0], num_tokens=32, first_block=0, num_blocks=2)
