"""The native kernels against the reference, on this machine's instructions and on the plainest ones."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from baton.core.errors import Unavailable
from baton.kernels import cpu, native, native_build, reference
from baton.kernels.batch import AttentionSpec, DrawSpec, RowSpan
from baton.kernels.cpu import CpuLinear
from baton.kernels.native import NativeLibrary
from baton.kernels.native_build import build_native
from baton.kernels.native_parts import CHUNK_BYTES, HUGE_PAGE, NativeAttention, NativeLinear, WeightMemory
from baton.kernels.table import KERNELS, make_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

LAYERS = 2
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 0.04}


@pytest.fixture(scope="module", params=["native", "x86-64"])
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    try:
        # Unoptimised code is compiled in a third of the time.
        options = () if request.param == "native" else ("-O1",)
        build_native(request.param, options)
    except Unavailable as error:
        pytest.skip(str(error))
    return NativeLibrary(2, deterministic=True, architecture=request.param, options=options)


def pool_of(
    shapes: Sequence[tuple[int, int]], kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, list[RowSpan]]:
    """Rows of (start, num_tokens) in a pool of NaN that holds keys and values before each row's start, and nothing else."""
    torch.manual_seed(seed)
    counts = [-(-(start + n) // block_size) for start, n in shapes]
    blocks = list(range(sum(counts) + 2))
    random.Random(seed).shuffle(blocks)
    kv = torch.full((len(blocks), LAYERS, 2, kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
    rows, offset = [], 0
    for (start, n), count in zip(shapes, counts, strict=True):
        rows.append(RowSpan(offset, n, start, tuple(blocks.pop() for _ in range(count))))
        offset += n
        for layer in range(LAYERS):
            keys, values = torch.randn(2, start, kv_heads, head_dim).to(dtype)
            reference.write_kv(kv, layer, RowSpan(0, start, 0, rows[-1].block_table), keys, values)
    return kv, rows


SHAPES = st.lists(
    st.one_of(st.tuples(st.integers(0, 90), st.just(1)), st.tuples(st.integers(0, 70), st.integers(2, 75))),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(
    shapes=SHAPES,
    heads=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2, 3, 4, 7])),
    block_size=st.sampled_from([4, 16, 32]),
    head_dim=st.sampled_from([8, 64, 80, 96, 128, 256]),
    sharpness=st.sampled_from([0.7, 1.5]),
    window=st.sampled_from([None, None, 5, 40]),
    softcap=st.sampled_from([None, None, 4.0]),
    turned=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    in_place=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_attention_equals_the_reference(
    library: NativeLibrary,
    shapes: list[tuple[int, int]],
    heads: tuple[int, int],
    block_size: int,
    head_dim: int,
    sharpness: float,
    window: int | None,
    softcap: float | None,
    turned: bool,
    dtype: torch.dtype,
    in_place: bool,
    seed: int,
) -> None:
    kv_heads, group = heads
    kv, rows = pool_of(shapes, kv_heads, block_size, head_dim, dtype, seed)
    expected_kv = kv.clone()
    qkv = torch.randn(sum(row.num_tokens for row in rows), (group + 2) * kv_heads, head_dim).to(dtype)
    angles = 6 * torch.rand(len(qkv), head_dim // 2)
    turn = (angles.cos().to(dtype), angles.sin().to(dtype)) if turned else None
    spec = AttentionSpec(sharpness / math.sqrt(head_dim), window, softcap)
    library.deterministic = not in_place
    ours, plain = library.attention(kv, rows), reference.ReferenceAttention(expected_kv, rows)
    assert isinstance(ours, NativeAttention)
    for layer in range(LAYERS):
        got, expected = ours.run(layer, qkv.clone(), spec, turn), plain.run(layer, qkv.clone(), spec, turn)
        torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(kv, expected_kv, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deterministic_token_is_the_same_however_it_came(library: NativeLibrary, dtype: torch.dtype) -> None:
    length, kv_heads, group, head_dim = 150, 2, 3, 64
    qkv = torch.randn(length, (group + 2) * kv_heads, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    angles = torch.arange(length)[:, None] * torch.rand(head_dim // 2, generator=torch.Generator().manual_seed(2))
    turn = angles.cos().to(dtype), angles.sin().to(dtype)
    library.deterministic = True

    def served(pieces: Sequence[int], seed: int) -> Tensor:
        """All tokens, fed in pieces that end at the given positions, each beside a neighbour."""
        kv, (row, beside) = pool_of([(0, length), (20, 7)], kv_heads, 16, head_dim, dtype, seed)
        outputs, start = [], 0
        for end in pieces:
            piece = RowSpan(0, end - start, start, row.block_table[: -(-end // 16)])
            neighbour = RowSpan(end - start, 7, 20, beside.block_table)
            noise = torch.randn(7, *qkv.shape[1:]).to(dtype)
            both = torch.cat((qkv[start:end], noise)).contiguous()
            turns = [torch.cat((part[start:end], part[20:27])) for part in turn]
            out = library.attention(kv, [piece, neighbour]).run(0, both, AttentionSpec(0.125), (turns[0], turns[1]))
            outputs.append(out[: end - start])
            start = end
        return torch.cat(outputs)

    whole = served([length], 0)
    assert torch.equal(served([70, 71, 72, 131, length], 1), whole)
    assert torch.equal(served(range(1, length + 1), 2), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(300, 32), (64, 96), (17, 66), (128, 256)])
def test_linear_equals_the_reference_and_keeps_rows_apart(
    library: NativeLibrary, dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(shape).to(dtype) for shape in ((outputs, inputs), (outputs,), (70, inputs)))
    for added in (None, bias):
        linear = library.linear(weight, added)
        assert isinstance(linear, NativeLinear)
        wide = x.double() @ weight.double().T + (0 if added is None else added.double())
        tolerance = 1e-5 if dtype == torch.float32 else 0.01
        torch.testing.assert_close(linear(x), wide.to(dtype), rtol=tolerance, atol=tolerance * 10)
        for count in (1, 2, 5, 6, 7, 13, 65):  # the same bits in any company
            assert torch.equal(linear(x[:count]), linear(x)[:count])
            assert torch.equal(linear(x[-count:]), linear(x)[-count:])
    assert linear(x[:0]).shape == (0, outputs)
    index = torch.tensor([0, outputs - 1, 3, 3])
    assert torch.equal(linear.rows(index), weight[index])


def test_weights_too_large_for_the_caches_give_the_same_bits(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear, x = library.linear(torch.randn(256, 128).bfloat16(), None), torch.randn(3, 128).bfloat16()
    cached = [(linear(x[:count]), linear.gated("silu", x[:count])) for count in (1, 3)]
    monkeypatch.setattr(native, "LARGEST_CACHED", 0)
    library.linear(torch.randn(64, 64).bfloat16(), None)  # one more than the caches hold
    for count, (product, gated) in zip((1, 3), cached, strict=True):
        assert torch.equal(linear(x[:count]), product)
        assert torch.equal(linear.gated("silu", x[:count]), gated)


def test_weights_lie_one_behind_the_other_in_whole_huge_pages() -> None:
    memory = WeightMemory()
    sizes = (100, HUGE_PAGE // 4, 7, CHUNK_BYTES // 4, 33)
    weights = [memory.take(words) for words in sizes]
    for number, (weight, words) in enumerate(zip(weights, sizes, strict=True)):
        assert weight.numel() == words
        assert weight.data_ptr() % 64 == 0
        weight.fill_(number)
    assert weights[0].data_ptr() % HUGE_PAGE == 0
    assert weights[1].data_ptr() == weights[0].data_ptr() + 448  # on the next cache line
    assert [int(weight.sum()) for weight in weights] == [number * words for number, words in enumerate(sizes)]


def test_rows_outside_of_the_weight_are_refused(library: NativeLibrary) -> None:
    linear = library.linear(torch.zeros(20, 4), None)
    for wrong in (-1, 20):
        with pytest.raises(IndexError, match="in \\[0, 20\\)"):
            linear.rows(torch.tensor([wrong]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 40, 768])
def test_norms_and_gates_equal_the_reference(library: NativeLibrary, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    x, delta, weight = (3 * torch.randn(shape).to(dtype) for shape in ((9, size), (9, size), (size,)))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.005}[dtype]
    total, normed = library.add_rms_norm(x, delta, weight, 1e-6)
    expected_total, expected_normed = reference.add_rms_norm(x, delta, weight, 1e-6)
    for got, expected in (
        (library.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)),
        (library.rms_norm(x[:, None].expand(9, 2, size), weight, 1e-6)[:, 1], reference.rms_norm(x, weight, 1e-6)),
        (total, expected_total),
        (normed, expected_normed),
    ):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("inner", [64, 192, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_gated_linears_equal_their_two_steps(
    library: NativeLibrary, dtype: torch.dtype, activation: str, inner: int, biased: bool
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(2 * inner, 32).to(dtype), torch.randn(70, 32).to(dtype)
    linear = library.linear(weight, torch.randn(2 * inner).to(dtype) if biased else None)
    assert isinstance(linear, NativeLinear)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(
        linear.gated(activation, x), reference.GATES[activation](linear(x)), rtol=tolerance, atol=tolerance
    )
    for count in (0, 1, 7):  # the same bits in any company
        assert torch.equal(linear.gated(activation, x[:count]), linear.gated(activation, x)[:count])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_that_overflow(library: NativeLibrary, activation: str) -> None:
    gates = torch.tensor([-1e4, 1e4, -90.0, 0.0] + [1.0] * 60)
    linear = library.linear(torch.cat((gates, torch.ones(64)))[:, None], None)
    one = torch.ones(1, 1)
    torch.testing.assert_close(linear.gated(activation, one), reference.GATES[activation](linear(one)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 1000])
def test_the_lowest_of_the_likeliest_tokens(library: NativeLibrary, dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, vocabulary).to(dtype)
    logits[:20] = logits[:20].round()  # many are equal
    logits[3] = -math.inf
    assert library.argmax(logits).tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert reference.argmax(logits).tolist() == library.argmax(logits).tolist()


@settings(max_examples=40, deadline=None)
@given(
    specs=st.lists(
        st.builds(
            DrawSpec,
            temperature=st.sampled_from([0.01, 0.7, 1.0, 1.6]),
            top_k=st.sampled_from([0, 0, 1, 5, 50, 10**6]),
            top_p=st.sampled_from([1.0, 1.0, 0.9999, 0.95, 0.5, 0.01]),
            min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
            seed=st.integers(0, 2**63 - 1),
            sequence_index=st.integers(0, 20),
            output_index=st.integers(0, 5000),
        ),
        min_size=1,
        max_size=5,
    ),
    vocabulary=st.sampled_from([1, 5, 64, 600, 5000]),
    spread=st.sampled_from([0.05, 1.0, 3.0, 30.0]),
    rounded=st.booleans(),
    banned=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 10**6),
)
def test_draws_equal_those_of_torch(
    library: NativeLibrary, specs: list[DrawSpec], vocabulary: int, spread: float, rounded: bool, banned: float, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(len(specs), vocabulary) * spread
    logits = logits.round() if rounded else logits
    logits = logits.masked_fill(torch.rand(len(specs), vocabulary) < banned, -math.inf)
    logits[:, seed % vocabulary] = 1.0
    assert library.draw(logits, specs).tolist() == cpu.draw(logits.clone(), specs).tolist()
    if vocabulary <= 600:
        assert library.draw(logits, specs).tolist() == reference.draw(logits, specs).tolist()


def test_other_types_take_the_way_of_torch(library: NativeLibrary) -> None:
    assert isinstance(library.linear(torch.zeros(4, 4, dtype=torch.float16), None), CpuLinear)
    assert isinstance(library.linear(torch.zeros(4, 3, dtype=torch.bfloat16), None), CpuLinear)
    kv, rows = pool_of([(3, 1)], 1, 4, 8, torch.float16, 0)
    assert not isinstance(library.attention(kv, rows), NativeAttention)


def test_without_a_compiler_the_torch_kernels_serve(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native_build, "COMPILERS", ("no-such-compiler",))
    with pytest.raises(Unavailable, match="no C\\+\\+ compiler"):
        make_kernels("native")
    with pytest.raises(Unavailable, match="no C\\+\\+ compiler"):
        make_kernels("auto", deterministic=True)
    assert make_kernels("auto") is KERNELS["cpu"]
    assert "slower kernels of torch serve" in caplog.text
    with pytest.raises(Unavailable, match="not deterministic"):
        make_kernels("cpu", deterministic=True)


def test_what_the_compiler_says_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.cpp").write_text("this is not C++")
    monkeypatch.setattr(native_build, "SOURCES", tmp_path)
    with pytest.raises(Unavailable, match=r"no C\+\+ compiler|broken\.cpp"):
        build_native()
    assert not list(tmp_path.glob("build/*.so"))
