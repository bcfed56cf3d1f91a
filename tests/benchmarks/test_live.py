"""Simulated against served: what counts as within, where goodput is, and what service adds to a step."""

from __future__ import annotations

import dataclasses

import pytest
from baton.core.errors import Unavailable
from baton.core.observed import ObservedStep
from baton.core.shape import StepShape
from baton.core.slo import Slo
from baton.simulator.cost import LinearCost
from baton.simulator.records import RequestOutcome
from live_calibration import LEAST_STEPS, calibrate
from live_compare import Cell, Comparison, Figures, Load, Prediction, compare, figures_of, goodput_of, markdown, verdict

SLO = Slo(ttft=1.0, tpot=0.05)


def figures(attainment: float, ttft: float = 0.4, tpot: float = 0.01) -> Figures:
    return Figures(100, attainment, ttft, 2 * ttft, tpot, 2 * tpot)


def at(rate: float, predicted: float, live: float) -> Comparison:
    return compare(Prediction(Load("mixed", f"poisson-{rate:g}", rate), figures(predicted)), [figures(live)])


def test_figures_count_all_that_was_offered() -> None:
    ended = [
        RequestOutcome(0, "", 0.0, 8, 11, first_token=0.5, end=0.7, num_tokens=11),
        RequestOutcome(1, "", 1.0, 8, 11, first_token=2.5, end=2.7, num_tokens=11),  # late
        RequestOutcome(2, "", 2.0, 8, 11, error="UNAVAILABLE", end=2.0),
    ]
    found = figures_of(ended, SLO)
    assert (found.num_offered, found.attainment) == (3, pytest.approx(1 / 3))
    assert found.ttft_p50 == pytest.approx(1.0)
    assert found.tpot_p90 == pytest.approx(0.02)
    with pytest.raises(ValueError, match="none of 1 requests finished"):
        figures_of(ended[2:], SLO)


def test_within_is_a_share_or_the_spread_of_the_repeats() -> None:
    prediction = Prediction(Load("mixed", "poisson-1", 1.0), figures(0.9, ttft=0.5))
    steady = compare(prediction, [figures(0.86, ttft=0.40), figures(0.86, ttft=0.41), figures(0.8, ttft=0.42)])
    assert steady.attainment.live == 0.86
    assert steady.attainment.within
    assert not steady.times["ttft_p50"].within  # 22% off, spread 0.02
    assert compare(prediction, [figures(0.84, ttft=0.35), figures(0.84, ttft=0.45)]).times["ttft_p50"].within
    assert not compare(prediction, [figures(0.84)]).attainment.within


def test_goodput_is_where_the_attainment_crosses_the_target() -> None:
    (goodput,) = goodput_of([at(1.0, 1.0, 1.0), at(2.0, 1.0, 0.8), at(3.0, 0.8, 0.0)], 0.9).values()
    assert (goodput.predicted, goodput.live) == (pytest.approx(2.5), pytest.approx(1.5))
    assert not goodput.within
    (always,) = goodput_of([at(1.0, 1.0, 1.0), at(2.0, 0.95, 0.9)], 0.9).values()
    assert (always.predicted, always.live, always.within) == (2.0, 2.0, True)


def test_the_report_marks_what_is_not_within() -> None:
    comparisons = [at(1.0, 1.0, 1.0), at(2.0, 1.0, 0.8)]
    goodputs = goodput_of(comparisons, 0.9)
    text = markdown(comparisons, goodputs)
    assert "| poisson-1 | 1.00 | 100 / 100 (+0) |" in text
    assert "| **100 / 80 (+20)** |" in text
    last = verdict(comparisons, goodputs)
    assert (last["within"], last["of"]) == (9, 11)  # an attainment and the goodput are not
    assert last["worst_attainment_points"] == pytest.approx(20.0)
    assert Cell(1.1, 1.0, 0.0, 0.1).error == pytest.approx(0.1)


def test_what_service_adds_is_found_again_whatever_single_steps_do() -> None:
    alone = LinearCost(step=0.004, token=0.0007, floor_tokens=4, decode_context=1e-6)
    shapes = [StepShape(decode_rows=rows, decode_context=300 * rows, sampled=rows) for rows in range(1, LEAST_STEPS + 1)]
    seconds = [0.001 + 1.2 * alone.seconds(shape) + 0.0002 * shape.sampled for shape in shapes]
    steps = [ObservedStep(shape, time, time + 0.0005) for shape, time in zip(shapes, seconds, strict=True)]
    found = calibrate(alone, steps)
    assert (found.step, found.share, found.token) == (pytest.approx(0.001), pytest.approx(0.2), pytest.approx(0.0002))
    assert found.overhead == pytest.approx(0.0005)
    assert found.num_steps == len(shapes)
    assert found.cost(alone).seconds(shapes[3]) == pytest.approx(seconds[3])
    stalled = [*steps, dataclasses.replace(steps[0], seconds=1.0)]  # decides nothing but the sum
    cost = calibrate(alone, stalled).cost(alone)
    assert sum(cost.seconds(each.shape) for each in stalled) == pytest.approx(sum(seconds) + 1.0)
    assert cost.seconds(shapes[3]) / cost.seconds(shapes[9]) == pytest.approx(seconds[3] / seconds[9])
    with pytest.raises(Unavailable, match="at least 16"):
        calibrate(alone, steps[:5])
