"""Sampling: what is drawn, how often, and that nothing but the key decides it."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from baton.core.request import Attempt, SamplingParams
from baton.core.step import StepRow
from baton.engine.sampler import sample
from baton.kernels import reference
from hypothesis import given, settings
from hypothesis import strategies as st

GREEDY = SamplingParams(temperature=0.0)


def row(params: SamplingParams, output_index: int = 0) -> StepRow:
    return StepRow(Attempt("r", 1), 0, (1,), (0,), params, output_index, True)


def draw(logits: torch.Tensor, *rows: StepRow) -> list[int]:
    return [output.tokens[0] for output in sample(logits.clone(), rows)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [3, 64, 1000, 16384])
def test_greedy_takes_the_lowest_of_tied_tokens(dtype: torch.dtype, size: int) -> None:
    rng = random.Random(size)
    logits = torch.zeros(5, size, dtype=dtype)
    expected = []
    for i in range(5):
        tied = rng.sample(range(size), 2)
        logits[i, tied] = 1.0
        expected.append(min(tied))
    assert draw(logits, *[row(GREEDY)] * 5) == expected


def test_rows_of_all_kinds_in_one_batch_equal_rows_alone() -> None:
    torch.manual_seed(0)
    kinds = [
        GREEDY,
        SamplingParams(seed=3),
        SamplingParams(seed=3, top_k=5),
        SamplingParams(seed=4, temperature=0.5, top_p=0.7),
        SamplingParams(seed=2**62, temperature=2.0, top_k=300, top_p=0.9, logprobs=3),
        SamplingParams(temperature=0.0, logprobs=0),
        SamplingParams(seed=9, min_tokens=5, stop_token_ids=(1, 2)),
    ]
    rows = [row(params, index) for index in range(4) for params in kinds]
    logits = torch.randn(len(rows), 1000) * 3
    together = sample(logits.clone(), rows)
    for i, each in enumerate(rows):
        alone = sample(logits[i : i + 1].clone(), [each])[0]
        assert together[i].tokens == alone.tokens
        assert [p.token for p in together[i].logprobs] == [p.token for p in alone.logprobs]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    sequence=st.integers(0, 20),
    index=st.integers(0, 5000),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.6]),
    top_k=st.sampled_from([0, 1, 4, 50]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    flat=st.booleans(),
)
def test_draws_equal_the_reference(
    seed: int, sequence: int, index: int, temperature: float, top_k: int, top_p: float, flat: bool
) -> None:
    logits = torch.randn(600, generator=torch.Generator().manual_seed(seed % 1000)) * (0.05 if flat else 3.0)
    params = SamplingParams(temperature, top_k, top_p, seed, sequence)
    kept = reference.truncate(logits, temperature, top_k, top_p)
    assert draw(logits[None], row(params, index)) == [reference.gumbel_sample(kept, seed, sequence, index)]


def test_truncation_at_a_tie_keeps_all_that_tie() -> None:
    logits = torch.full((1, 2000), 1.0).index_fill(1, torch.arange(100), 0.0)
    seen = {draw(logits, row(SamplingParams(top_k=3, top_p=0.9999, seed=seed)))[0] for seed in range(60)}
    assert len(seen) > 40
    assert min(seen) >= 100


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.5, top_k=4),
        SamplingParams(temperature=0.9, top_p=0.8),
        SamplingParams(temperature=1.2, top_k=6, top_p=0.7),
    ],
)
@pytest.mark.parametrize("vary", ["seed", "sequence_index", "output_index"])
def test_draws_have_the_right_distribution(params: SamplingParams, vary: str) -> None:
    """Chi-square over 4,000 draws; each part of the key alone must give independent draws."""
    logits = torch.tensor([1.0, 0.3, -0.5, 2.0, 1.7, 0.0, -1.0, 0.9])
    exact = torch.softmax(reference.truncate(logits, params.temperature, params.top_k, params.top_p), 0)
    num_draws = 4000
    base = replace(params, seed=1234567)
    if vary == "output_index":
        rows = [row(base, i) for i in range(num_draws)]
    else:
        rows = [row(replace(base, **{vary: i})) for i in range(num_draws)]
    counts = torch.bincount(torch.tensor(draw(logits.expand(num_draws, -1), *rows)), minlength=8)
    assert (counts[exact == 0] == 0).all()
    possible = exact > 0
    expected = exact[possible] * num_draws
    chi_square = float(((counts[possible] - expected) ** 2 / expected).sum())
    # 99.9 % quantiles of chi-square with 1 to 7 degrees of freedom.
    assert chi_square < [10.8, 13.8, 16.3, 18.5, 20.5, 22.5, 24.3][int(possible.sum()) - 2]


def test_tiny_temperature_is_greedy_and_finite() -> None:
    logits = torch.randn(1, 500) * 100
    assert draw(logits, row(SamplingParams(temperature=1e-30))) == [int(logits.argmax())]


def test_stop_tokens_are_banned_until_min_tokens() -> None:
    logits = torch.arange(10.0)[None]
    for params in (GREEDY, SamplingParams(temperature=0.01, seed=5)):
        held = replace(params, min_tokens=3, stop_token_ids=(9, 8, 4000))
        assert [draw(logits, row(held, i))[0] for i in range(5)] == [7, 7, 7, 9, 9]


def test_logprobs_are_raw() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    exact = torch.log_softmax(logits[0], 0).tolist()
    params = SamplingParams(temperature=0.0, min_tokens=1, stop_token_ids=(2,), logprobs=2)
    output = sample(logits.clone(), [row(params)])[0]
    assert output.tokens == (3,)
    report = output.logprobs[0]
    assert report.token == 3
    assert report.logprob == pytest.approx(exact[3])
    assert [token for token, _ in report.top] == [2, 3]
    assert [value for _, value in report.top] == pytest.approx([exact[2], exact[3]])
    none = sample(logits.clone(), [row(GREEDY)])[0]
    assert none.logprobs == ()
    without_top = sample(logits.clone(), [row(replace(GREEDY, logprobs=0))])[0]
    assert without_top.logprobs[0].top == ()
    assert math.isfinite(without_top.logprobs[0].logprob)
