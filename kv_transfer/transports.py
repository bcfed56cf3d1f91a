"""The transports that a worker has, by where its pool is."""

from __future__ import annotations

from ..core.kv import Endpoint
from .cuda_ipc import CudaIpcTransport, CudaMappings
from .device_pool import DevicePool
from .grpc_stream import GrpcTransport
from .link import PeerLinks
from .pool import KvMemory
from .registry import TRANSPORTS
from .shm import ShmTransport
from .transport import Transport


def make_transports(own: Endpoint, memory: KvMemory, checksum: bool = True) -> dict[str, Transport]:
    """Every transport for a worker that pushes from `memory`, in `auto`'s order; they share one connection per peer."""
    links = PeerLinks()
    made: dict[str, Transport] = {
        "shm": ShmTransport(memory, own.host, links, checksum),
        "grpc": GrpcTransport(memory, links, checksum),
    }
    if isinstance(memory, DevicePool):
        made["cuda_ipc"] = CudaIpcTransport(memory, own.host, links, CudaMappings(), checksum)
    return {name: made[name] for name in TRANSPORTS if name in made}
