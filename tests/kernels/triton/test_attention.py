"""The attention of Triton against the reference: in Triton's interpreter on small steps, and on a device on larger ones."""

from __future__ import annotations

import pytest
import torch
from baton.core.errors import InternalError
from baton.kernels import reference
from baton.kernels.batch import AttentionSpec, RowSpan
from baton.tests.kernels.triton.attention_rig import Problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from baton.kernels.triton.attention import TritonAttention, attention_of_rows
from baton.kernels.triton.step_tensors import StepTensors, decode_sizes, write_rows

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 0.005}
MIXED = [(0, 17), (13, 1), (300, 1), (40, 9), (0, 1), (15, 2)]
DECODE = [(13, 1), (300, 1), (0, 1), (143, 1)]


def check(problem: Problem) -> None:
    """Outputs, what is stored where, and that nothing else is written."""
    rows, num_blocks = problem.rows()
    kv = problem.pool(rows, num_blocks)
    before = kv.clone()
    qkv, turn = problem.inputs()
    scales = problem.scales
    got = attention_of_rows(kv, rows, scales).run(problem.layer, qkv.clone(), problem.spec, turn)
    turned = (
        qkv if turn is None else torch.cat((reference.rotary(qkv[:, : -problem.kv_heads], *turn), qkv[:, -problem.kv_heads :]), 1)
    )
    check_stored(problem, kv, before, rows, turned)
    tolerance = TOLERANCE[problem.dtype]
    expected = problem.expected(kv, rows, turned)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def check_stored(problem: Problem, kv: Tensor, before: Tensor, rows: list[RowSpan], turned: Tensor) -> None:
    expected = problem.seen_by(before)
    new = turned[:, -2 * problem.kv_heads :].float().unflatten(1, (2, -1))
    written = torch.zeros(before.shape[0], problem.block_size, dtype=torch.bool)
    for row in rows:
        for i in range(row.num_tokens):
            place = row.start + i
            block, slot = row.block_table[place // problem.block_size], place % problem.block_size
            expected[block, problem.layer, :, :, slot] = new[row.offset + i]
            written[block, slot] = True
    tolerance = 0.07 if problem.scales is not None else TOLERANCE[problem.dtype]  # half a step of float8's 3 bits
    torch.testing.assert_close(problem.seen_by(kv), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    bits = kv.view(torch.uint8), before.view(torch.uint8)
    changed = (bits[0] != bits[1]).view(*kv.shape[:5], -1).any(-1)  # [N, L, 2, K, S]
    assert not changed[:, 1 - problem.layer].any()
    assert not changed[:, problem.layer].any(1).any(1)[~written].any()


ROWS = st.one_of(st.tuples(st.integers(0, 200), st.just(1)), st.tuples(st.integers(0, 40), st.integers(2, 20)))


@settings(max_examples=5, deadline=None)
@given(
    shapes=st.lists(ROWS, min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    group=st.sampled_from([1, 2, 5]),
    window=st.one_of(st.none(), st.integers(1, 60)),
    softcap=st.sampled_from([None, 0.7]),
)
def test_any_step(shapes: list[tuple[int, int]], seed: int, group: int, window: int | None, softcap: float | None) -> None:
    check(Problem(shapes, 1, group, 32, spec=AttentionSpec(0.3, window, softcap), seed=seed))


@pytest.mark.parametrize(
    ("head_dim", "block_size", "group"), [(64, 16, 4), (80, 32, 1), (96, 48, 3), (128, 16, 7), (256, 64, 2), (64, 16, 20)]
)
def test_head_sizes_block_sizes_and_groups(head_dim: int, block_size: int, group: int) -> None:
    check(Problem(MIXED, 2, group, head_dim, block_size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shapes", [MIXED, DECODE, [(0, 40)]], ids=["mixed", "decode", "prefill"])
def test_half_precision(dtype: torch.dtype, shapes: list[tuple[int, int]]) -> None:
    check(Problem(shapes, dtype=dtype))


@pytest.mark.parametrize("window", [1, 15, 16, 17, 100])
def test_windows_end_anywhere_in_a_tile(window: int) -> None:
    check(Problem([(0, 50), (37, 20), (130, 1), (299, 1)], 1, 2, 16, spec=AttentionSpec(0.3, window)))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_cache_in_float8_with_a_scale_for_each_head(softcap: float | None) -> None:
    scales = torch.tensor([[[0.02, 0.01], [0.03, 0.02]], [[0.01, 0.02], [0.015, 0.04]]])
    check(Problem(MIXED, dtype=torch.bfloat16, scales=scales, spec=AttentionSpec(0.15, None, softcap)))


def test_without_rotary_positions() -> None:
    check(Problem(MIXED, turned=False))


def test_a_view_of_a_larger_pool_is_attended_by_its_strides() -> None:
    problem = Problem(MIXED, 2, 2, 32)
    rows, num_blocks = problem.rows()
    kv = problem.pool(rows, num_blocks)
    wide = torch.full((num_blocks, 2, 2, 5, 16, 32), 7.0)
    wide[:, :, :, 1:3] = kv
    qkv, turn = problem.inputs()
    got = attention_of_rows(wide[:, :, :, 1:3], rows).run(1, qkv.clone(), problem.spec, turn)
    assert torch.equal(got, attention_of_rows(kv, rows).run(1, qkv.clone(), problem.spec, turn))
    assert (wide[:, :, :, [0, 3, 4]] == 7).all()


def test_a_bucket_serves_step_after_step_and_its_padding_rows_give_zeros() -> None:
    problem = Problem([(13, 1), (300, 1), (0, 1)], head_dim=32)
    rows, num_blocks = problem.rows()
    aim = 12
    sizes = decode_sizes(6, 32, 16, aim)
    words = torch.full((sizes.num_words,), 99, dtype=torch.int32)
    step = StepTensors.over(words, sizes)
    kv = problem.pool(rows, num_blocks)
    attention = TritonAttention(kv, step)
    for taken in (rows, rows[:1]):
        write_rows(step, taken, 16, aim)
        qkv, turn = problem.inputs()
        some = torch.full((6, *qkv.shape[1:]), float("nan"))
        some[: len(taken)] = qkv[: len(taken)]
        turns = tuple(torch.cat((part, part)) for part in turn or ())
        got = attention.run(1, some, problem.spec, (turns[0], turns[1]))
        alone = problem.pool(rows, num_blocks)
        expected = attention_of_rows(alone, taken).run(1, qkv[: len(taken)].clone(), problem.spec, (turns[0], turns[1]))
        torch.testing.assert_close(got[: len(taken)], expected, rtol=1e-5, atol=1e-5)
        assert (got[len(taken) :] == 0).all()
        untouched = set(range(num_blocks)) - {block for row in rows for block in row.block_table}
        assert kv[sorted(untouched)].isnan().all()


def test_what_the_kernels_cannot_do_is_refused() -> None:
    rows = [RowSpan(0, 1, 0, (0,))]
    with pytest.raises(InternalError, match="multiple of 16"):
        attention_of_rows(torch.zeros(1, 1, 2, 1, 8, 32), rows)
    with pytest.raises(InternalError, match="up to 256"):
        attention_of_rows(torch.zeros(1, 1, 2, 1, 16, 512), rows)
    kv = torch.zeros(1, 1, 2, 1, 16, 32)
    with pytest.raises(InternalError, match="scales must be"):
        attention_of_rows(kv, rows, torch.ones(2))
    attention = attention_of_rows(kv, rows)
    with pytest.raises(InternalError, match="of 1 tokens"):
        attention.run(0, torch.zeros(2, 3, 32), AttentionSpec(1.0), None)
    with pytest.raises(InternalError, match="above 0"):
        attention.run(0, torch.zeros(1, 3, 32), AttentionSpec(0.0), None)


LARGE = [(4095, 1), (0, 1), (77, 1), (9000, 1), (0, 2000), (3000, 513), (5, 130)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("spec", [AttentionSpec(0.1), AttentionSpec(0.1, 600), AttentionSpec(0.1, None, 20.0)])
@pytest.mark.parametrize(
    ("head_dim", "block_size", "group"), [(64, 16, 4), (80, 16, 1), (96, 32, 3), (128, 128, 7), (256, 16, 2)]
)
def test_large_steps_on_a_device(head_dim: int, block_size: int, group: int, spec: AttentionSpec) -> None:
    check(Problem(LARGE, 4, group, head_dim, block_size, torch.bfloat16, spec, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_captured_graph_serves_other_rows() -> None:
    problem = Problem([(13, 1), (3000, 1), (0, 1)], 2, 4, 128, dtype=torch.bfloat16, device="cuda")
    rows, num_blocks = problem.rows()
    aim = 100
    sizes = decode_sizes(8, 256, 16, aim)
    words = torch.zeros(sizes.num_words, dtype=torch.int32, device="cuda")
    kv = problem.pool(rows, num_blocks)
    attention = TritonAttention(kv, StepTensors.over(words, sizes))
    qkv, _ = problem.inputs()
    static = torch.zeros((8, *qkv.shape[1:]), dtype=qkv.dtype, device="cuda")
    pinned = torch.zeros(sizes.num_words, dtype=torch.int32, pin_memory=True)
    write_rows(StepTensors.over(pinned, sizes), rows[:1], 16, aim)
    words.copy_(pinned)
    attention.run(1, static, problem.spec, None)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.run(1, static, problem.spec, None)
    for taken in (rows, rows[:2]):
        write_rows(StepTensors.over(pinned, sizes), taken, 16, aim)
        words.copy_(pinned)
        static.zero_()
        static[: len(taken)] = qkv[: len(taken)]
        graph.replay()
        expected = problem.expected(kv, taken, static)
        torch.testing.assert_close(out[: len(taken)].double(), expected[: len(taken)], rtol=0.03, atol=0.03)
        assert (out[len(taken) :] == 0).all()
