"""What the kernels are told of a step, against what the rows say."""

from __future__ import annotations

import random

import pytest
import torch
from baton.core.errors import InternalError
from baton.kernels.batch import RowSpan
from baton.kernels.triton import step_tensors
from baton.kernels.triton.step_tensors import (
    PART_TOKENS,
    StepTensors,
    decode_sizes,
    exact_sizes,
    part_aim,
    upload,
    write_rows,
)
from hypothesis import given
from hypothesis import strategies as st

BLOCK = 16
SHAPES = st.lists(st.tuples(st.integers(0, 900), st.sampled_from([1, 1, 1, 2, 7, 40])), min_size=1, max_size=8)


def make_rows(shapes: list[tuple[int, int]], seed: int = 0) -> list[RowSpan]:
    draw = random.Random(seed)
    rows, offset = [], 0
    for start, num_tokens in shapes:
        table = tuple(draw.sample(range(1000), -(-(start + num_tokens) // BLOCK)))
        rows.append(RowSpan(offset, num_tokens, start, table))
        offset += num_tokens
    return rows


def check(tensors: StepTensors, rows: list[RowSpan]) -> None:
    """Every row is described once, decode rows first; the rest is padding."""
    sizes = tensors.sizes
    decode, prefill = [r for r in rows if r.num_tokens == 1], [r for r in rows if r.num_tokens > 1]
    places = [*range(len(decode)), *range(sizes.num_decode, sizes.num_decode + len(prefill))]
    for place, row in zip(places, decode + prefill, strict=True):
        assert tensors.block_tables[place, : len(row.block_table)].tolist() == list(row.block_table)
        told = tensors.starts[place], tensors.lengths[place], tensors.offsets[place]
        assert [int(x) for x in told] == [row.start, row.end, row.offset]
        expected = [row.block_table[p // BLOCK] * BLOCK + p % BLOCK for p in range(row.start, row.end)]
        assert tensors.slots[row.offset : row.offset + row.num_tokens].tolist() == expected
    used = sum(row.num_tokens for row in rows)
    assert (tensors.slots[used:] == -1).all()
    padding = sorted(set(range(sizes.num_rows)) - set(places))
    assert (tensors.lengths[padding] == 0).all()
    owned = [int(o) for o in tensors.offsets[padding] if o >= 0]
    assert owned == list(range(used, used + len(owned)))
    check_parts(tensors)


def check_parts(tensors: StepTensors) -> None:
    first = tensors.first_parts.tolist()
    assert first[0] == 0
    parts = [[row, part] for row in range(tensors.sizes.num_decode) for part in range(first[row + 1] - first[row])]
    assert tensors.parts[: len(parts)].tolist() == parts
    assert (tensors.parts[len(parts) :, 0] == -1).all()
    counts = torch.tensor(first).diff()
    assert torch.equal(counts > 0, tensors.lengths[: tensors.sizes.num_decode] > 0)


@given(shapes=SHAPES, seed=st.integers(0, 1000), aim=st.integers(1, 30))
def test_an_upload_says_what_the_rows_say(shapes: list[tuple[int, int]], seed: int, aim: int) -> None:
    rows = make_rows(shapes, seed)
    tensors = upload(rows, BLOCK, aim, torch.device("cpu"))
    assert tensors.sizes == exact_sizes(rows, aim)
    check(tensors, rows)
    assert tensors.parts.shape[0] == int(tensors.first_parts[-1])  # nothing to spare


@given(contexts=st.lists(st.integers(0, 16 * BLOCK - 1), min_size=1, max_size=9), spare=st.integers(0, 3), aim=st.integers(1, 30))
def test_a_bucket_is_written_again_and_again(contexts: list[int], spare: int, aim: int) -> None:
    sizes = decode_sizes(len(contexts) + spare, 16, BLOCK, aim)
    tensors = StepTensors.over(torch.full((sizes.num_words,), 77, dtype=torch.int32), sizes)
    for rows in (make_rows([(16 * BLOCK - 1, 1)] * sizes.num_rows), make_rows([(context, 1) for context in contexts])):
        write_rows(tensors, rows, BLOCK, aim)
        check(tensors, rows)
    assert (tensors.offsets >= 0).all()  # every padding row of a decode bucket has a token


def test_parts_are_as_long_as_each_other_and_fill_the_device() -> None:
    aim = part_aim(8, 132)
    rows = make_rows([(4095, 1)] * 8)
    tensors = upload(rows, BLOCK, aim, torch.device("cpu"))
    assert aim * 0.8 < tensors.sizes.num_parts <= aim + len(rows)
    lopsided = upload(make_rows([(15_999, 1), (PART_TOKENS - 1, 1), (0, 1)]), BLOCK, aim, torch.device("cpu"))
    assert lopsided.first_parts.diff().tolist() == [-(-16_000 // PART_TOKENS), 1, 1]


def test_pointers_and_strides_are_aligned() -> None:
    """Triton compiles a kernel again for another alignment: a graph's first replay must not be the first to see one."""
    for shapes in ([(5, 1)] * 3, [(5, 1), (0, 7), (100, 3)]):
        tensors = upload(make_rows(shapes), BLOCK, 3, torch.device("cpu"))
        for part in (tensors.block_tables, tensors.starts, tensors.lengths, tensors.offsets, tensors.slots, tensors.parts):
            assert (part.data_ptr() - tensors.block_tables.data_ptr()) % (4 * step_tensors.ALIGNMENT) == 0
        assert tensors.sizes.max_blocks % step_tensors.TABLE_ALIGNMENT == 0


@pytest.mark.parametrize("shapes", [[(0, 1)] * 3, [(0, 2)], [(16 * BLOCK, 1)]], ids=["rows", "prefill", "blocks"])
def test_what_does_not_fit_is_refused(shapes: list[tuple[int, int]]) -> None:
    sizes = decode_sizes(2, 16, BLOCK, 4)
    tensors = StepTensors.over(torch.zeros(sizes.num_words, dtype=torch.int32), sizes)
    with pytest.raises(InternalError, match="do not fit"):
        write_rows(tensors, make_rows(shapes), BLOCK, 4)


def test_wrong_memory_and_another_aim_are_refused() -> None:
    sizes = decode_sizes(2, 64, BLOCK, 2)
    with pytest.raises(InternalError, match="need int32"):
        StepTensors.over(torch.zeros(sizes.num_words), sizes)
    tensors = StepTensors.over(torch.zeros(sizes.num_words, dtype=torch.int32), sizes)
    with pytest.raises(InternalError, match="the same aim"):
        write_rows(tensors, make_rows([(1000, 1)] * 2), BLOCK, 8)
