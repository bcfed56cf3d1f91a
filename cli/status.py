"""`baton status`: what runs, and how full it is."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from ..core.errors import Unavailable
from ..deploy.cluster import cluster_status, router_load
from ..deploy.state import ClusterRecord, list_records
from ..proto import inference_pb2 as inference
from ..proto import worker_pb2 as pb
from .clusters import find_cluster
from .screen import err, exits_on_error, out

_COLOURS = {"ready": "green", "failed": "red"}


@dataclass(frozen=True, slots=True)
class MemberReport:
    """One member. The counts are None where the router knows nothing of it."""

    member: str
    role: str
    state: str
    pid: int
    address: str
    restarts: int
    last_error: str
    running: int | None = None
    waiting: int | None = None
    free_blocks: int | None = None
    total_blocks: int | None = None
    tickets: int | None = None


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """One cluster. `waiting_for` is "" when it is ready."""

    cluster: str
    launcher: str
    pid: int
    controller: str
    grpc: str
    http: str
    waiting_for: str
    uptime: float
    logs: str
    members: tuple[MemberReport, ...]


def status(
    cluster: Annotated[str | None, typer.Argument(help="Its name or topology file; all of them when left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the clusters of this machine. Exit code 1 when one of them is not ready."""
    with exits_on_error():
        records = list_records() if cluster is None else [find_cluster(cluster)]
        reports = [asyncio.run(_report(record)) for record in records]
    if as_json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    elif not reports:
        err().print("no cluster is running on this machine; start one with `baton up FILE`")
    for report in reports if not as_json else []:
        _print(report)
    if any(report.waiting_for for report in reports):
        raise typer.Exit(1)


async def _report(record: ClusterRecord) -> ClusterReport:
    if not record.controller:
        return _report_of(record, "controller", 0.0, ())
    try:
        seen = await cluster_status(record.controller)
    except Unavailable as error:
        return _report_of(record, str(error), 0.0, ())
    loads: dict[str, inference.WorkerInfo] = {}
    if seen.grpc:
        with suppress(Unavailable):  # `waiting_for` says so
            loads = {info.worker_id: info for info in (await router_load(seen.grpc)).workers}
    members = tuple(_member(member, loads.get(member.registration.worker.worker_id)) for member in seen.members)
    return _report_of(record, seen.waiting_for, seen.uptime, members)


def _report_of(record: ClusterRecord, waiting_for: str, uptime: float, members: tuple[MemberReport, ...]) -> ClusterReport:
    return ClusterReport(
        record.cluster,
        record.launcher,
        record.pid,
        record.controller,
        record.grpc,
        record.http,
        waiting_for,
        uptime,
        record.logs,
        members,
    )


def _member(member: pb.Member, load: inference.WorkerInfo | None) -> MemberReport:
    registration = member.registration
    report = MemberReport(
        member=registration.worker.worker_id,
        role=registration.role,
        state=member.state,
        pid=registration.pid,
        address=registration.address,
        restarts=member.restarts,
        last_error=member.last_error,
    )
    if load is None:
        return report
    counts = {
        "running": load.running,
        "waiting": load.waiting,
        "free_blocks": load.free_blocks,
        "total_blocks": load.total_blocks,
        "tickets": load.tickets,
    }
    return MemberReport(**(asdict(report) | counts))


def _print(report: ClusterReport) -> None:
    state = "[green]ready[/]" if not report.waiting_for else f"[yellow]waiting for {report.waiting_for}[/]"
    out().print(
        f"[bold]{report.cluster}[/] {state}, up {report.uptime:.0f} s ({report.launcher}, process {report.pid or 'on Ray'})"
    )
    if report.http:
        out().print(f"  HTTP http://{report.http}/v1   gRPC {report.grpc}   logs {report.logs}", soft_wrap=True)
    table = Table(*("member", "state", "pid", "address", "restarts", "running", "waiting", "free blocks", "tickets"), box=SIMPLE)
    for m in report.members:
        colour = _COLOURS.get(m.state, "yellow")
        blocks = f"{m.free_blocks}/{m.total_blocks}" if m.total_blocks is not None else ""
        counts = (_count(m.running), _count(m.waiting), blocks, _count(m.tickets))
        table.add_row(m.member, f"[{colour}]{m.state}[/]", str(m.pid or ""), m.address, str(m.restarts), *counts)
    out().print(table)
    for m in report.members:
        if m.last_error and m.state != "ready":
            out().print(f"{m.member}: {m.last_error}", markup=False)


def _count(value: int | None) -> str:
    return "" if value is None else str(value)
