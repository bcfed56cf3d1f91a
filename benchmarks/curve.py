"""Attainment against request rate, as data: points of several systems, measured at different times, in one JSON file.

Pure but for reading and writing that file. Nothing is averaged in it: every turn is a point of its own.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from baton.core.errors import InvalidRequest
from loads import Measured

FORMAT = "baton-goodput/1"


@dataclass(frozen=True, slots=True)
class Setting:
    """What all points of a curve have in common. Objectives in seconds; `target` is the attainment wanted."""

    model: str
    input_tokens: int
    output_tokens: int
    ttft: float
    tpot: float
    target: float
    machine: str

    def difference(self, other: Setting) -> str | None:
        """The first field in which two settings differ, in words; None when they are equal."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if mine != theirs:
                return f"{item.name} {mine!r}, not {theirs!r}"
        return None


@dataclass(frozen=True, slots=True)
class Point:
    """One load on one system. Times in seconds, None when no request finished; `complaints` as in `loads.Measured`."""

    label: str
    rate: float
    at: str
    num_offered: int
    num_finished: int
    attainment: float
    ttft_p50: float | None
    ttft_p99: float | None
    tpot_p50: float | None
    tpot_p99: float | None
    request_rate: float
    complaints: tuple[str, ...] = ()

    @staticmethod
    def of(label: str, rate: float, measured: Measured, at: str) -> Point:
        summary = measured.summary
        ttft, tpot = summary.ttft, summary.tpot
        return Point(
            label=label,
            rate=rate,
            at=at,
            num_offered=summary.num_offered,
            num_finished=summary.num_finished,
            attainment=summary.attainment,
            ttft_p50=None if ttft is None else ttft.p50,
            ttft_p99=None if ttft is None else ttft.p99,
            tpot_p50=None if tpot is None else tpot.p50,
            tpot_p99=None if tpot is None else tpot.p99,
            request_rate=summary.request_rate,
            complaints=measured.complaints,
        )

    def __str__(self) -> str:
        times = [("TTFT", self.ttft_p50, self.ttft_p99), ("TPOT", self.tpot_p50, self.tpot_p99)]
        shown = ", ".join(
            f"{name} p50/p99 {1000 * p50:.0f}/{1000 * p99:.0f} ms"
            for name, p50, p99 in times
            if p50 is not None and p99 is not None
        )
        warned = "".join(f"\n  warning: {complaint}" for complaint in self.complaints)
        finished = f"{self.num_finished} of {self.num_offered} finished"
        return f"{self.label} at {self.rate:g}/s: attainment {self.attainment:.3f}, {shown or 'no times'}, {finished}{warned}"


@dataclass(slots=True)
class Curve:
    """All that was measured under one setting. `notes` say what was not, and why."""

    setting: Setting
    points: list[Point] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """Systems in the order in which they first came."""
        return list(dict.fromkeys(point.label for point in self.points))

    def rates(self, label: str) -> list[float]:
        """Rates tried, ascending."""
        return sorted({point.rate for point in self.points if point.label == label})

    def values(self, label: str, rate: float, value: Callable[[Point], float | None]) -> list[float]:
        """One per turn that has it, ascending."""
        found = (value(point) for point in self.points if (point.label, point.rate) == (label, rate))
        return sorted(each for each in found if each is not None)

    def goodput(self, label: str) -> float:
        """The largest rate tried up to which the median attainment never fell under the target; 0 when the first did."""
        reached = 0.0
        for rate in self.rates(label):
            if statistics.median(self.values(label, rate, lambda point: point.attainment)) < self.setting.target:
                break
            reached = rate
        return reached


def read_curve(path: Path) -> Curve:
    """Raises InvalidRequest when the file is no curve."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise InvalidRequest(f"{path}: format {document['format']!r}, expected {FORMAT!r}")
        points = [Point(**point | {"complaints": tuple(point["complaints"])}) for point in document["points"]]
        return Curve(Setting(**document["setting"]), points, list(document["notes"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{path} is no curve that this script wrote: {error!r}") from error


def write_curve(path: Path, curve: Curve) -> None:
    """Replace the file at once, so that an end in between costs nothing. Makes missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "format": FORMAT,
        "setting": asdict(curve.setting),
        "points": [asdict(point) for point in curve.points],
        "notes": curve.notes,
    }
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
