"""Argmax, truncation and draws against the reference and the CPU, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from baton.core.errors import InternalError
from baton.kernels import cpu, reference
from baton.kernels.batch import DrawSpec
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from baton.kernels.draw_words import NUM_FIELDS, pack
from baton.kernels.triton.sampling import argmax, draw, sample
from baton.kernels.triton.slices import SLICE, Rows, summarise
from baton.kernels.triton.truncation import MAX_HELD, find_limits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SPECS = st.builds(
    DrawSpec,
    temperature=st.sampled_from([0.01, 0.7, 1.0, 1.6]),
    top_k=st.sampled_from([0, 0, 1, 5, 50, 3000, 10**6]),
    top_p=st.sampled_from([1.0, 1.0, 0.9999, 0.95, 0.5, 0.01, 0.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**63 - 1),
    sequence_index=st.integers(0, 20),
    output_index=st.integers(0, 5000),
)


def some_logits(
    num_rows: int, vocabulary: int, spread: float, rounded: bool = False, banned: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """float32 [num_rows, vocabulary], on the CPU; one token at least is possible."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocabulary, generator=generator) * spread
    logits = logits.round() if rounded else logits
    logits = logits.masked_fill(torch.rand(num_rows, vocabulary, generator=generator) < banned, -math.inf)
    logits[:, seed % vocabulary] = 1.0
    return logits


def kept(logits: torch.Tensor, specs: Sequence[DrawSpec]) -> torch.Tensor:
    """Which tokens stay in the race: bool [R, V]."""
    rows = Rows.of(logits.to(DEVICE))
    limits = find_limits(rows, summarise(rows), pack(specs).to(DEVICE)).cpu()
    temperatures = torch.tensor([spec.temperature for spec in specs])[:, None]
    distances = (logits.amax(-1, keepdim=True) - logits) / temperatures
    return distances.view(torch.int32) <= limits[:, None]


@settings(max_examples=25, deadline=None)
@given(
    specs=st.lists(SPECS, min_size=1, max_size=3),
    vocabulary=st.sampled_from([1, 5, 64, 600, 5000]),
    spread=st.sampled_from([0.05, 1.0, 3.0, 30.0]),
    rounded=st.booleans(),
    banned=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 10**6),
)
# More ties than a program holds; more undecided tokens than it holds, by count and by mass.
@example([DrawSpec(1.0, 7, 0.9, 0.0, 1, 0, 0)], 5000, 0.05, True, 0.0, 3)
@example([DrawSpec(1.0, 3000, 1.0, 0.0, 1, 0, 0), DrawSpec(1.6, 3000, 0.5, 0.05, 1, 0, 0)], 5000, 0.05, False, 0.0, 3)
@example([DrawSpec(1.0, 0, 0.95, 0.0, 1, 0, 0), DrawSpec(0.7, 0, 0.5, 0.5, 1, 0, 0)], 5000, 0.05, False, 0.4, 3)
def test_the_tokens_kept_and_drawn_are_those_of_the_cpu(
    specs: list[DrawSpec], vocabulary: int, spread: float, rounded: bool, banned: float, seed: int
) -> None:
    logits = some_logits(len(specs), vocabulary, spread, rounded, banned, seed)
    expected = [
        reference.truncate(row, spec.temperature, spec.top_k, spec.top_p, spec.min_p) > -math.inf
        for row, spec in zip(logits, specs, strict=True)
    ]
    assert torch.equal(kept(logits, specs), torch.stack(expected))
    tokens = draw(logits.to(DEVICE), specs)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == cpu.draw(logits.clone(), specs).tolist()
    if vocabulary <= 64:
        assert tokens.tolist() == reference.draw(logits, specs).tolist()


def test_a_row_is_drawn_the_same_in_any_company() -> None:
    specs = [DrawSpec(0.9, 40 * (i % 2), 1.0 - 0.05 * (i % 3), 0.0, 7 + i, i, 100 + i) for i in range(6)]
    logits = some_logits(6, SLICE + 100, 2.0).to(DEVICE)
    together = draw(logits, specs).tolist()
    assert [int(draw(logits[i : i + 1], specs[i : i + 1])) for i in range(6)] == together
    assert len(set(together)) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_and_drawn_rows_together(dtype: torch.dtype) -> None:
    """Half precision is drawn from as it comes: its numbers are float32's, and many of them tie."""
    logits = some_logits(5, 700, 2.0).to(dtype)
    specs = [DrawSpec(t, 20, 0.9, 0.0, 11, 0, i) for i, t in enumerate((0.0, 1.0, 0.0, 0.6, 1.3))]
    # Parameters of a graph may have room for more rows.
    parameters = pack(specs, torch.empty(NUM_FIELDS, 8, dtype=torch.int32)).to(DEVICE)
    expected = logits.float().argmax(-1)
    drawn = [1, 3, 4]
    expected[drawn] = cpu.draw(logits.float()[drawn], [specs[i] for i in drawn])
    assert sample(logits.to(DEVICE), parameters).tolist() == expected.tolist()
    apart = torch.full((5, 900), 50.0, dtype=dtype)
    apart[:, 100:800] = logits
    assert sample(apart.to(DEVICE)[:, 100:800], parameters).tolist() == expected.tolist()


def test_parameters_without_specs_are_greedy() -> None:
    logits = some_logits(3, 50, 1.0).to(DEVICE)
    filled = pack([], torch.full((NUM_FIELDS, 3), 77, dtype=torch.int32)).to(DEVICE)
    assert sample(logits, filled).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 15, 1000, 2 * SLICE + 7])
def test_the_lowest_of_the_likeliest_tokens(dtype: torch.dtype, vocabulary: int) -> None:
    logits = some_logits(8, vocabulary, 1.0).to(dtype)
    logits[:4] = logits[:4].round()  # many are equal, within slices and across them
    logits[3] = -math.inf
    logits[3, vocabulary - 1] = -7.0
    expected = [row.index(max(row)) for row in logits.tolist()]
    got = argmax(logits.to(DEVICE))
    assert got.dtype == torch.int64
    assert got.tolist() == expected


def test_tokens_are_within_the_vocabulary_whatever_the_logits() -> None:
    logits = torch.full((3, SLICE + 5), math.nan)
    logits[1] = -math.inf
    logits[2] = math.inf
    for specs in ([DrawSpec(0.0, 0, 1.0, 0.0, 1, 0, 0)] * 3, [DrawSpec(1.0, 5, 0.9, 0.1, 1, 0, 0)] * 3):
        tokens = draw(logits.to(DEVICE), specs)
        assert bool(((tokens >= 0) & (tokens < SLICE + 5)).all())


def test_no_rows_no_tokens() -> None:
    assert draw(torch.zeros(0, 10, device=DEVICE), []).tolist() == []
    assert argmax(torch.zeros(0, 10, device=DEVICE)).tolist() == []


def test_what_cannot_be_sampled_is_refused() -> None:
    logits = torch.zeros(2, 10, device=DEVICE)
    with pytest.raises(InternalError, match="2 rows of logits cannot be drawn from with 1 specs"):
        draw(logits, [DrawSpec(1.0, 0, 1.0, 0.0, 1, 0, 0)])
    with pytest.raises(InternalError, match="contiguous"):
        argmax(torch.zeros(10, 2, device=DEVICE).t())
    with pytest.raises(InternalError, match=r"numbers \[R, V\]"):
        argmax(torch.zeros(2, 10, dtype=torch.int64, device=DEVICE))
    with pytest.raises(InternalError, match=r"not torch\.float32"):
        sample(logits, torch.zeros(NUM_FIELDS, 2, device=DEVICE))
    with pytest.raises(InternalError, match=r"2 rows .* not \[8, 1\]"):
        sample(logits, torch.zeros(NUM_FIELDS, 1, dtype=torch.int32, device=DEVICE))
    with pytest.raises(InternalError, match=r"int32 tensor \[8, R\]"):
        pack([DrawSpec(1.0, 0, 1.0, 0.0, 1, 0, 0)], torch.zeros(NUM_FIELDS, 0, dtype=torch.int32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("vocabulary", "spread"), [(128256, 2.5), (151936, 0.3), (262144, 8.0)])
def test_vocabularies_of_real_models(vocabulary: int, spread: float) -> None:
    """A sum that is taken in another order may move the border of top-p by a token: tokens are compared, and few may differ."""
    logits = some_logits(64, vocabulary, spread)
    specs = [
        DrawSpec(0.6 + i % 3 / 4, (0, 20, 1000, MAX_HELD + 1)[i % 4], (1.0, 0.95, 0.5)[i % 3], 0.0, i, 0, i) for i in range(64)
    ]
    got, expected = draw(logits.to(DEVICE), specs).tolist(), cpu.draw(logits.clone(), specs).tolist()
    assert sum(a != b for a, b in zip(got, expected, strict=True)) <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_captured_graph_draws_with_what_the_parameters_hold_when_it_runs() -> None:
    logits = some_logits(16, 5000, 2.0).to(DEVICE)
    parameters = pack([], torch.empty(NUM_FIELDS, 16, dtype=torch.int32)).to(DEVICE)
    sample(logits, parameters)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample(logits, parameters)
    for output_index in range(3):
        specs = [DrawSpec(1.0, 50, 0.9, 0.0, 5, i, output_index) for i in range(16)]
        parameters.copy_(pack(specs))
        graph.replay()
        assert tokens.tolist() == draw(logits, specs).tolist()
