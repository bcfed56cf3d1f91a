"""A simulation's figures on the terminal and as a page, in the words and colours of `baton bench`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn
from rich.table import Table

from ..bench.metrics import Distribution, Summary
from ..bench.records import LoadResult, RequestRecord
from ..bench.report import Fact, Section, Settings, seconds, write_html
from ..simulator.records import RequestOutcome
from ..simulator.report import PoolUse, SimulationReport, Spread

FORMAT = "baton-simulation/1"

_STAGES = {
    "queue": "arrival to first plan",
    "prefill": "to first token",
    "handoff": "to all KV adopted",
    "decode": "to last token",
}
_POOL_COLUMNS = ("pool", "workers", "busy", "batch", "tok/s", "KV used", "KV peak", "waiting", "lost")
_POOL_NOTE = (
    "Averages over the run. batch: sequences that decode in a step; waiting: sequences and reservations without KV blocks; "
    "lost: sequences whose blocks were taken away."
)
_REDRAW = 256
"""Outcomes between two updates of the line."""


class Sample:
    """At most `limit` of the outcomes that are added: all, or every second, fourth, ... by index, so that it stays fair."""

    def __init__(self, limit: int) -> None:
        self.kept: list[RequestOutcome] = []
        self._limit = limit
        self._stride = 1

    def add(self, outcome: RequestOutcome) -> None:
        if outcome.index % self._stride:
            return
        self.kept.append(outcome)
        if len(self.kept) > self._limit:
            self._stride *= 2
            self.kept = [kept for kept in self.kept if kept.index % self._stride == 0]


class LiveCount:
    """One line that says how far the simulation is, on a terminal only; gone in the end."""

    def __init__(self, console: Console, num_planned: int | None) -> None:
        total = "" if num_planned is None else f"/{num_planned}"
        text = f"simulated {{task.completed:.0f}}{total} requests, {{task.fields[at]:.0f}} s of virtual time"
        self._progress = Progress(TextColumn(text), console=console, refresh_per_second=4, transient=True)
        self._shown = console.is_terminal
        self._task = self._progress.add_task("simulated", at=0.0)
        self._count = 0

    def __enter__(self) -> LiveCount:
        if self._shown:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._shown:
            self._progress.stop()

    def update(self, outcome: RequestOutcome) -> None:
        self._count += 1
        if self._shown and self._count % _REDRAW == 0:
            self._progress.update(self._task, completed=self._count, at=outcome.end or outcome.arrival)


def print_report(console: Console, report: SimulationReport) -> None:
    """All tables."""
    objectives = {"TTFT": seconds(report.slo.ttft), "TPOT": seconds(report.slo.tpot)}
    times = _table("", "mean", "p50", "p90", "p99", "max", "objective")
    for name, spread in (("TTFT", report.ttft), ("TPOT", report.tpot), ("Latency", report.latency)):
        if spread is not None:
            times.add_row(name, *_cells(spread), objectives.get(name, ""))
    for stage, spread in report.stages:
        times.add_row(f"  {stage}", *_cells(spread), style="dim")
    console.print(times)
    pools = _table(*_POOL_COLUMNS)
    for pool in report.pools:
        pools.add_row(*_pool_cells(pool))
    console.print(pools)
    rest = Table(show_header=False, box=None, pad_edge=False)
    rest.add_column(no_wrap=True)
    rest.add_column(overflow="fold")
    for name, value in _rows(report):
        rest.add_row(name, value)
    console.print(rest)


def write_figures(path: Path, report: SimulationReport, settings: Settings) -> None:
    """The report as JSON. Makes missing folders."""
    document = {"format": FORMAT, "settings": dict(settings), "report": asdict(report)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_page(path: Path, report: SimulationReport, kept: Sequence[RequestOutcome], title: str, settings: Settings) -> None:
    """The page of `baton bench`, with what binds, pools and links before its plots. `kept` are what the plots show."""
    result = LoadResult(
        target="simulated",
        started_at="virtual time",
        duration=report.duration,
        num_planned=report.num_offered,
        records=tuple(map(_record, kept)),
    )
    facts: list[Fact] = [("started over", f"{report.num_restarted} requests")]
    if len(kept) < report.num_offered:
        facts.append(("plots", f"show {len(kept)} of {report.num_offered} requests"))
    if report.cached_tokens:
        facts.append(("from prefix caches", f"{report.cached_tokens} of the tokens in"))
    write_html(path, result, _summary(report), report.slo, settings, title=title, facts=facts, sections=_sections(report))


def _sections(report: SimulationReport) -> list[Section]:
    verdict = report.bottleneck
    word = "This binds" if verdict.binding else "Nothing binds; nearest to its limit"
    pressures = tuple((pressure.resource, f"{pressure.value:.0%}", pressure.why) for pressure in verdict.pressures)
    stages = tuple((f"{stage}: {_STAGES[stage]}", *_cells(spread)) for stage, spread in report.stages)
    sections = [
        Section(f"{word}: {verdict.resource}", f"{verdict.why}.", ("resource", "of its limit", ""), pressures),
        Section("Where the time goes", "Of requests that ended well.", ("", "mean", "p50", "p90", "p99", "max"), stages),
        Section("Workers", _POOL_NOTE, _POOL_COLUMNS, tuple(map(_pool_cells, report.pools))),
    ]
    if report.links:
        rows = tuple((load.name, f"{load.busy:.1%}", _rate(load.rate), _size(load.peak_backlog)) for load in report.links[:24])
        more = f" The first {len(rows)} of {len(report.links)}." if len(rows) < len(report.links) else ""
        note = f"One direction of one node each.{more}"
        sections.append(Section("Links", note, ("link", "busy", "average rate", "largest backlog"), rows))
    if len(report.tenants) > 1:
        tenants = tuple((each.tenant or "(none)", f"{each.num_offered}", f"{each.attainment:.1%}") for each in report.tenants)
        sections.append(Section("Tenants", "Attainment of each.", ("tenant", "offered", "attainment"), tenants))
    return sections


def _rows(report: SimulationReport) -> list[Fact]:
    failures = escape(", ".join(f"{count} x {kind}" for kind, count in report.errors))
    colour = "green" if report.attainment >= report.slo.attainment else "red"
    per_device = "" if report.goodput_per_device is None else f" ({report.goodput_per_device:.3g} per device)"
    verdict = report.bottleneck
    rows = [
        (
            "requests",
            f"{report.num_offered} offered, {report.num_finished} finished, {report.num_failed} failed"
            + (f": {failures}" if failures else "")
            + (f"; {report.num_restarted} started over" if report.num_restarted else ""),
        ),
        (
            "attainment",
            f"[{colour}]{report.attainment:.1%}[/] of all offered (target {report.slo.attainment:.0%};"
            f" {report.num_late_first} missed TTFT, {report.num_slow_tokens} missed TPOT)",
        ),
        ("goodput", f"{report.goodput:.2f} requests/s within the objectives{per_device}, of {report.offered_rate:.2f} offered"),
        (
            "throughput",
            f"{report.request_rate:.2f} requests/s, {report.output_token_rate:.0f} output tokens/s"
            f" over {seconds(report.duration)} of virtual time",
        ),
    ]
    if report.cached_tokens:
        rows.append(
            ("prefix cache", f"{report.cached_tokens / max(report.input_tokens, 1):.1%} of all prompt tokens were cached")
        )
    if report.links:
        busiest = max(report.links, key=lambda load: load.busy)
        rows.append(("links", f"busiest: {busiest.name}, {busiest.busy:.1%} of the time, {_rate(busiest.rate)} on average"))
    rows += [(f"tenant {each.tenant}", f"{each.attainment:.1%} of {each.num_offered}") for each in report.tenants if each.tenant]
    bound = f"[red]{verdict.resource}[/]" if verdict.binding else f"[green]nothing[/]; nearest to its limit is {verdict.resource}"
    rows.append(("what binds", f"{bound}: {escape(verdict.why)}"))
    return rows


def _record(outcome: RequestOutcome) -> RequestRecord:
    """As the bench would have recorded it: first and last token are all that is known of single ones."""
    chunks: tuple[float, ...] = ()
    if outcome.first_token is not None:
        last = outcome.end if outcome.ok and outcome.end is not None else outcome.first_token
        chunks = (outcome.first_token,) if outcome.num_tokens < 2 else (outcome.first_token, last)
    return RequestRecord(
        outcome.index,
        outcome.prompt_tokens,
        outcome.output_tokens,
        outcome.arrival,
        outcome.arrival,
        chunks,
        (),
        outcome.num_tokens,
        outcome.prompt_tokens,
        outcome.end,
        "length" if outcome.ok else "",
        outcome.error,
    )


def _summary(report: SimulationReport) -> Summary:
    """The figures of all requests, in the bench's form."""
    return Summary(
        num_offered=report.num_offered,
        num_finished=report.num_finished,
        num_failed=report.num_failed,
        num_met=report.num_met,
        num_late_first=report.num_late_first,
        num_slow_tokens=report.num_slow_tokens,
        duration=report.duration,
        offered_rate=report.offered_rate,
        request_rate=report.request_rate,
        attainment=report.attainment,
        goodput=report.goodput,
        goodput_per_worker=report.goodput / sum(pool.num_workers for pool in report.pools) if report.pools else None,
        input_tokens=report.input_tokens,
        output_tokens=report.output_tokens,
        output_token_rate=report.output_token_rate,
        ttft=_distribution(report.ttft),
        tpot=_distribution(report.tpot),
        itl=None,
        latency=_distribution(report.latency),
        client_lag=None,
        loop_lag=None,
        errors=report.errors,
    )


def _distribution(spread: Spread | None) -> Distribution | None:
    return None if spread is None else Distribution(*astuple(spread))


def _table(*columns: str) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(columns[0])
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(spread: Spread) -> tuple[str, ...]:
    return tuple(map(seconds, (spread.mean, spread.p50, spread.p90, spread.p99, spread.max)))


def _pool_cells(pool: PoolUse) -> tuple[str, ...]:
    batch = f"{pool.mean_batch:.1f}" if pool.role != "prefill" else ""
    numbers = (f"{pool.tokens_per_second:.0f}", f"{pool.kv_used:.1%}", f"{pool.kv_peak:.0%}", f"{pool.waiting:.2f}")
    return (pool.role, f"{pool.num_workers}", f"{pool.busy:.1%}", batch, *numbers, f"{pool.preemptions}")


def _rate(bytes_per_second: float) -> str:
    return f"{_size(bytes_per_second)}/s"


def _size(num_bytes: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"
