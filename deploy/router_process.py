"""The router's process: reads its configuration, puts the parts together, serves, ends cleanly.

`python -m baton.deploy.router_process '<RouterConfig as JSON>'`. This is a composition root: it
joins the router with its faces and chooses policies by their names, which is why it stands here and not in `router`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from pathlib import Path

import uvloop
from pydantic import TypeAdapter, ValidationError

from .. import __version__
from ..api.grpc_server import HealthFace, InferenceFace, ServerInfo, build_server
from ..api.http_server import HttpFace, HttpServer
from ..api.model_info import load_model_info, model_directory
from ..api.tokenizer import TextTokenizer
from ..api.workload_face import WorkloadFace
from ..core.clock import MonotonicClock
from ..core.errors import BatonError, TopologyError, Unavailable
from ..core.topology import RouterConfig, Topology
from ..observability.logs import configure
from ..observability.metrics import Metrics
from ..policy.admission import ADMISSION
from ..policy.routing import ROUTING
from ..proto import worker_pb2 as pb
from ..proto import worker_pb2_grpc as rpc
from ..router.lifecycle import Lifecycle, LifecycleConfig
from ..router.readiness import Readiness
from ..router.roster import ControllerLink
from ..router.service import RouterService, ServiceOptions
from ..router.tape import TapeWriter
from .listeners import Listeners, bind
from .load_mode import follow_load, settle_memory
from .settings import dump_topology

SHUTDOWN_GRACE = 2.0  # seconds that running requests get to end by themselves
ORPHAN_CHECK = 1.0  # seconds between looks at the controller link

logger = logging.getLogger("baton.router")


def run(config_json: str) -> int:
    """Serve until told to stop; the exit status of the process.

    A problem with the configuration, the model or a port is printed in one line.
    """
    try:
        config = TypeAdapter(RouterConfig).validate_json(config_json)
    except ValidationError as error:
        configure("router")
        logger.error("the router's configuration is not valid: %s", error)
        return 1
    configure(config.router_id)
    settle_memory()
    try:
        uvloop.run(_serve_alone(config))
    except Unavailable as error:
        logger.warning("%s", error)
        return 3
    except BatonError as error:
        logger.error("%s", error)
        return 1
    return 0


async def _serve_alone(config: RouterConfig) -> None:
    """Serve in a process that does nothing else."""
    tuning = asyncio.create_task(follow_load(), name="load mode")
    try:
        await serve_router(config)
    finally:
        tuning.cancel()


async def serve_router(config: RouterConfig) -> None:
    """Build and serve one router on the running event loop until a signal, or until it is refused or orphaned."""
    topology = config.topology
    directory = model_directory(topology.model)
    model = load_model_info(topology.model, directory)
    tokenizer = TextTokenizer.load(directory)
    metrics, writer = Metrics(), TapeWriter(Path(topology.router.tape)) if topology.router.tape else None
    epoch = secrets.randbits(48)
    options = ServiceOptions(config.router_id, epoch, topology.router.request_timeout, topology.router.seed)
    link = ControllerLink(config.controller, config.router_id)
    clock = MonotonicClock()
    service = RouterService(options, make_lifecycle(topology), clock, link, metrics, writer)
    health = HealthFace()
    changes: asyncio.Queue[bool] = asyncio.Queue()
    canary = (await tokenizer.encode("a", add_special_tokens=False))[:2] or (0,)
    readiness = Readiness(service, canary, changes.put_nowait)
    metrics.observe_cluster(
        lambda: service.num_active, lambda: service.num_pending, lambda: readiness.ready, service.membership.samples
    )
    info = ServerInfo(__version__, topology.cluster, config.router_id, topology.slo, time.monotonic())
    face = InferenceFace(service, readiness, model, tokenizer, info)
    grpc_server = build_server(face, health, shares_port=topology.router.replicas > 1)
    rpc.add_RouterServicer_to_server(WorkloadFace(service.recent, dump_topology(topology), clock), grpc_server)
    listeners = bind(grpc_server, config)
    http_server = HttpServer(HttpFace(service, readiness, metrics, model, tokenizer, topology.slo).app(), listeners.http)
    registration = _registration(config, epoch, listeners)
    await health.set(False)
    await grpc_server.start()
    service.start()
    served = [f"gRPC on {listeners.own_grpc}, HTTP on {listeners.own_http}"]
    served += [f"with others gRPC on {listeners.shared_grpc}, HTTP on {listeners.shared_http}"] if listeners.shared_grpc else []
    logger.info("router %s serves %s", config.router_id, "; ".join(served))
    http = asyncio.create_task(http_server.serve(), name="http")
    background = [
        asyncio.create_task(readiness.run(), name="readiness"),
        asyncio.create_task(_publish(changes, health), name="health"),
        asyncio.create_task(link.stay_registered(registration), name="registration"),
        asyncio.create_task(_orphaned(link, service, config), name="orphan watch"),
        asyncio.create_task(_signalled(), name="signals"),
    ]
    try:
        done, _ = await asyncio.wait([http, *background], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await health.set(False)
        await service.close(SHUTDOWN_GRACE)
        http_server.stop()
        await asyncio.gather(http, grpc_server.stop(0.5), return_exceptions=True)
        if writer is not None:
            writer.close()
        logger.info("router %s has ended", config.router_id)


def _registration(config: RouterConfig, epoch: int, listeners: Listeners) -> pb.Registration:
    return pb.Registration(
        worker=pb.WorkerId(worker_id=config.router_id, epoch=epoch),
        role="router",
        address=listeners.own_grpc,
        http_address=listeners.own_http,
        shared_address=listeners.shared_grpc,
        shared_http_address=listeners.shared_http,
        pid=os.getpid(),
        host=socket.gethostname(),
    )


async def _publish(changes: asyncio.Queue[bool], health: HealthFace) -> None:
    """Readiness, as grpc.health.v1 shows it."""
    while True:
        await health.set(await changes.get())


async def _orphaned(link: ControllerLink, service: RouterService, config: RouterConfig) -> None:
    """Raise Unavailable when nobody has looked after this process for too long and it serves nobody."""
    while True:
        remaining = config.orphan_grace - link.away_for
        if remaining <= 0 and not service.num_active:
            raise Unavailable(f"no controller at {config.controller} for {config.orphan_grace:g} s: ending this router")
        await asyncio.sleep(max(ORPHAN_CHECK, remaining))


async def _signalled() -> None:
    """Return on SIGTERM or SIGINT. Outside the main thread (inside a Ray actor) signals are not ours: never."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    with contextlib.suppress(RuntimeError, ValueError):
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
    await stop.wait()


def make_lifecycle(topology: Topology) -> Lifecycle:
    """The brain with the policies that the topology names."""
    router = topology.router
    if router.routing not in ROUTING:
        raise TopologyError(f"router.routing: {router.routing!r} is not one of {', '.join(ROUTING)}")
    if router.admission not in ADMISSION:
        raise TopologyError(f"router.admission: {router.admission!r} is not one of {', '.join(ADMISSION)}")
    config = LifecycleConfig(
        slo=topology.slo,
        lease=topology.kv_transfer.lease,
        request_timeout=router.request_timeout,
        local_prefill_tokens=router.local_prefill_tokens,
    )
    return Lifecycle(config, ROUTING[router.routing], ADMISSION[router.admission](router.max_queue, topology.slo))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run one router.")
    parser.add_argument("config", help="a RouterConfig as JSON")
    arguments = parser.parse_args()
    sys.exit(run(arguments.config))
