"""Which cluster a command means: by name, by topology file, or the only one that runs."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import InvalidRequest, Unavailable
from ..deploy.settings import load_topology
from ..deploy.state import ClusterRecord, list_records


def find_cluster(name_or_file: str | None) -> ClusterRecord:
    """The running cluster that is meant. Raises Unavailable when there is none, InvalidRequest when it is unclear which."""
    records = {record.cluster: record for record in list_records()}
    if name_or_file is None:
        if len(records) == 1:
            return next(iter(records.values()))
        if records:
            raise InvalidRequest(f"several clusters are running, say which: {', '.join(records)}")
        raise Unavailable("no cluster is running on this machine; start one with `baton up FILE`")
    name = cluster_name(name_or_file)
    if name not in records:
        running = f"; running: {', '.join(records)}" if records else "; none is"
        raise Unavailable(f"cluster {name} is not running on this machine{running}")
    return records[name]


def cluster_name(name_or_file: str) -> str:
    """A cluster's name, given as it is or as its topology file."""
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return load_topology(path).cluster
    return name_or_file
