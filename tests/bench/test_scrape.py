"""Handoff figures, read from what the router's own metrics render."""

from __future__ import annotations

import math

import pytest
from baton.bench.scrape import bucket_quantile, read_handoffs
from baton.observability.metrics import Metrics


def test_figures_of_the_routers_metrics() -> None:
    metrics = Metrics()
    for exposed in (0.001, 0.002, 0.003):
        metrics.handoff("shm", 4_000_000, 0.0004, exposed)
    metrics.handoff("grpc", 4_000_000, 0.004, 0.02)
    figures = read_handoffs(metrics.render().decode())
    assert figures is not None
    assert (figures.count, figures.transports, figures.bytes_mean) == (4, ("grpc", "shm"), 4e6)
    assert figures.exposed_mean == pytest.approx(0.0065)
    assert 0.001 <= figures.exposed_p50 <= 0.0025
    assert figures.rate == pytest.approx(16e6 / 0.0052)
    assert figures.push_mean == pytest.approx(0.0013)
    assert str(figures).startswith("4 over grpc, shm: ")
    assert "6.5 ms mean from first token to acknowledgement" in str(figures)
    assert str(figures).endswith("4.00 MB each, pushed and acknowledged in 1.3 ms (3.08 GB/s)")


def test_no_handoff_no_figures() -> None:
    assert read_handoffs(Metrics().render().decode()) is None


@pytest.mark.parametrize(
    ("buckets", "value"),
    [
        ([(1.0, 2.0), (2.0, 4.0), (math.inf, 4.0)], 1.0),
        ([(1.0, 0.0), (3.0, 10.0), (math.inf, 10.0)], 2.0),
        ([(1.0, 1.0), (math.inf, 10.0)], 1.0),
    ],
)
def test_medians_from_buckets(buckets: list[tuple[float, float]], value: float) -> None:
    assert bucket_quantile(buckets, 0.5) == value
