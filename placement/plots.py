"""The figures of a plan, as inline SVG: attainment against rate, goodput against latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..observability.svg import WIDE, Plot, Scale, fitting_scale
from .explain import Explanation
from .problem import SearchResult, Verdict
from .trial import Observation

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
    if result.best is not None and result.best.observation is not None and result.best.observation.shown:
        found.append(_timeline(result.best, result.best.observation))
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
    plot.line([(latency * factor, verdict.score) for latency, verdict in _frontier(points)], "frontier")
    for latency, verdict in points:
        colour = families.get(verdict.placement.family, COLOURS[-1])
        tip = f"{verdict.placement.name}: {verdict.score:.3g} {score.unit}, P90 {name} {seconds(latency)}"
        plot.dot(latency * factor, verdict.score, colour, tip, 5.0)
    plot.rule_down(objective * factor, f"objective {seconds(objective)}")
    shown = {verdict.placement.family for _, verdict in points}
    legend = tuple((colour, family) for family, colour in families.items() if family in shown)
    return Figure(
        f"{score.unit[:1].upper()}{score.unit[1:]} against {name}",
        "Up and left is better; the line joins those that no other surpasses in both.",
        plot.svg(f"score against {name}"),
        legend,
    )


def _frontier(points: Sequence[tuple[float, Verdict]]) -> list[tuple[float, Verdict]]:
    """Those that no other surpasses in both latency and score, by latency."""
    kept: list[tuple[float, Verdict]] = []
    for latency, verdict in sorted(points, key=lambda point: (point[0], -point[1].score)):
        if not kept or verdict.score > kept[-1][1].score:
            kept.append((latency, verdict))
    return kept


_STAGES = (("waiting", "waiting"), ("c1", "prefill"), ("c3", "handoff"), ("c0", "decode"))
"""Colour and name of each stage, in their order."""


def _timeline(best: Verdict, observation: Observation) -> Figure:
    """A row per request; times from the first arrival."""
    shown, rows = observation.shown, len(observation.shown)
    start, end = shown[0].arrival, max(each.end or each.arrival for each in shown)
    x = Scale(0.0, max(end - start, 1e-6), unit=" s")
    plot = Plot(x, Scale(0.0, float(rows)), "time since the first of them came", "requests", WIDE, y_ticks=False)
    for row, outcome in enumerate(shown):
        marks = (outcome.arrival, outcome.prefill_start, outcome.first_token, outcome.landed, outcome.end)
        at = outcome.arrival
        for (colour, stage), until in zip(_STAGES, marks[1:], strict=True):
            if until is None or until <= at:
                continue
            tip = f"{outcome.prompt_tokens} tokens in, {outcome.output_tokens} out: {stage} {seconds(until - at)}"
            plot.bar(at - start, until - start, rows - row - 0.9, rows - row - 0.1, colour, tip)
            at = until
    note = f"{rows} requests that came one after the other, at {observation.rate:.3g} requests/s on {best.placement.name}."
    return Figure("Timeline of the best", note, plot.svg("timeline of requests"), _STAGES, wide=True)
