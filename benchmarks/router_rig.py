"""What `router.py` measures: real routers, fake workers, an echo and clients, each in a process of its own on its core."""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc
import uvloop
from baton.core.topology import ModelSpec, PoolSpec, RouterConfig, RouterSpec, Topology
from baton.core.view import Role
from baton.deploy.ports import shared_router_ports
from baton.proto import inference_pb2 as pb
from fake_workers import FakeCluster, token_at
from pydantic import TypeAdapter
from router_clients import PROMPT, Load, Outcome, SharedPace, run_clients

MODEL = Path(__file__).resolve().parents[1] / "examples" / "model" / "pydoc-llama"
Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"
CORES = sorted(os.sched_getaffinity(0))
ROUTER_CORE, OTHER_CORE = (CORES * 2)[:2]
SECOND_ROUTER_CORE = (*CORES, OTHER_CORE, OTHER_CORE)[2]


@dataclass(slots=True)
class Rig:
    """All processes, running. `measure` asks the clients."""

    router: str
    echo: str
    router_pids: tuple[int, ...]
    echo_pid: int
    fakes_pid: int
    pace: SharedPace
    clients: multiprocessing.connection.Connection

    def measure(self, echo: bool = False, step: float = 0.0, window: int = 0, **fields: object) -> Outcome:
        """Put a load on the routers or on the echo. `step` and `window` set the workers' pace."""
        self.pace.step, self.pace.window = step, window
        self.pace.sent = self.pace.received = 0
        watched = (self.echo_pid,) if echo else self.router_pids, (self.fakes_pid,)
        self.clients.send(Load(self.echo if echo else self.router, watched=watched, **fields))  # type: ignore[arg-type]
        outcome: Outcome | str = self.clients.recv()
        if isinstance(outcome, str):
            raise SystemExit(outcome)
        return outcome

    def router_memory(self) -> int:
        """Resident bytes of the (first) router."""
        return int(Path(f"/proc/{self.router_pids[0]}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def running(decode: int = 1, routers: int = 1) -> Iterator[Rig]:
    """Fakes, routers, echo and clients, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    pace: SharedPace = context.Value(SharedPace, lock=False)  # type: ignore[assignment]
    children = []

    def start(target: Callable[..., None], *arguments: object) -> tuple[multiprocessing.connection.Connection, int]:
        ours, theirs = context.Pipe()
        child = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        child.start()
        theirs.close()
        children.append(child)
        assert child.pid is not None
        return ours, child.pid

    with tempfile.TemporaryFile() as log:
        fakes, fakes_pid = start(run_fakes, pace, decode, routers)
        echo, echo_pid = start(run_echo)
        clients, _ = start(run_clients, pace, OTHER_CORE)
        try:
            with _routers(fakes.recv(), routers, log.fileno()) as pids:
                yield Rig(fakes.recv(), echo.recv(), pids, echo_pid, fakes_pid, pace, clients)
        finally:
            for pipe in (fakes, echo, clients):
                pipe.close()
            for child in children:
                child.join(5)
                child.kill()


@contextmanager
def _routers(controller: str, count: int, log: int) -> Iterator[tuple[int, ...]]:
    """One or two real routers, each on one core; yields their pids."""
    pools = (PoolSpec(Role.PREFILL), PoolSpec(Role.DECODE))
    spec = RouterSpec(grpc="127.0.0.1:0", http="127.0.0.1:0", admission="queue_length", seed=1, replicas=count)
    with shared_router_ports(Topology("benchmark", ModelSpec(str(MODEL)), pools, router=spec)) as topology:
        cores = (ROUTER_CORE, SECOND_ROUTER_CORE)[:count]
        routers = [_start_router(RouterConfig(f"r{n}", topology, controller), core, log) for n, core in enumerate(cores)]
        try:
            yield tuple(router.pid for router in routers)
        finally:
            for router in routers:
                router.terminate()
            for router in routers:
                router.wait()


def _start_router(config: RouterConfig, core: int, log: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "baton.deploy.router_process", TypeAdapter(RouterConfig).dump_json(config).decode()],
        stderr=log,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )


def run_fakes(pipe: multiprocessing.connection.Connection, pace: SharedPace, decode: int, routers: int) -> None:
    """The controller and the workers, until the other end of the pipe closes. Says its address, then the routers'."""

    async def serve() -> None:
        cluster = FakeCluster(pace, num_decode=decode)
        await cluster.start()
        pipe.send(cluster.address)
        registrations = [await cluster.registered.get() for _ in range(routers)]
        pipe.send(registrations[0].shared_address or registrations[0].address)
        await asyncio.to_thread(pipe.poll, None)
        await cluster.stop()

    os.sched_setaffinity(0, {OTHER_CORE})
    uvloop.run(serve())


def run_echo(pipe: multiprocessing.connection.Connection) -> None:
    """A grpc.aio server that answers with as many messages as tokens are asked for."""
    name = "r0-0123456789ab-1234"
    middle = pb.GenerateResponse(request_id=name, token_ids=[token_at(0)], text=" all")
    last = pb.GenerateResponse(request_id=name, token_ids=[token_at(0)], text=" all", finish_reason="length")
    last.usage.prompt_tokens, last.usage.completion_tokens = PROMPT, 16
    last.stages.CopyFrom(pb.StageTimes(queue=0.1, handoff=0.1, first_decode=0.1, total=0.1))
    message, end = middle.SerializeToString(), last.SerializeToString()

    async def generate(request: pb.GenerateRequest, context: Context) -> AsyncIterator[bytes]:
        for _ in range(request.sampling.max_tokens - 1):
            yield message
        yield end

    async def serve() -> None:
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        handler = grpc.unary_stream_rpc_method_handler(generate, request_deserializer=pb.GenerateRequest.FromString)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("baton.v1.Inference", {"Generate": handler}),))
        pipe.send(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
        await asyncio.to_thread(pipe.poll, None)
        await server.stop(None)

    os.sched_setaffinity(0, {ROUTER_CORE})
    uvloop.run(serve())
