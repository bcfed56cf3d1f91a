"""How a cluster that is starting tells of it: as a live table to a person, or as lines of JSON through a pipe."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from ..deploy.cluster import ClusterStatus

_COLOURS = {"ready": "green", "failed": "red", "restarting": "yellow"}


@dataclass(frozen=True, slots=True)
class MemberLine:
    """One member as a person sees it."""

    member_id: str
    role: str
    state: str
    pid: int
    restarts: int
    error: str


@dataclass(frozen=True, slots=True)
class Progress:
    """All members, and what the cluster still waits for ("" when it is ready)."""

    members: tuple[MemberLine, ...]
    waiting_for: str

    @classmethod
    def of(cls, status: ClusterStatus) -> Progress:
        lines = (
            MemberLine(
                m.registration.worker.worker_id, m.registration.role, m.state, m.registration.pid, m.restarts, m.last_error
            )
            for m in status.members
        )
        return cls(tuple(lines), status.waiting_for)


@dataclass(frozen=True, slots=True)
class Begun:
    """The background process exists."""

    pid: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The cluster serves at these addresses."""

    cluster: str
    grpc: str
    http: str
    pid: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The cluster could not be started."""

    message: str
    exit_code: int


Report = Begun | Progress | Ready | Failed


class Reporter(Protocol):
    """Receives what happens while a cluster starts."""

    def tell(self, report: Report) -> None: ...


class PipeReporter:
    """Writes reports as JSON lines to a pipe; stops when nobody reads any more."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)  # or the members would hold the pipe open
        self._pipe: TextIO | None = os.fdopen(fd, "w", buffering=1, encoding="utf-8")

    def tell(self, report: Report) -> None:
        if self._pipe is None:
            return
        try:
            self._pipe.write(json.dumps({"kind": type(report).__name__} | asdict(report)) + "\n")
            if isinstance(report, Ready | Failed):
                self._close()
        except BrokenPipeError:
            self._close()

    def _close(self) -> None:
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                return


def read_reports(fd: int) -> Iterator[Report]:
    """The other end of a `PipeReporter`; ends when the writer is done or dead."""
    with os.fdopen(fd, encoding="utf-8") as pipe:
        for line in pipe:
            fields = json.loads(line)
            match fields.pop("kind"):
                case "Begun":
                    yield Begun(**fields)
                case "Progress":
                    members = tuple(MemberLine(**member) for member in fields["members"])
                    yield Progress(members, fields["waiting_for"])
                case "Ready":
                    yield Ready(**fields)
                case "Failed":
                    yield Failed(**fields)


class ScreenReporter:
    """A live table on a terminal; one line per change where the output is a file. Use it as a context."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._live = Live(Spinner("dots", f"starting {title}"), console=console, transient=True, refresh_per_second=8)
        self._told: dict[str, str] = {}

    def __enter__(self) -> ScreenReporter:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def tell(self, report: Report) -> None:
        if isinstance(report, Begun):
            return
        if not isinstance(report, Progress):
            self._live.stop()
        elif self._console.is_terminal:
            self._live.update(self._table(report))
        else:
            self._print_changes(report)

    def _table(self, progress: Progress) -> Table:
        table = Table(title=f"starting {self._title}", caption=f"waiting for {progress.waiting_for}", title_justify="left")
        for column in ("member", "role", "state", "pid", "restarts", "last error"):
            table.add_column(column)
        for m in progress.members:
            colour = _COLOURS.get(m.state, "cyan")
            error = m.error.splitlines()[-1][:80] if m.error else ""
            table.add_row(m.member_id, m.role, f"[{colour}]{m.state}[/]", str(m.pid or ""), str(m.restarts), error)
        return table

    def _print_changes(self, progress: Progress) -> None:
        for m in progress.members:
            if self._told.get(m.member_id) != m.state:
                self._told[m.member_id] = m.state
                error = f": {m.error.splitlines()[0]}" if m.error else ""
                self._console.print(f"{m.member_id} {m.state}{error}", markup=False)


def print_ready(console: Console, ready: Ready) -> None:
    """Where the cluster serves, and what to try."""
    console.print(f"[bold green]{ready.cluster} is ready[/]")
    console.print(f"  HTTP  http://{ready.http}/v1")
    console.print(f"  gRPC  {ready.grpc}")
    console.print("\nTry\n  baton chat\n  baton status")
    body = '{"messages": [{"role": "user", "content": "What does the json module do?"}], "max_tokens": 64, "stream": true}'
    console.print(
        f"  curl -N http://{ready.http}/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d '{body}'",
        markup=False,
        soft_wrap=True,
    )
