"""A run seen from the terminal: a live line while it goes on, a table when it is over."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..core.slo import Slo
from .metrics import Summary, client_warning
from .records import LoadProgress
from .report import Fact, distributions, seconds


class LiveProgress:
    """Context manager whose `update` is a `driver.OnProgress`. In a terminal that cannot redraw it prints nothing."""

    def __init__(self, console: Console, num_planned: int, label: str = "offered") -> None:
        self._progress = Progress(
            TextColumn(label),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(label, total=num_planned, state="")

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, progress: LoadProgress) -> None:
        self._progress.update(self._task, completed=progress.num_offered, state=describe(progress))


def describe(progress: LoadProgress) -> str:
    """The numbers of the live line."""
    failed = f"[red]{progress.num_failed} failed[/]" if progress.num_failed else "0 failed"
    median = "" if progress.ttft_p50 is None else f" · TTFT p50 {seconds(progress.ttft_p50)}"
    rate = progress.num_tokens / progress.elapsed if progress.elapsed > 0 else 0.0
    return f"{progress.num_finished} finished · {progress.num_in_flight} running · {failed}{median} · {rate:.0f} tok/s"


def print_summary(console: Console, summary: Summary, slo: Slo, facts: Sequence[Fact] = (), title: str = "") -> None:
    """The final table. `facts` are more rows below it."""
    times = Table(title=title or None, title_justify="left", show_edge=False, pad_edge=False)
    times.add_column("")
    for name in ("mean", "p50", "p90", "p99", "max", "objective"):
        times.add_column(name, justify="right")
    objectives = {"TTFT": seconds(slo.ttft), "TPOT": seconds(slo.tpot)}
    for name, _, values in distributions(summary):
        cells = (values.mean, values.p50, values.p90, values.p99, values.max)
        times.add_row(name, *map(seconds, cells), objectives.get(name, ""))
    console.print(times)
    rest = Table(show_header=False, box=None, pad_edge=False)
    rest.add_column()
    rest.add_column(overflow="fold")
    for name, value in (*_rows(summary, slo), *facts):
        rest.add_row(name, value)
    console.print(rest)
    warning = client_warning(summary, slo)
    if warning:
        console.print(f"[yellow]Do not trust these figures: {warning}.[/]")


def _rows(summary: Summary, slo: Slo) -> list[Fact]:
    failures = escape(", ".join(f"{count} x {kind}" for kind, count in summary.errors))
    colour = "green" if summary.attainment >= slo.attainment else "red"
    per_worker = "" if summary.goodput_per_worker is None else f" ({summary.goodput_per_worker:.2f} per worker)"
    return [
        (
            "requests",
            f"{summary.num_offered} offered, {summary.num_finished} finished, {summary.num_failed} failed"
            + (f": {failures}" if failures else ""),
        ),
        (
            "attainment",
            f"[{colour}]{summary.attainment:.1%}[/] of all offered (target {slo.attainment:.0%};"
            f" {summary.num_late_first} missed TTFT, {summary.num_slow_tokens} missed TPOT)",
        ),
        ("goodput", f"{summary.goodput:.2f} requests/s within the objectives{per_worker}, of {summary.offered_rate:.2f} offered"),
        (
            "throughput",
            f"{summary.request_rate:.2f} requests/s, {summary.output_token_rate:.0f} output tokens/s"
            f" over {seconds(summary.duration)}",
        ),
    ]
