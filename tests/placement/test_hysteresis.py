"""When a change is worth it: certain, and large enough."""

from __future__ import annotations

import math

import pytest
from baton.core.errors import InternalError
from baton.placement.hysteresis import Gain, gain_of, worth_it


def test_gain_of_pairs_by_hand() -> None:
    # Ratios 1.1 and 1.3: the logs' mean is ln sqrt(1.43), their standard deviation ln(1.3 / 1.1) / sqrt(2).
    gain = gain_of((10.0, 20.0), (11.0, 26.0), 0.0)
    assert gain.mean == pytest.approx(math.sqrt(1.43) - 1)
    assert gain.uncertainty == pytest.approx(math.exp(12.71 * math.log(1.3 / 1.1) / 2) - 1)
    assert gain_of((10.0, 20.0, 40.0), (12.0, 24.0, 48.0), 0.0).uncertainty == pytest.approx(0.0, abs=1e-9)
    assert gain_of((10.0, 20.0, 40.0), (12.0, 24.0, 48.0), 0.1).uncertainty == pytest.approx(math.exp(0.1) - 1)


def test_seeds_that_agree_make_sure() -> None:
    noisy = gain_of((10, 11, 9, 10, 10), (12, 10, 14, 11, 13), 0.02)
    steady = gain_of((10, 11, 9, 10, 10), (12, 13.2, 10.8, 12, 12), 0.02)
    assert noisy.mean == pytest.approx(steady.mean, abs=0.03)
    assert steady.uncertainty < 0.05 < noisy.uncertainty


@pytest.mark.parametrize(
    ("mean", "uncertainty", "minimal", "worth"),
    [
        (0.20, 0.05, 0.10, True),
        (0.20, 0.21, 0.10, False),  # within the uncertainty, however large
        (0.20, 0.20, 0.0, False),
        (0.05, 0.01, 0.10, False),  # certain, and too small
        (0.10, 0.01, 0.10, True),
        (-0.30, 0.01, 0.0, False),
        (math.inf, 0.0, 0.10, True),
        (0.0, math.inf, 0.0, False),
    ],
)
def test_worth_it(mean: float, uncertainty: float, minimal: float, worth: bool) -> None:
    assert worth_it(Gain(mean, uncertainty), minimal) is worth


def test_no_flapping() -> None:
    """After a change, the same figures seen from the other side never ask for the way back."""
    here, there = (10.0, 10.5, 9.7), (12.0, 12.9, 11.8)
    assert worth_it(gain_of(here, there, 0.02), 0.1)
    assert not worth_it(gain_of(there, here, 0.02), 0.0)


def test_what_meets_the_objectives_at_no_rate() -> None:
    assert math.isinf(gain_of((0.0, 0.0), (1.0, 2.0), 0.5).mean)
    assert str(gain_of((0.0, 0.0), (1.0, 2.0), 0.5)) == "everything"
    assert not worth_it(gain_of((0.0, 0.0), (1.0, 0.0), 0.0), 0.0)
    assert not worth_it(gain_of((0.0, 3.0), (1.0, 2.0), 0.0), 0.0)
    assert not worth_it(gain_of((1.0, 2.0), (0.0, 9.0), 0.0), 0.0)
    with pytest.raises(InternalError, match="pair by pair"):
        gain_of((1.0,), (2.0,), 0.0)
