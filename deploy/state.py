"""What this host remembers of running clusters: one small file each, and a lock held by the process that runs it.

The lock, not the file, says whether a cluster is running: it ends with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..core.errors import Unavailable
from .settings import state_folder


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    """One cluster.

    pid         of the process that runs it; 0 when it lives on a Ray cluster of its own
    status      `starting`, `ready`
    controller, grpc, http   host:port, "" while unknown
    """

    cluster: str
    pid: int
    launcher: str
    status: str
    logs: str
    controller: str = ""
    grpc: str = ""
    http: str = ""
    ray_address: str | None = None


class Claim:
    """The right to run one cluster on this host, and its record."""

    def __init__(self, folder: Path, record: ClusterRecord) -> None:
        self._path = folder / f"{record.cluster}.json"
        self.record = record
        self.write(record)

    def write(self, record: ClusterRecord) -> None:
        """Replace the record at once, so that a reader never sees half of one."""
        self.record = record
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(record), indent=1))
        os.replace(draft, self._path)

    def drop(self) -> None:
        """Forget the cluster."""
        self._path.unlink(missing_ok=True)


@contextmanager
def claim(record: ClusterRecord) -> Iterator[Claim]:
    """Hold the cluster's lock and record while inside.

    Raises Unavailable when another process runs a cluster of this name. The record goes on leaving,
    unless the cluster lives on without us (pid 0).
    """
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / f"{record.cluster}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            _lock(lock)
        except BlockingIOError:
            raise Unavailable(already_running(read_record(record.cluster), record.cluster)) from None
        earlier = read_record(record.cluster)
        if earlier is not None and earlier.pid == 0:
            raise Unavailable(already_running(earlier))
        held = Claim(folder, record)
        try:
            yield held
        finally:
            if held.record.pid != 0:
                held.drop()
    finally:
        os.close(lock)


def read_record(cluster: str) -> ClusterRecord | None:
    """The record of `cluster`, or None when there is none that can be read."""
    try:
        return ClusterRecord(**json.loads((state_folder() / f"{cluster}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def forget(cluster: str) -> None:
    """Remove the record of a cluster that no longer runs."""
    (state_folder() / f"{cluster}.json").unlink(missing_ok=True)


def is_running(record: ClusterRecord) -> bool:
    """Whether the process that wrote the record still holds its lock. A cluster on a running Ray counts as running."""
    if record.pid == 0:
        return True
    try:
        lock = os.open(state_folder() / f"{record.cluster}.lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def list_records() -> list[ClusterRecord]:
    """The records of all clusters that run on this host, by name. Records of dead processes are removed."""
    records = []
    for path in sorted(state_folder().glob("*.json")):
        record = read_record(path.stem)
        if record is None:
            continue
        if is_running(record):
            records.append(record)
        else:
            forget(record.cluster)
    return records


def on_ray_forever(record: ClusterRecord) -> ClusterRecord:
    """The record of a cluster that lives on a running Ray after this process."""
    return replace(record, pid=0)


def log_folder(cluster: str) -> Path:
    """Where the members of `cluster` write their logs."""
    return state_folder() / "logs" / cluster


def ledger_path(cluster: str) -> Path:
    """The subprocess launcher's list of what runs."""
    return state_folder() / "members" / f"{cluster}.json"


def already_running(record: ClusterRecord | None, cluster: str = "") -> str:
    """What to tell somebody who starts a cluster that is there already."""
    if record is None:
        return f"cluster {cluster} is being started by another process"
    where = f"process {record.pid}" if record.pid else f"Ray at {record.ray_address}"
    faces = f", gRPC {record.grpc}, HTTP http://{record.http}" if record.http else ""
    state = "running" if record.status == "ready" else record.status
    return f"cluster {record.cluster} is already {state} ({where}{faces}); `baton down {record.cluster}` ends it"


def _lock(lock: int) -> None:
    """Take the lock. `is_running` of another process holds it for microseconds, which is no reason to give up."""
    for _ in range(5):
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.02)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
