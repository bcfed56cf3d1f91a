"""Telling the controller that this process exists, for as long as it does."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

import grpc

from ..core.errors import Unavailable
from ..proto import worker_pb2 as pb
from ..proto import worker_pb2_grpc as rpc

logger = logging.getLogger("baton.registration")


async def stay_registered(controller: str, registration: Callable[[], pb.Registration], orphan_grace: float) -> None:
    """Keep a registration stream to `controller` (host:port) open, dialling again whenever it breaks.

    Returns never while the controller lives. Raises Unavailable when the controller refused this process (it
    has started another in its place) or could not be reached for `orphan_grace` seconds.
    """
    loop = asyncio.get_running_loop()
    last_contact = loop.time()
    delay = 0.1
    while True:
        accepted = False
        try:
            async with grpc.aio.insecure_channel(controller) as channel:
                stub = rpc.ControllerStub(channel)
                async for reply in stub.Register(registration()):
                    if not reply.accepted:
                        raise Unavailable(f"the controller at {controller} refused this process: {reply.reason}")
                    accepted = True
        except grpc.aio.AioRpcError as error:
            logger.info("controller at %s is away: %s", controller, error.code().name)
        if accepted:
            last_contact, delay = loop.time(), 0.1
        if loop.time() - last_contact > orphan_grace:
            raise Unavailable(f"no controller at {controller} for {orphan_grace:g} s: ending this process")
        await asyncio.sleep(delay * (0.5 + random.random()))
        delay = min(2 * delay, 2.0)
