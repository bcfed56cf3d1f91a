"""Write a run down: JSON with the settings, the figures and every request's raw times, and one HTML file to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..core.slo import Slo
from .metrics import Distribution, Summary, client_warning
from .plots import figures
from .records import LoadResult, RequestRecord

FORMAT = "baton-bench/1"
Setting = str | int | float | bool | None
Settings = Mapping[str, Setting]
Fact = tuple[str, str]
"""A name and a value, as the report prints them."""


@dataclass(frozen=True, slots=True)
class Section:
    """A table with a heading and a sentence above it; the first cell of a row is its name."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def write_json(path: Path, result: LoadResult, summary: Summary, slo: Slo, settings: Settings) -> None:
    """Times are seconds since the run's start, to the microsecond. Makes missing folders."""
    document = {
        "format": FORMAT,
        "settings": {"target": result.target, **settings},
        "slo": asdict(slo),
        "run": {
            "started_at": result.started_at,
            "duration": result.duration,
            "num_planned": result.num_planned,
            "closed_loop": result.closed_loop,
            "interrupted": result.interrupted,
        },
        "summary": asdict(summary) | {"errors": dict(summary.errors)},
        "requests": [_record(record) for record in result.records],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")


def write_html(
    path: Path,
    result: LoadResult,
    summary: Summary,
    slo: Slo,
    settings: Settings,
    *,
    title: str = "Baton bench",
    facts: Sequence[Fact] = (),
    sections: Sequence[Section] = (),
) -> None:
    """`facts` are more rows for the table of figures, `sections` stand before the plots. Makes missing folders."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["seconds"] = seconds
    page = environment.get_template("report.html.j2").render(
        title=title,
        result=result,
        summary=summary,
        slo=slo,
        distributions=distributions(summary),
        settings={name: value for name, value in settings.items() if value is not None},
        facts=facts,
        sections=sections,
        figures=[(figure, Markup(figure.svg)) for figure in figures(result, slo)],
        warning=client_warning(summary, slo),
        failures=[record for record in result.records if not record.ok][:20],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def distributions(summary: Summary) -> list[tuple[str, str, Distribution]]:
    """Name, meaning and values of every spread that the run has."""
    rows = (
        ("TTFT", "offered to first token", summary.ttft),
        ("TPOT", "per output token after the first", summary.tpot),
        ("ITL", "single gaps between chunks", summary.itl),
        ("Latency", "offered to end", summary.latency),
        ("Client lag", "the client's own lateness in sending; inside TTFT", summary.client_lag),
        ("Client timers", "the client's own lateness in waking up", summary.loop_lag),
    )
    return [(name, meaning, values) for name, meaning, values in rows if values is not None]


def seconds(value: float) -> str:
    """Three digits, in ms or s."""
    if value >= 10:
        return f"{value:.1f} s"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1000:.0f} ms" if value >= 0.1 else f"{value * 1000:.1f} ms"


def _record(record: RequestRecord) -> dict[str, object]:
    raw = {field.name: getattr(record, field.name) for field in fields(record)}
    for name in ("offered", "sent", "end"):
        raw[name] = None if raw[name] is None else round(raw[name], 6)
    raw["chunk_times"] = [round(moment, 6) for moment in record.chunk_times]
    return raw
