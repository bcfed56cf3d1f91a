"""The router's dealings with the controller: it registers, watches the roster, and has workers ended.

The controller is on nobody's data path. While it is away the last roster stays valid, everything here is
tried again for as long as it takes, and requests go on.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

import grpc

from ..core.errors import Unavailable
from ..core.request import WorkerRef
from ..proto import worker_pb2 as pb
from ..proto import worker_pb2_grpc as rpc
from .wire import worker_to

KILL_TIMEOUT = 15.0  # seconds for the controller to be certain of a death
FIRST_PAUSE, MAX_PAUSE = 0.1, 2.0  # seconds between tries

CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)

logger = logging.getLogger("baton.router.roster")


class ControllerLink:
    """Everything the router says to the controller at `address` (host:port)."""

    def __init__(self, address: str, router_id: str) -> None:
        self._address = address
        self._router_id = router_id
        self._last_contact = asyncio.get_running_loop().time()
        self._connected = 0

    @property
    def away_for(self) -> float:
        """Seconds since the controller was last heard of; 0 while a stream to it is open."""
        return 0.0 if self._connected else asyncio.get_running_loop().time() - self._last_contact

    async def stay_registered(self, registration: pb.Registration) -> None:
        """Keep the router registered, for ever. Raises Unavailable when the controller refuses this process."""
        pause = FIRST_PAUSE
        while True:
            try:
                async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
                    async for reply in rpc.ControllerStub(channel).Register(registration):
                        if not reply.accepted:
                            raise Unavailable(f"the controller at {self._address} refused this router: {reply.reason}")
                        pause = FIRST_PAUSE
            except grpc.aio.AioRpcError as error:
                logger.info("not registered: controller at %s: %s", self._address, error.code().name)
            pause = await _rest(pause)

    async def watch(self, on_roster: Callable[[pb.Roster], None]) -> None:
        """Report every roster, for ever."""
        pause = FIRST_PAUSE
        while True:
            try:
                async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
                    pause = await self._watch_once(channel, on_roster, pause)
            except grpc.aio.AioRpcError as error:
                logger.info("no roster: controller at %s: %s", self._address, error.code().name)
            except Exception:  # a bug of ours; the next roster may fare better, and without any nobody is ever found
                logger.exception("a roster could not be handled")
            pause = await _rest(pause)

    async def kill(self, worker: WorkerRef, reason: str) -> None:
        """Return when `worker` is certainly dead. Asks again for as long as the controller cannot say so."""
        pause = FIRST_PAUSE
        while True:
            try:
                async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
                    request = pb.KillRequest(worker=worker_to(worker), reason=reason)
                    reply = await rpc.ControllerStub(channel).Kill(request, timeout=KILL_TIMEOUT)
                if reply.dead:
                    return
                logger.warning("the controller cannot confirm the death of %s yet", worker)
            except grpc.aio.AioRpcError as error:
                logger.warning("%s must be ended, but the controller is away: %s", worker, error.code().name)
            pause = await _rest(pause)

    async def _watch_once(self, channel: grpc.aio.Channel, on_roster: Callable[[pb.Roster], None], pause: float) -> float:
        counted = False
        try:
            async for roster in rpc.ControllerStub(channel).Watch(pb.WatchRequest(router_id=self._router_id)):
                if not counted:
                    self._connected, counted, pause = self._connected + 1, True, FIRST_PAUSE
                on_roster(roster)
        finally:
            if counted:
                self._connected -= 1
                self._last_contact = asyncio.get_running_loop().time()
        return pause


async def _rest(pause: float) -> float:
    """Sleep about `pause` seconds; the next pause."""
    await asyncio.sleep(pause * (0.5 + random.random()))
    return min(2 * pause, MAX_PAUSE)
