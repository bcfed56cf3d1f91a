"""What was predicted and what was served, side by side. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.bench.metrics import distribution
from baton.core.slo import Slo

POINTS, SHARE, GOODPUT_SHARE = 0.05, 0.15, 0.10
TIMES = ("ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90")


class Ended(Protocol):
    """A served or a simulated request."""

    @property
    def ok(self) -> bool: ...
    @property
    def ttft(self) -> float | None: ...
    @property
    def tpot(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Load:
    """Which system, what kind of arrivals, requests/s."""

    system: str
    name: str
    rate: float

    def __str__(self) -> str:
        return f"{self.system} {self.name} at {self.rate:.2f}/s"


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run. Times in seconds over the requests that finished; attainment over all offered."""

    num_offered: int
    attainment: float
    ttft_p50: float
    ttft_p90: float
    tpot_p50: float
    tpot_p90: float

    def __str__(self) -> str:
        times = (f"{name.upper().replace('_', ' ')} {1000 * getattr(self, name):.1f}" for name in TIMES)
        return f"attainment {self.attainment:.3f}, {', '.join(times)} ms, {self.num_offered} requests"


@dataclass(frozen=True, slots=True)
class Prediction:
    load: Load
    figures: Figures


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure: predicted, the live median, and how far they may be apart."""

    predicted: float
    live: float
    spread: float
    allowed: float

    @property
    def within(self) -> bool:
        return abs(self.predicted - self.live) <= self.allowed

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.live - 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """One load; `attainment` and the four times of `TIMES`."""

    load: Load
    attainment: Cell
    times: dict[str, Cell]

    @property
    def cells(self) -> tuple[Cell, ...]:
        return (self.attainment, *self.times.values())


def figures_of(requests: Iterable[Ended], slo: Slo) -> Figures:
    """One run's, served or simulated. Raises ValueError when nothing finished."""
    every = list(requests)
    finished = [request for request in every if request.ok]
    ttft, tpot = distribution(each.ttft for each in finished), distribution(each.tpot for each in finished)
    if ttft is None or tpot is None:
        raise ValueError(f"none of {len(every)} requests finished")
    num_met = sum(slo.met_by(each.ttft, each.tpot) for each in finished)
    return Figures(len(every), num_met / len(every), ttft.p50, ttft.p90, tpot.p50, tpot.p90)


def compare(prediction: Prediction, runs: Sequence[Figures]) -> Comparison:
    """Against the median of the live repeats."""

    def cell(name: str) -> Cell:
        live = [getattr(run, name) for run in runs]
        middle, spread = statistics.median(live), max(live) - min(live)
        allowed = POINTS if name == "attainment" else max(SHARE * middle, spread)
        return Cell(getattr(prediction.figures, name), middle, spread, allowed)

    return Comparison(prediction.load, cell("attainment"), {name: cell(name) for name in TIMES})


def goodput_of(comparisons: Sequence[Comparison], target: float) -> dict[str, Cell]:
    """By system: where attainment crosses `target` among its Poisson loads, predicted and live, by the same interpolation."""
    goodputs = {}
    for system in dict.fromkeys(each.load.system for each in comparisons):
        rows = sorted(
            (each for each in comparisons if each.load.system == system and each.load.name.startswith("poisson")),
            key=lambda each: each.load.rate,
        )
        predicted = _crossing([(each.load.rate, each.attainment.predicted) for each in rows], target)
        live = _crossing([(each.load.rate, each.attainment.live) for each in rows], target)
        goodputs[system] = Cell(predicted, live, 0.0, GOODPUT_SHARE * live)
    return goodputs


def _crossing(points: Sequence[tuple[float, float]], target: float) -> float:
    """The rate at which a line through (rate, attainment) falls under `target`; the last rate when it never does."""
    before: tuple[float, float] | None = None
    for rate, attainment in points:
        if attainment < target:
            if before is None:
                return rate * attainment / target
            return before[0] + (rate - before[0]) * (before[1] - target) / (before[1] - attainment)
        before = (rate, attainment)
    return points[-1][0]


def markdown(comparisons: Sequence[Comparison], goodputs: dict[str, Cell]) -> str:
    """A table per system: predicted / live (difference); bold where it is not within."""
    lines = []
    for system, goodput in goodputs.items():
        lines += [
            f"**{system}**: goodput {_mark(goodput, f'{goodput.predicted:.2f} / {goodput.live:.2f} requests/s')}",
            "",
            "| load | req/s | attainment, % | TTFT P50, ms | TTFT P90, ms | TPOT P50, ms | TPOT P90, ms |",
            "|---|---|---|---|---|---|---|",
        ]
        for each in comparisons:
            if each.load.system == system:
                cells = [_attainment(each.attainment), *map(_time, each.times.values())]
                lines.append(f"| {each.load.name} | {each.load.rate:.2f} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def verdict(comparisons: Sequence[Comparison], goodputs: dict[str, Cell]) -> dict[str, float]:
    """Figures for the last line: how many are within, and the largest error of each kind."""
    cells = [cell for each in comparisons for cell in each.cells] + list(goodputs.values())
    worst = {name: max(abs(each.times[name].error) for each in comparisons) for name in TIMES}
    points = max(abs(each.attainment.predicted - each.attainment.live) for each in comparisons)
    return {
        "within": sum(cell.within for cell in cells),
        "of": len(cells),
        "worst_attainment_points": round(100 * points, 1),
        **{f"worst_{name}_error": round(error, 3) for name, error in worst.items()},
        **{f"goodput_error_{system}": round(cell.error, 3) for system, cell in goodputs.items()},
    }


def _attainment(cell: Cell) -> str:
    difference = 100 * (cell.predicted - cell.live)
    return _mark(cell, f"{100 * cell.predicted:.0f} / {100 * cell.live:.0f} ({difference:+.0f})")


def _time(cell: Cell) -> str:
    spread = f" ± {500 * cell.spread:.1f}" if cell.spread else ""
    return _mark(cell, f"{1000 * cell.predicted:.1f} / {1000 * cell.live:.1f}{spread} ({100 * cell.error:+.0f}%)")


def _mark(cell: Cell, text: str) -> str:
    return text if cell.within else f"**{text}**"
