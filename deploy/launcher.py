"""How the controller starts and ends processes, whatever starts them.

A launcher knows nothing of rosters or restarts. Its one hard duty: never call a process dead that may still write
to somebody's memory. `Exit.confirmed` is True only when the process is known to be gone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class MemberSpec:
    """One process of a cluster: a worker or a router.

    role         `prefill`, `decode`, `mixed` or `router`
    module       its entry point: a module with `run(config_json: str) -> int`, also runnable with `python -m`
    config_json  `WorkerConfig` or `RouterConfig` as JSON
    log_path     file that its standard error is appended to, on the host where it runs
    num_cpus, num_gpus, bundle   what it takes of the placement group, and from which bundle; None: nothing
    """

    member_id: str
    cluster: str
    role: str
    module: str
    config_json: str
    log_path: str
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    bundle: int | None = None


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended. `reason` is for people; `confirmed` says that it is certainly gone."""

    reason: str
    confirmed: bool


class MemberHandle(Protocol):
    """One running process."""

    @property
    def pid(self) -> int: ...

    async def exited(self) -> Exit:
        """Wait for the end of the process. May be awaited by several tasks, again and again."""
        ...


class Launcher(Protocol):
    """Starts members and ends them. Handles belong to the launcher that made them."""

    async def start(self, spec: MemberSpec) -> MemberHandle:
        """Start the member's process. Raises Unavailable when that is impossible now."""
        ...

    async def attach(self, spec: MemberSpec) -> MemberHandle | None:
        """The member's process that an earlier controller started, or None when none is left alive."""
        ...

    async def terminate(self, handle: MemberHandle) -> None:
        """Ask the process to end by itself (SIGTERM). Harmless when it is gone."""
        ...

    async def kill(self, handle: MemberHandle) -> bool:
        """End the process at once, hung or stopped as it may be; True when it is certainly gone."""
        ...

    async def close(self) -> None:
        """Let go of what the launcher itself holds. Processes that still run are left alone."""
        ...


def log_tail(spec: MemberSpec, num_lines: int = 12) -> str:
    """The last lines of the member's log as a person reads them, each told once; "" when there is none on this host."""
    try:
        with open(spec.log_path, "rb") as log:
            size = log.seek(0, 2)
            log.seek(max(0, size - 16384))
            lines = log.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    told = dict.fromkeys(_plain(line)[:1000] for line in lines[-num_lines:])
    return "\n".join(told)


def _plain(line: str) -> str:
    """What a line of JSON says, without when and where; another line as it is."""
    try:
        record = json.loads(line)
        return "\n".join(str(record[key]) for key in ("message", "exception") if key in record) or line
    except (ValueError, TypeError):
        return line
