"""The figures of a plan, as inline SVG: attainment against rate, goodput against latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..observability.svg import WIDE, Plot, Scale, fitting_scale
from .explain import Explanation
from .problem import SearchResult, Verdict

COLOURS = ("c0", "c1", "c2", "c3")
"""Classes of the page, one per family."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: `legend` is pairs of a colour class and its meaning."""

    title: str
    note: str
    svg: str
    legend: tuple[tuple[str, str], ...]
    wide: bool = False


def figures(result: SearchResult, explanation: Explanation) -> list[Figure]:
    """Those that the search has data for."""
    families = {curve.placement.family: COLOURS[number % len(COLOURS)] for number, curve in enumerate(explanation.curves)}
    observed = [verdict for verdict in result.searched if verdict.observation is not None and verdict.score > 0]
    found = [_curves(result, explanation)]
    for name, objective in (("TTFT", result.problem.slo.ttft), ("TPOT", result.problem.slo.tpot)):
        points = [(latency, verdict) for verdict in observed if (latency := p90(verdict, name)) is not None]
        if points:
            found.append(_pareto(result, name, objective, points, families))
    return found


def p90(verdict: Verdict, name: str) -> float | None:
    """Seconds, at its goodput; None where nothing was observed."""
    if verdict.observation is None:
        return None
    report = verdict.observation.report
    spread = report.ttft if name == "TTFT" else report.tpot
    return None if spread is None else spread.p90


def seconds(value: float) -> str:
    """Three digits, in ms or s."""
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def _curves(result: SearchResult, explanation: Explanation) -> Figure:
    """Rates per GPU, so that clusters of different size can be compared."""
    rates = [rate / curve.placement.num_devices for curve in explanation.curves for rate, _ in curve.points]
    plot = Plot(fitting_scale(rates), Scale(0.0, 100.0, unit=" %"), "requests/s per GPU", "attainment", WIDE)
    legend = []
    for number, curve in enumerate(explanation.curves):
        colour, size = COLOURS[number % len(COLOURS)], curve.placement.num_devices
        plot.line([(rate / size, 100 * attainment) for rate, attainment in curve.points], colour)
        for rate, attainment in curve.points:
            tip = f"{curve.placement.name}: {attainment:.1%} at {rate:.3g} requests/s ({rate / size:.3g} per GPU)"
            plot.dot(rate / size, 100 * attainment, colour, tip)
        legend.append((colour, curve.placement.name))
    target = result.problem.slo.attainment
    plot.rule_across(100 * target, f"target {target:.0%}")
    note = "Share of all offered requests that meet both objectives; the best placement of each family."
    return Figure("Attainment against rate", note, plot.svg("attainment against rate"), tuple(legend), wide=True)


def _pareto(
    result: SearchResult, name: str, objective: float, points: Sequence[tuple[float, Verdict]], families: dict[str, str]
) -> Figure:
    """The upper left is where one wants to be."""
    in_ms = max(objective, *(latency for latency, _ in points)) < 2.0
    factor, unit = (1000.0, " ms") if in_ms else (1.0, " s")
    x = fitting_scale([latency * factor for latency, _ in points], [objective * factor], unit)
    score = result.problem.objective
    y = Scale(0.0, 1.12 * max(verdict.score for _, verdict in points))
    plot = Plot(x, y, f"P90 {name} at that goodput", score.unit)
    for latency, verdict in points:
        colour = families.get(verdict.placement.family, COLOURS[-1])
        tip = f"{verdict.placement.name}: {verdict.score:.3g} {score.unit}, P90 {name} {seconds(latency)}"
        plot.dot(latency * factor, verdict.score, colour, tip, 5.0)
    plot.rule_down(objective * factor, f"objective {seconds(objective)}")
    shown = {verdict.placement.family for _, verdict in points}
    legend = tuple((colour, family) for family, colour in families.items() if family in shown)
    return Figure(
        f"{score.unit.capitalize()} against {name}", "Up and left is better.", plot.svg(f"score against {name}"), legend
    )
