"""The transports that a worker has, by where its pool is."""

from __future__ import annotations

from ..core.kv import Endpoint
from .cuda_ipc import CudaIpcTransport, CudaMappings
from .device_pool import DevicePool
from .grpc_stream import GrpcTransport
from .link import PATIENCE, PeerLinks
from .pool import KvMemory
from .shm import ShmTransport
from .torch_dist import TorchDistTransport, end_of
from .transport import Transport


def make_transports(own: Endpoint, memory: KvMemory, checksum: bool = True) -> dict[str, Transport]:
    """Every transport for a worker that pushes from `memory`, in `auto`'s order; they share one connection per peer.

    Between hosts without GPUs `auto` prefers grpc, though gloo is faster: it needs no other port than the one that is there.
    """
    links = PeerLinks()
    shm, stream = ShmTransport(memory, own.host, links, checksum), GrpcTransport(memory, links, checksum)
    group = TorchDistTransport(end_of(memory), own, links, PATIENCE, checksum)
    if not isinstance(memory, DevicePool):
        return _named(shm, stream, group)
    return _named(CudaIpcTransport(memory, own.host, links, CudaMappings(), checksum), shm, group, stream)


def _named(*transports: Transport) -> dict[str, Transport]:
    return {transport.name: transport for transport in transports}
