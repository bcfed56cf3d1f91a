"""`baton up`: bring a topology to life, and end all of it on Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from ..core.errors import BatonError, TopologyError, Unavailable
from ..core.topology import Topology
from ..deploy.checks import check_topology
from ..deploy.cluster import RunningCluster, running_cluster, running_on_ray
from ..deploy.process import WatchedProcess
from ..deploy.settings import TopologyFile, check_cluster_name, read_topology_file
from ..deploy.state import Claim, ClusterRecord, already_running, claim, list_records, log_folder, on_ray_forever
from .progress import Begun, Failed, PipeReporter, Progress, Ready, Reporter, ScreenReporter, print_ready, read_reports
from .screen import BAD_USAGE, FAILED, complain, err, exits_on_error, out

_END_PATIENCE = 40.0  # seconds for a cluster that was still starting to end
_T = TypeVar("_T")


class LauncherName(StrEnum):
    RAY = "ray"
    SUBPROCESS = "subprocess"


def up(
    file: Annotated[Path, typer.Argument(help="The topology, a YAML file.", show_default=False)],
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when the cluster is ready; it goes on.")] = False,
    launcher: Annotated[LauncherName | None, typer.Option(help="Instead of the topology's.", show_default=False)] = None,
    name: Annotated[str | None, typer.Option(help="Instead of the topology's `cluster`.", show_default=False)] = None,
    report_fd: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Start the cluster that FILE describes and keep it running until Ctrl-C."""
    if report_fd >= 0:
        raise typer.Exit(_in_background(file, launcher, name, PipeReporter(report_fd)))
    with exits_on_error():
        topology_file = _read(file, launcher, name)
        topology = topology_file.topology
        on_running_ray = topology.launcher == "ray" and topology.ray_address is not None
        if detach and not on_running_ray:
            _refuse_second(topology.cluster)
            check_topology(topology_file)
            raise typer.Exit(_start_in_background(file, launcher, name, topology.cluster))
        with ScreenReporter(err(), topology.cluster) as reporter:
            asyncio.run(_serve(topology_file, reporter, stay=not detach))


# ---- in this process ----------------------------------------------------------------------------


async def _serve(topology_file: TopologyFile, reporter: Reporter, stay: bool) -> None:
    """Run the cluster until a signal, `baton down` or its own end; with `stay` False only until it is ready, which
    needs a running Ray to leave it on."""
    topology = topology_file.topology
    stop = _stop_on_signals()
    record = ClusterRecord(
        cluster=topology.cluster,
        pid=os.getpid(),
        launcher=topology.launcher,
        status="starting",
        logs=str(log_folder(topology.cluster)),
        ray_address=topology.ray_address if topology.launcher == "ray" else None,
    )
    with claim(record) as held:
        check_topology(topology_file)
        if record.ray_address is None:
            async with running_cluster(topology) as cluster:
                await _while_up(cluster, held, reporter, stop, stay=True)
        else:
            async with running_on_ray(topology, record.ray_address) as (cluster, leave):
                if await _while_up(cluster, held, reporter, stop, stay) and not stay:
                    leave.set()
                    held.write(on_ray_forever(held.record))


async def _while_up(cluster: RunningCluster, held: Claim, reporter: Reporter, stop: asyncio.Event, stay: bool) -> bool:
    """Report until the cluster is ready; with `stay`, wait for its end. True when it became ready."""
    held.write(replace(held.record, controller=cluster.controller))
    ready = asyncio.create_task(cluster.wait_ready(lambda status: reporter.tell(Progress.of(status))))
    if not await _unless(stop, ready):
        raise Unavailable(f"{cluster.name} was stopped before it was ready")
    status = ready.result()
    held.write(replace(held.record, status="ready", grpc=status.grpc, http=status.http))
    told = Ready(cluster.name, status.grpc, status.http, os.getpid())
    reporter.tell(told)
    print_ready(out(), told)
    if stay:
        err().print("Ctrl-C ends the cluster.", style="dim")
        await _unless(stop, asyncio.create_task(cluster.ended()))
        err().print(f"ending {cluster.name} ...", style="dim")
    return True


async def _unless(stop: asyncio.Event, work: asyncio.Task[_T]) -> bool:
    """Wait for `work`, or for `stop` and then cancel it. True when the work is done; raises what it raised."""
    stopping = asyncio.create_task(stop.wait())
    stopping.add_done_callback(lambda _: work.cancel())
    try:
        await work
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
        return False
    finally:
        stopping.cancel()
    return True


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _read(file: Path, launcher: LauncherName | None, name: str | None) -> TopologyFile:
    topology_file = read_topology_file(file)
    topology: Topology = topology_file.topology
    if launcher is not None:
        topology = replace(topology, launcher=launcher.value)
    if name is not None:
        topology = replace(topology, cluster=check_cluster_name(name))
    return replace(topology_file, topology=topology)


# ---- in the background --------------------------------------------------------------------------


def _in_background(file: Path, launcher: LauncherName | None, name: str | None, reporter: PipeReporter) -> int:
    """What the background process does; returns its exit status."""
    if os.fork() > 0:
        os._exit(0)  # so that nobody but init has to reap the one that goes on
    reporter.tell(Begun(os.getpid()))
    try:
        asyncio.run(_serve(_read(file, launcher, name), reporter, stay=True))
    except BatonError as error:
        code = BAD_USAGE if isinstance(error, TopologyError) else FAILED
        complain(str(error))
        reporter.tell(Failed(str(error), code))
        return code
    return 0


def _start_in_background(file: Path, launcher: LauncherName | None, name: str | None, cluster: str) -> int:
    """Start a process of its own session that runs the cluster; show its progress; return an exit status."""
    options = ["--launcher", launcher.value] if launcher else []
    options += ["--name", name] if name else []
    logs = log_folder(cluster)
    logs.mkdir(parents=True, exist_ok=True)
    read_end, write_end = os.pipe()
    with open(logs / "up.log", "wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "baton.cli.main", "up", str(file), "--report-fd", str(write_end), *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(write_end,),
            start_new_session=True,
        )
    os.close(write_end)
    child.wait()  # it leaves the work to a process of its own
    with ScreenReporter(err(), cluster) as screen:
        return _follow(read_end, screen, cluster, logs / "up.log")


def _follow(read_end: int, screen: ScreenReporter, cluster: str, log: Path) -> int:
    """Show what the background process reports until it is ready or dead; return an exit status."""
    background: WatchedProcess | None = None
    try:
        for report in read_reports(read_end):
            screen.tell(report)
            match report:
                case Begun():
                    background = WatchedProcess(report.pid)
                case Ready():
                    print_ready(out(), report)
                    out().print(f"  baton down {cluster}")
                    return 0
                case Failed():
                    if background is not None:
                        background.wait(_END_PATIENCE)
                    complain(report.message)
                    return report.exit_code
    except KeyboardInterrupt:
        if background is not None:
            background.signal(signal.SIGTERM)
            background.wait(_END_PATIENCE)
        complain(f"{cluster} was stopped before it was ready")
        return FAILED
    finally:
        if background is not None:
            background.close()
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
    complain(f"the background process died:\n{tail}")
    return FAILED


def _refuse_second(cluster: str) -> None:
    """Say so at once when the cluster is running. The background process finds out for certain."""
    for record in list_records():
        if record.cluster == cluster:
            raise Unavailable(already_running(record))
