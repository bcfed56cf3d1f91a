"""The life of a worker process: read the configuration, build the engine, serve, end.

Shared by the entry points of the pools, which differ only in the member they put into the shell.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
from collections.abc import Callable

import grpc
from pydantic import TypeAdapter

from ..core.clock import Clock, MonotonicClock
from ..core.errors import BatonError, Unavailable
from ..core.kv import Endpoint
from ..core.request import WorkerRef
from ..core.topology import WorkerConfig
from ..kv_transfer.registry import host_identity
from ..observability.logs import configure
from ..proto import worker_pb2 as pb
from .build import Engine, build_engine
from .host import CHANNEL_OPTIONS, Member, WorkerHost
from .messages import worker_to
from .sessions import Sessions

MakeMember = Callable[[WorkerConfig, Engine, Endpoint, Sessions, Clock], Member]


def run_worker(config_json: str, make_member: MakeMember) -> int:
    """Run one worker until it is told to stop; return the exit status of its process.

    `config_json` is a `WorkerConfig` as JSON. A problem with the model or the topology is printed in one line.
    """
    config = TypeAdapter(WorkerConfig).validate_json(config_json)
    configure(config.worker_id)
    sys.setswitchinterval(0.001)  # the event loop must not wait 5 ms for the executor's thread to let go of the interpreter
    try:
        asyncio.run(serve_worker(config, make_member))
    except Unavailable as error:
        logging.getLogger("baton.worker").warning("%s", error)
        return 3
    except BatonError as error:
        logging.getLogger("baton.worker").error("%s", error)
        return 1
    return 0


async def serve_worker(config: WorkerConfig, make_member: MakeMember) -> None:
    """Build and serve one worker on the running event loop until it is told to stop or cancelled."""
    engine = build_engine(config)
    ref = WorkerRef(config.worker_id, secrets.randbits(63))
    clock, sessions = MonotonicClock(), Sessions()
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    port = server.add_insecure_port(f"{config.bind_host}:0")
    address = f"{config.bind_host}:{port}"
    places = engine.memory.path, engine.blocks.num_blocks, engine.layout, engine.handle
    endpoint = Endpoint(ref, address, host_identity(), *places)
    member = make_member(config, engine, endpoint, sessions, clock)
    registration = pb.Registration(
        worker=worker_to(ref), role=config.pool.role, address=address, pid=os.getpid(), host=host_identity()
    )
    host = WorkerHost(ref, config.pool.role, config.pool.block_size, engine.blocks.num_blocks, sessions, clock)
    try:
        await host.serve(server, member, registration, config.controller, config.orphan_grace)
    finally:
        engine.close()
