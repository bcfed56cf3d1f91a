"""The routers that serve beside this one: who they are, and what one router asks of another.

A request's id begins with the name and epoch of the router that gave it, so whoever is asked to end a request knows
whose it is. Peers are asked for nothing else: they share workers, never state.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence

import grpc

from ..core.request import WorkerRef
from ..proto import inference_pb2 as pb
from ..proto import inference_pb2_grpc as rpc
from ..proto import worker_pb2
from .wire import worker_from

PATIENCE = 2.0  # seconds that a peer may take to answer

# A subchannel of its own: no back-off is inherited from an earlier life at the same address.
CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)

logger = logging.getLogger("baton.router.peers")


def id_prefix(router: WorkerRef) -> str:
    """What the ids of all requests of this life of a router begin with."""
    return f"{router.worker_id}-{router.epoch:x}-"


class Peers:
    """The routers on the controller's roster. Create it inside a running event loop."""

    def __init__(self, own: WorkerRef) -> None:
        self._own = own
        self._routers: tuple[worker_pb2.Registration, ...] = ()
        self._peers: dict[WorkerRef, Peer] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def routers(self) -> Sequence[worker_pb2.Registration]:
        """All routers of the cluster as they registered, this one among them; by name."""
        return self._routers

    def update(self, routers: Iterable[worker_pb2.Registration]) -> None:
        """The routers of a new roster."""
        self._routers = tuple(sorted(routers, key=lambda router: router.worker.worker_id))
        alive = {worker_from(router.worker): router.address for router in self._routers}
        alive.pop(self._own, None)
        for ref in self._peers.keys() - alive.keys():
            self._let_go(self._peers.pop(ref))
        for ref in alive.keys() - self._peers.keys():
            self._peers[ref] = Peer(ref, alive[ref])

    async def abort(self, request_id: str) -> bool:
        """End a request that is not ours; False when nobody has it.

        An id that a router gave is that router's business alone. A client's own name for a request tells nothing, so
        every peer is asked.
        """
        owner = next((peer for ref, peer in self._peers.items() if request_id.startswith(id_prefix(ref))), None)
        asked = list(self._peers.values()) if owner is None else [owner]
        return any(await asyncio.gather(*(peer.abort(request_id) for peer in asked)))

    async def close(self) -> None:
        for peer in self._peers.values():
            self._let_go(peer)
        self._peers.clear()
        await asyncio.gather(*self._closing)

    def _let_go(self, peer: Peer) -> None:
        task = asyncio.create_task(peer.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class Peer:
    """One life of another router. It is dialled when it is first asked."""

    def __init__(self, ref: WorkerRef, address: str) -> None:
        self._ref = ref
        self._address = address
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    async def abort(self, request_id: str) -> bool:
        """Whether the request was there, and has been ended. False as well when the peer does not answer."""
        if self._closed:
            return False
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS)
        try:
            request = pb.AbortRequest(request_id=request_id, only_here=True)
            return bool((await rpc.InferenceStub(self._channel).Abort(request, timeout=PATIENCE)).found)
        except grpc.aio.AioRpcError as error:
            logger.warning("router %s does not answer about request %s: %s", self._ref, request_id, error.code().name)
            return False

    async def close(self) -> None:
        """Let questions that are under way be answered, and ask no more."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close(PATIENCE)
