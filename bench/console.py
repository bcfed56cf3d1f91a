"""A run seen from the terminal: a live line while it goes on, a table when it is over."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table

from ..core.slo import Slo
from .metrics import Summary, client_warning
from .records import LoadProgress
from .report import Fact, distributions, seconds

_LINE_PAUSE = 5.0  # seconds of the run between two lines where the output is a file
_ROOM_FOR_TIMES = 76  # columns that the whole table of times takes
_DISPENSABLE = ("mean", "p90")
_ROOM_FOR_BAR = 116  # columns of a terminal: with fewer, the numbers matter more than the bar


class LiveProgress:
    """Context manager whose `update` is a `driver.OnProgress`.

    One line that changes and is gone in the end; where the output cannot be redrawn (a file, a pipe), a new line now and then.
    """

    def __init__(self, console: Console, num_planned: int, label: str = "offered") -> None:
        self._console = console
        self._label = label
        self._num_planned = num_planned
        self._next_line = _LINE_PAUSE
        bar = (BarColumn(bar_width=24),) if console.width >= _ROOM_FOR_BAR else ()
        counts = TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True))
        state = TextColumn("{task.fields[state]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
        columns = (TextColumn(label, table_column=Column(no_wrap=True)), *bar, counts, state)
        self._progress = Progress(*columns, console=console, refresh_per_second=4, transient=True, expand=True)
        self._task = self._progress.add_task(label, total=num_planned, state="")

    def __enter__(self) -> LiveProgress:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def update(self, progress: LoadProgress) -> None:
        if self._console.is_terminal:
            self._progress.update(self._task, completed=progress.num_offered, state=describe(progress))
        elif progress.elapsed >= self._next_line:
            self._next_line = progress.elapsed + _LINE_PAUSE
            counts = f"{self._label} {progress.num_offered}/{self._num_planned}"
            self._console.print(f"{progress.elapsed:3.0f} s  {counts} · {describe(progress)}", soft_wrap=True)


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
    narrow = console.width < _ROOM_FOR_TIMES
    for name in ("mean", "p50", "p90", "p99", "max", "objective"):
        if not (narrow and name in _DISPENSABLE):
            times.add_column(name, justify="right", no_wrap=True)
    objectives = {"TTFT": seconds(slo.ttft), "TPOT": seconds(slo.tpot)}
    for name, _, values in distributions(summary):
        spread = (values.p50, values.p99, values.max)
        cells = spread if narrow else (values.mean, values.p50, values.p90, values.p99, values.max)
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
