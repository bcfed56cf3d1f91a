"""Lengths: what they draw, what is fitted to a trace, and what is said about forms that are none."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import pytest
from baton.core.errors import InvalidRequest
from baton.simulator.workload.lengths import (
    EmpiricalLengths,
    IndependentLengths,
    Length,
    Quantiles,
    fit_lengths,
    parse_length,
)
from baton.simulator.workload.planned import PlannedRequest
from baton.simulator.workload.published import SHAREGPT, SPLITWISE_CODE
from baton.simulator.workload.traces import read_trace
from hypothesis import given
from hypothesis import strategies as st

CONVERSATIONS = Path(__file__).parents[4] / "shared" / "data" / "azure2023" / "AzureLLMInferenceTrace_conv.csv"


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("512", 512, 512),
        ("uniform:3,9", 3, 9),
        ("uniform:5,5", 5, 5),
        ("exponential:100", 1, 10**6),
        ("lognormal:100,0.8", 1, 10**6),
    ],
)
def test_lengths_stay_in_their_range_and_print_as_written(text: str, low: int, high: int) -> None:
    length = parse_length(text, "input-len")
    random = Random(0)
    drawn = [length.draw(random) for _ in range(2000)]
    assert low <= min(drawn) <= max(drawn) <= high
    assert str(length) == text


def test_distributions_have_the_mean_they_name() -> None:
    random = Random(1)
    exponential = [parse_length("exponential:100", "x").draw(random) for _ in range(4000)]
    uniform = {parse_length("uniform:3,5", "x").draw(random) for _ in range(200)}
    assert 90 < sum(exponential) / len(exponential) < 110
    assert uniform == {3, 4, 5}


def test_a_lognormal_has_the_mean_and_the_spread_it_names() -> None:
    random = Random(2)
    drawn = [parse_length("lognormal:1000,0.5", "x").draw(random) for _ in range(20_000)]
    mean = sum(drawn) / len(drawn)
    assert mean == pytest.approx(1000, rel=0.02)
    assert math.sqrt(sum((value - mean) ** 2 for value in drawn) / len(drawn)) / mean == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    "text",
    [
        "", "0", "-3", "1.5", "many", "uniform:5", "uniform:9,3", "uniform:0,3", "normal:5", "exponential:",
        "lognormal:5", "lognormal:0,1", "lognormal:5,0", "lognormal:5,-1", "lognormal:5,inf", "lognormal:5,x", "lognormal:5,1,1",
    ],
)  # fmt: skip
def test_a_bad_length_names_the_option_and_what_is_allowed(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"output-len.*uniform:LOW,HIGH.*lognormal:MEAN,CV") as raised:
        parse_length(text, "output-len")
    assert raised.value.field == "output-len"


def test_quantiles_are_hit() -> None:
    quantiles = Quantiles(((0.0, 10), (0.5, 100), (0.9, 400), (1.0, 400)))
    random = Random(3)
    drawn = sorted(quantiles.draw(random) for _ in range(20_000))
    assert (drawn[0], drawn[-1]) == (10, 400)
    assert drawn[10_000] == pytest.approx(100, rel=0.05)
    assert drawn[18_200] == 400
    assert sum(drawn) / len(drawn) == pytest.approx(quantiles.mean, rel=0.02)
    assert [quantiles.share_below(tokens) for tokens in (9, 100, 399.999, 400)] == pytest.approx([0.0, 0.5, 0.9, 1.0], abs=1e-5)


@pytest.mark.parametrize(
    "knots",
    [
        (),
        ((0.0, 1.0),),
        ((0.1, 1), (1.0, 2)),
        ((0.0, 1), (0.9, 2)),
        ((0.0, 0), (1.0, 2)),
        ((0.0, 3), (1.0, 2)),
        ((0.0, 1), (0.5, 2), (0.4, 3), (1.0, 4)),
    ],
)
def test_knots_that_are_no_distribution_are_refused(knots: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(InvalidRequest, match="rise from 0 to 1"):
        Quantiles(knots)


def test_a_pair_that_the_model_cannot_hold_is_cut() -> None:
    lengths = IndependentLengths(Length("fixed", 900, 900), Length("uniform", 1, 2000), max_total=1000)
    randoms = Random(0), Random(1)
    drawn = [lengths.draw(*randoms) for _ in range(500)]
    assert all(prompt >= 1 and answer >= 1 and prompt + answer <= 1000 for prompt, answer in drawn)
    assert any(prompt == 900 for prompt, _ in drawn)
    assert any(answer == 999 for _, answer in drawn)


def test_pairs_of_a_trace_are_drawn_as_pairs() -> None:
    pairs = ((10, 1000), (1000, 10), (500, 500))
    lengths = EmpiricalLengths.of(PlannedRequest(i, 0.0, *pair) for i, pair in enumerate(pairs))
    randoms = Random(0), Random(1)
    drawn = [lengths.draw(*randoms) for _ in range(3000)]
    assert set(drawn) == set(pairs)
    assert all(900 < drawn.count(pair) < 1100 for pair in pairs)
    assert lengths.fit().correlation == pytest.approx(-1.0)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=200))
def test_a_fit_keeps_the_mean_and_its_errors_are_shares(lengths: list[int]) -> None:
    fit = fit_lengths(lengths)
    assert fit.mean == pytest.approx(sum(lengths) / len(lengths))
    assert fit.count == len(lengths)
    assert 0 <= fit.quantile_error <= 1
    assert 0 <= fit.lognormal_error <= 1
    assert fit.quantiles.draw(Random(0)) in range(min(lengths), max(lengths) + 1)


def test_a_fit_of_many_lengths_is_close_and_knows_how_close() -> None:
    random = Random(4)
    drawn = [Length("lognormal", 1, 800, 0.9).draw(random) for _ in range(4000)]
    fit = fit_lengths(drawn)
    assert fit.lognormal.cv == pytest.approx(0.9, rel=0.1)
    assert fit.lognormal_error < 0.03
    assert fit.quantile_error < 0.02
    two_kinds = fit_lengths([100] * 500 + [900] * 500)
    assert two_kinds.lognormal_error > 0.2, "what is no lognormal says so"


def test_nothing_can_be_fitted_to_nothing() -> None:
    with pytest.raises(InvalidRequest, match="empty workload"):
        EmpiricalLengths.of(())
    with pytest.raises(InvalidRequest, match="cannot be fitted"):
        fit_lengths([])
    with pytest.raises(InvalidRequest, match="cannot be fitted"):
        fit_lengths([0, 4])


def test_the_conversation_trace_and_its_fit() -> None:
    if not CONVERSATIONS.exists():
        pytest.skip("the trace is not beside this checkout (shared/data)")
    lengths = EmpiricalLengths.of(read_trace(CONVERSATIONS, "azure"))
    fit = lengths.fit()
    assert fit.input.mean == pytest.approx(1154.7, abs=0.1)
    assert fit.input.quantile_error < 0.04
    assert fit.output.quantile_error < 0.04
    assert fit.input.lognormal_error > fit.input.quantile_error
    randoms = Random(0), Random(1)
    drawn = [fit.draw(*randoms) for _ in range(10_000)]
    assert sum(prompt for prompt, _ in drawn) / 10_000 == pytest.approx(fit.input.mean, rel=0.05)


def test_published_workloads_have_the_published_figures() -> None:
    randoms = Random(0), Random(1)
    chat = [SHAREGPT.draw(*randoms) for _ in range(20_000)]
    assert sum(prompt for prompt, _ in chat) / len(chat) == pytest.approx(755.5, rel=0.03)
    assert sum(answer for _, answer in chat) / len(chat) == pytest.approx(200.3, rel=0.03)
    assert max(prompt + answer for prompt, answer in chat) <= 2048

    code = [SPLITWISE_CODE.draw(*randoms) for _ in range(40_000)]
    for place, mean, deciles in ((0, 2048, (147, 1469, 5186, 7436)), (1, 28, (7, 13, 55, 249))):
        values = sorted(pair[place] for pair in code)
        assert sum(values) / len(values) == pytest.approx(mean, rel=0.03)
        found = [values[int(share * len(values))] for share in (0.1, 0.5, 0.9, 0.99)]
        assert found == pytest.approx(deciles, rel=0.06)
