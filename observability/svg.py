"""A small plot as inline SVG: two scales, a frame with ticks, and marks. Colours are CSS classes of the page around it.

No script and no library: a report is one file that opens anywhere, in light and in dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDE, HALF, HEIGHT = 1120, 540, 280
LEFT, RIGHT, TOP, BOTTOM = 76, 14, 16, 44
MAX_POINTS = 800
"""Vertices of one line at most: more cannot be seen."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to [0, 1], linear or logarithmic. `unit` follows the numbers of the ticks."""

    low: float
    high: float
    log: bool = False
    unit: str = ""

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`; outside values stick to the ends."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def value(self, place: float) -> float:
        """The inverse of `place`."""
        if self.log:
            return self.low * float((self.high / self.low) ** place)
        return self.low + (self.high - self.low) * place

    def ticks(self) -> list[float]:
        """Four to eight round values within the scale."""
        if not self.log:
            step = _round_step((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            ticks = [digit * 10.0**decade for decade in decades for digit in digits]
            inside = [tick for tick in ticks if self.low * 0.999 <= tick <= self.high * 1.001]
            if len(inside) <= 8:
                break
        return inside

    def label(self, value: float) -> str:
        return f"{value:.6g}{self.unit}"


def fitting_scale(values: Sequence[float], marks: Sequence[float] = (), unit: str = "") -> Scale:
    """A scale on which `values` and `marks` can all be told apart: logarithmic when they span more than a factor of 20."""
    shown = [value for value in (*values, *marks) if value > 0] or [1.0]
    low, high = min(shown), max(shown)
    if high / low > 20:
        return Scale(low / 1.25, high * 1.25, True, unit)
    return Scale(0.0, high * 1.08, False, unit)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor for factor in (1, 2, 5, 10) if factor * power >= step * 0.999) * power


@dataclass(slots=True)
class Plot:
    """Marks in drawing order. `classes` name the page's colours."""

    x: Scale
    y: Scale
    x_title: str
    y_title: str
    width: int = HALF
    height: int = HEIGHT
    y_ticks: bool = True
    _marks: list[str] = field(default_factory=list)

    def across(self, value: float) -> float:
        return LEFT + self.x.place(value) * (self.width - LEFT - RIGHT)

    def down(self, value: float) -> float:
        return self.height - BOTTOM - self.y.place(value) * (self.height - TOP - BOTTOM)

    def dot(self, x: float, y: float, classes: str, title: str, radius: float = 3.2) -> None:
        self._add(
            f'<circle class="{classes}" cx="{self.across(x):.1f}" cy="{self.down(y):.1f}" r="{radius:.1f}">'
            f"<title>{escape(title)}</title></circle>"
        )

    def cross(self, x: float, classes: str, title: str) -> None:
        """Above the frame: something that has no y."""
        at, top = self.across(x), TOP - 12
        self._add(f'<path class="{classes}" d="M{at - 3.5:.1f} {top}l7 7m0 -7l-7 7"><title>{escape(title)}</title></path>')

    def line(self, points: Sequence[tuple[float, float]], classes: str) -> None:
        path = "L".join(f"{self.across(x):.1f} {self.down(y):.1f}" for x, y in points)
        if path:
            self._add(f'<path class="line {classes}" d="M{path}"/>')

    def steps(self, moments: Sequence[float], classes: str, top: float) -> None:
        """How many of `moments` (ascending) have passed, scaled so that all of them are `top`."""
        points = [(self.x.low, 0.0)]
        stride = -(-len(moments) // (MAX_POINTS // 2)) or 1
        reached = 0.0
        for count in range(0, len(moments), stride):
            level = top * min(count + stride, len(moments)) / len(moments)
            points += [(moments[count], reached), (moments[count], level)]
            reached = level
        points.append((self.x.high, reached))
        self.line(points, classes)

    def bar(self, x0: float, x1: float, y0: float, y1: float, classes: str, title: str = "", gap: float = 0.0) -> None:
        """A rectangle between values; `gap` pixels are left free at its right."""
        left, right, top, bottom = self.across(x0), self.across(x1), self.down(y1), self.down(y0)
        tip = f"<title>{escape(title)}</title>" if title else ""
        self._add(
            f'<rect class="{classes}" x="{left:.1f}" y="{top:.1f}" width="{max(right - left - gap, 0.6):.1f}" '
            f'height="{max(bottom - top, 0.6):.1f}">{tip}</rect>'
        )

    def rule_across(self, y: float, label: str) -> None:
        """A dashed horizontal line with its label above its right end."""
        at = self.down(y)
        above = at - 5 if at > TOP + 16 else at + 13
        self._add(f'<path class="rule" d="M{LEFT} {at:.1f}H{self.width - RIGHT}"/>')
        self._add(
            f'<text class="rule-label" x="{self.width - RIGHT - 4}" y="{above:.1f}" text-anchor="end">{escape(label)}</text>'
        )

    def rule_down(self, x: float, label: str) -> None:
        """A dashed vertical line with its label beside it, low enough to stay clear of a curve that ends at the top."""
        at = self.across(x)
        anchor, shift = ("end", -5) if at > self.width * 0.7 else ("start", 5)
        self._add(f'<path class="rule" d="M{at:.1f} {TOP}V{self.height - BOTTOM}"/>')
        place = f'x="{at + shift:.1f}" y="{self.height * 0.3:.1f}" text-anchor="{anchor}"'
        self._add(f'<text class="rule-label" {place}>{escape(label)}</text>')

    def svg(self, name: str) -> str:
        """The whole figure; `name` is read out to those who cannot see it."""
        marks = "".join(self._marks)
        size = f'viewBox="0 0 {self.width} {self.height}"'
        return f'<svg {size} role="img" aria-label="{escape(name)}">{self._frame()}{marks}</svg>'

    def _add(self, mark: str) -> None:
        self._marks.append(mark)

    def _frame(self) -> str:
        floor = self.height - BOTTOM
        parts = []
        for tick in self.x.ticks():
            at = self.across(tick)
            parts.append(f'<path class="grid" d="M{at:.1f} {floor}v4"/>')
            parts.append(f'<text x="{at:.1f}" y="{floor + 16}" text-anchor="middle">{self.x.label(tick)}</text>')
        for tick in self.y.ticks() if self.y_ticks else ():
            at = self.down(tick)
            parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{self.width - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{at + 3.5:.1f}" text-anchor="end">{self.y.label(tick)}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {floor}H{self.width - RIGHT}"/>')
        center, middle = (LEFT + self.width - RIGHT) / 2, (TOP + floor) / 2
        for title, place in (
            (self.x_title, f'x="{center}" y="{self.height - 7}"'),
            (self.y_title, f'transform="translate(13 {middle}) rotate(-90)"'),
        ):
            parts.append(f'<text class="axis-title" {place} text-anchor="middle">{escape(title)}</text>')
        return "".join(parts)
