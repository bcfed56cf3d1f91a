"""`baton down`: end a running cluster."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import Unavailable
from ..deploy.cluster import end_on_ray
from ..deploy.process import WatchedProcess
from ..deploy.settings import load_topology
from ..deploy.state import ClusterRecord, forget
from .clusters import find_cluster
from .screen import err, exits_on_error

_PATIENCE = 40.0  # seconds: every member has 5, a local Ray takes a few more


def down(
    cluster: Annotated[
        str | None, typer.Argument(help="Its name or its topology file; may be left out when only one runs.")
    ] = None,
) -> None:
    """End a cluster and wait until nothing of it is left."""
    with exits_on_error():
        try:
            record = find_cluster(cluster)
        except Unavailable:
            elsewhere = _on_ray(cluster)
            if elsewhere is None:
                raise
            record = elsewhere
        with err().status(f"ending {record.cluster}"):
            if record.ray_address is not None and record.pid == 0:
                try:
                    asyncio.run(end_on_ray(record.cluster, record.ray_address, record.controller))
                finally:  # also when that Ray is gone: nothing else would ever remove the record
                    forget(record.cluster)
            else:
                _end_process(record)
    err().print(f"{record.cluster} has ended")


def _end_process(record: ClusterRecord) -> None:
    """SIGTERM the process that runs the cluster; it ends everything else and then itself."""
    try:
        process = WatchedProcess(record.pid)
    except ProcessLookupError:
        return
    try:
        process.signal(signal.SIGTERM)
        if not process.wait(_PATIENCE):
            raise Unavailable(
                f"process {record.pid}, which runs {record.cluster}, has not ended after {_PATIENCE:g} s; "
                f"its logs are in {record.logs}"
            )
    finally:
        process.close()


def _on_ray(cluster: str | None) -> ClusterRecord | None:
    """A cluster that somebody started on a running Ray from another machine, if a topology file says so."""
    if cluster is None or not Path(cluster).is_file():
        return None
    topology = load_topology(Path(cluster))
    if topology.launcher != "ray" or topology.ray_address is None:
        return None
    return ClusterRecord(topology.cluster, 0, "ray", "ready", "", ray_address=topology.ray_address)
