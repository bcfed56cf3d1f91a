"""The transports by name, and which of them to use for a peer. Needs no torch: settings and checks read the names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..core.errors import TransferRefused
from ..core.kv import Endpoint
from .transport import Transport

AUTO = "auto"

# `transports.make_transports` makes those that a worker can have, in the order in which `auto` prefers them.
TRANSPORTS = ("cuda_ipc", "shm", "torch_dist", "grpc")


def choose(name: str, endpoint: Endpoint, transports: Mapping[str, Transport]) -> Transport:
    """The transport `name`, or with `auto` the first that reaches the endpoint. Raises TransferRefused when none does."""
    if name == AUTO:
        for transport in transports.values():
            if transport.reaches(endpoint):
                return transport
        raise TransferRefused(f"none of the transports {sorted(transports)} reaches {endpoint.worker} at {endpoint.address!r}")
    if name not in transports:
        raise TransferRefused(f"no transport is called {name!r}; there are {AUTO}, {', '.join(sorted(transports))}")
    if not transports[name].reaches(endpoint):
        raise TransferRefused(f"transport {name} does not reach {endpoint.worker} at {endpoint.address!r} on {endpoint.host}")
    return transports[name]


def host_identity() -> str:
    """Names the machine and its process namespace: processes with equal identities can map each other's pools."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
