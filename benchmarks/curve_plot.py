"""One picture of a `Curve`: goodput, attainment, TTFT and TPOT against the offered rate, all systems in each.

It says on itself what was measured, against which objectives, how often, and what is missing.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from curve import Curve, Point
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLOURS = ("#2f6fde", "#e08a1e", "#1d8653", "#cf3340", "#7a52c7", "#60686f", "#0e8f9c", "#b0457f")
MARKERS = "osD^vPX*"
DPI = 160


@dataclass(frozen=True, slots=True)
class Panel:
    """One of the four. `value` None means that a point has none."""

    title: str
    axis: str
    value: Callable[[Point], float | None]
    log: bool = False
    rule: float | None = None
    rule_label: str = ""


def draw(curve: Curve, stem: Path) -> None:
    """Write `stem`.png and `stem`.svg. Makes missing folders."""
    matplotlib.use("Agg")
    from matplotlib import pyplot  # after the choice of a backend without a screen

    setting = curve.setting
    panels = (
        Panel("Goodput", "requests/s that met both objectives", lambda point: point.attainment * point.rate),
        Panel(
            "Attainment",
            "share of all offered requests, %",
            lambda point: 100 * point.attainment,
            False,
            100 * setting.target,
            "target",
        ),
        Panel("Time to first token", "p50, seconds", lambda point: point.ttft_p50, True, setting.ttft, "objective"),
        Panel("Time per output token", "p50, ms", lambda point: _ms(point.tpot_p50), False, 1000 * setting.tpot, "objective"),
    )
    stem.parent.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "goodput"}):
        figure, axes = pyplot.subplots(2, 2, figsize=(11.5, 8.6))
        for panel, place in zip(panels, axes.flat, strict=True):
            _draw_panel(curve, panel, place)
        _mark_diagonal(curve, axes.flat[0])
        below = _footnotes(curve)
        bottom = 0.02 + 0.017 * len(below)
        figure.suptitle(_title(curve), x=0.01, y=0.992, ha="left", va="top", fontsize=13, fontweight="bold")
        figure.text(0.01, 0.958, _subtitle(curve), ha="left", va="top", color="#60686f")
        handles = [Line2D([], [], color=c, marker=m, label=_legend(curve, label)) for label, c, m in _styles(curve)]
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0.005, 0.925), ncols=min(4, max(1, len(handles))), frameon=False
        )
        figure.text(0.01, 0.01, "\n".join(below), ha="left", va="bottom", fontsize=8, color="#60686f")
        rows = -(-len(handles) // 4)
        figure.tight_layout(rect=(0, bottom, 1, 0.925 - 0.022 * rows))
        for ending in ("png", "svg"):
            figure.savefig(stem.with_suffix(f".{ending}"), dpi=DPI, metadata={"Date": None} if ending == "svg" else None)
        pyplot.close(figure)


def _draw_panel(curve: Curve, panel: Panel, axes: Axes) -> None:
    """Lines through medians over turns, bars from the least to the most of them."""
    for number, (label, colour, marker) in enumerate(_styles(curve)):
        places, middles, lows, highs = [], [], [], []
        for rate in curve.rates(label):
            values = curve.values(label, rate, panel.value)
            if not values:
                continue
            middle = statistics.median(values)
            places.append(rate)
            middles.append(middle)
            lows.append(middle - values[0])
            highs.append(values[-1] - middle)
        size = max(3.5, 9.5 - 1.9 * number)  # equal values must not hide each other
        axes.errorbar(
            places, middles, yerr=(lows, highs), color=colour, marker=marker, markersize=size, linewidth=1.6, capsize=2.5
        )
    axes.set_title(panel.title, loc="left", fontweight="bold")
    axes.set_xlabel("offered requests/s (Poisson)")
    axes.set_ylabel(panel.axis)
    if panel.rule is not None:  # before the limits are set: it must be in view
        axes.axhline(panel.rule, color="#1c2024", linewidth=1, linestyle=(0, (5, 4)))
        axes.annotate(
            f"{panel.rule_label} {panel.rule:g}", (1, panel.rule), xycoords=("axes fraction", "data"), va="bottom", ha="right"
        )
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.05 * axes.dataLim.ymax if axes.dataLim.ymax > (panel.rule or 0) else None)
    axes.set_xlim(left=0, right=1.05 * max((point.rate for point in curve.points), default=1.0))
    axes.grid(color="#eceef0")
    axes.set_axisbelow(True)


def _mark_diagonal(curve: Curve, axes: Axes) -> None:
    """Where a system would be that met the objectives of every request."""
    end = max((point.rate for point in curve.points), default=1.0)
    axes.plot((0, end), (0, end), color="#1c2024", linewidth=1, linestyle=(0, (1, 3)))
    axes.set_ylim(top=1.05 * end)
    axes.annotate("every request", (end, end), xytext=(-8, 0), textcoords="offset points", ha="right", va="center", fontsize=8.5)


def _styles(curve: Curve) -> list[tuple[str, str, str]]:
    return [(label, COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]) for number, label in enumerate(curve.labels)]


def _legend(curve: Curve, label: str) -> str:
    goodput = curve.goodput(label)
    return f"{label}: {f'goodput {goodput:g}/s' if goodput else 'under the target at every rate tried'}"


def _title(curve: Curve) -> str:
    return f"Requests per second within TTFT ≤ {curve.setting.ttft:g} s and TPOT ≤ {1000 * curve.setting.tpot:g} ms"


def _subtitle(curve: Curve) -> str:
    setting = curve.setting
    return f"{setting.model}, {setting.input_tokens} tokens in / {setting.output_tokens} out, {setting.machine}"


def _footnotes(curve: Curve) -> list[str]:
    """What the picture rests on, and what is missing from it."""
    points = curve.points
    turns = [
        len(curve.values(label, rate, lambda point: point.attainment)) for label in curve.labels for rate in curve.rates(label)
    ]
    offered, each = _range([point.num_offered for point in points]), _range(turns)
    notes = [
        f"{offered} requests a point, {each} turn{'' if each == '1' else 's'} of each: medians, bars from least to most. "
        f"Attainment counts all offered requests; goodput of a system is the largest rate tried up to which it "
        f"stays at {curve.setting.target:.0%} or above. Measured {_dates(points)}."
    ]
    tried = sorted({point.rate for point in points})
    for label in curve.labels:
        explained = any(note.startswith(f"{label}: ") for note in curve.notes)
        if not explained and (missing := [f"{rate:g}" for rate in tried if rate not in curve.rates(label)]):
            notes.append(f"Not measured: {label} at {', '.join(missing)}/s.")
    notes += dict.fromkeys(curve.notes)
    for point in points:
        notes += (f"{point.label} at {point.rate:g}/s: {complaint}" for complaint in point.complaints)
    return [line for note in notes for line in textwrap.wrap(note, 190)][:14]


def _range(values: Sequence[int]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{low}" if low == high else f"{low} to {high}"


def _dates(points: Sequence[Point]) -> str:
    days = sorted({point.at[:10] for point in points})
    return "never" if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
