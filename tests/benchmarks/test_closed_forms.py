"""The figures of queueing theory that the simulator is held against, and that it holds them."""

from __future__ import annotations

import closed_forms
import pytest


@pytest.mark.parametrize("system", closed_forms.SYSTEMS, ids=lambda system: system.name)
def test_a_simulated_queue_obeys_its_formula(system: closed_forms.System) -> None:
    compared = closed_forms.compare(system, 0.3, 8000)
    assert abs(compared.relative) < closed_forms.TOLERANCE
    assert compared.worst < 1e-6


def test_the_formulas_are_those_of_the_paper() -> None:
    device, stages, ranks, replicas = closed_forms.SYSTEMS
    d, k = closed_forms.SECONDS, closed_forms.SPEEDUP
    assert device.mean_ttft(5.0) == pytest.approx(d + 5 * d**2 / (2 * (1 - 5 * d)))
    assert stages.mean_ttft(5.0) == pytest.approx(d + 5 * d**2 / (4 * (2 - 5 * d)))
    assert ranks.mean_ttft(5.0) == pytest.approx(d / k + 5 * (d / k) ** 2 / (2 * (1 - 5 * d / k)))
    assert replicas.mean_ttft(15.0) == pytest.approx(device.mean_ttft(5.0))
