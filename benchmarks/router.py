"""What the router costs: the real router process on one core, with workers that compute nothing, beside a bare grpc.aio server.

    .venv/bin/python benchmarks/router.py [--quick] [--memory 100000]

Fake workers (one prefill, one decode) and clients share the other core and are never the bottleneck: their share of it
is printed. The echo is a grpc.aio server on the router's core, at other moments of the same run, with nothing behind it: it
answers the same requests over the same connections with as many messages of the same size, serialised beforehand.

requests_per_s       64 tokens in, 16 out, one a step; 128 requests at once, as many as the router can serve
messages_fraction    128 tokens out, 64 streams: messages a second at the clients, divided by those of the echo
coalesced_tok_s      256 streams whose clients take 0.2 s over every message, 900 tokens out, as many as the router can take
added_ttft_ms_p50    one request at a time: p50 of (request sent to first token received - time in the fake worker) minus
                     p50 of (request sent to first message received) at the echo. Both are printed
two_routers_requests_per_cpu_s_ratio
                     two routers on one port, each with as many requests as `requests_per_s` gives one: requests per second of
                     their CPU time together, divided by those of one router in turns of the same run. Two routers serve
                     1.7 times one's rate, given the cores, if the ratio is 0.85 or more. The second router has a third core
                     where there is one; where there are two, it shares that of workers and clients (on one core with the
                     first, two processes that take turns would be measured instead). The claim about the clock itself
                     needs four cores or more, so `two_routers_speedup`, their rate divided by one's, stays below what their
                     `two_routers_cores` (CPU seconds a second) leave room for

`..._cpu...` count the router's CPU seconds instead of the clock's: on a busy machine they say more.
--memory N also watches the router's memory over N requests (memory_bytes_per_request: growth after the first tenth).
The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import multiprocessing
import multiprocessing.connection
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from raw_client import Answer, Connection

MODEL = Path(__file__).resolve().parents[1] / "examples" / "model" / "pydoc-llama"
PATH = "/baton.v1.Inference/Generate"
PROMPT = 64
SHORT, SHORT_STREAMS = 16, 128
LONG, LONG_STREAMS = 128, 64
LAGGING, LAGGING_TOKENS, LAG = 256, 900, 0.2
CONNECTIONS = 16
Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"
CORES = sorted(os.sched_getaffinity(0))
ROUTER_CORE, OTHER_CORE = (CORES * 2)[:2]
SECOND_ROUTER_CORE = (*CORES, OTHER_CORE, OTHER_CORE)[2]


class SharedPace(ctypes.Structure):
    """`fake_workers.Pace` in memory that the processes share."""

    _fields_ = [
        ("step", ctypes.c_double),
        ("window", ctypes.c_int64),
        ("sent", ctypes.c_int64),
        ("received", ctypes.c_int64),
    ]


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients are to do: keep `streams` requests of `tokens` output tokens running.

    seconds            how long is measured, after `settle` seconds
    num_requests       instead: until so many have ended, all of them measured
    lag                seconds that a client takes over every message of a stream
    watched            groups of pids whose CPU time is measured, that of a group together: the server's first
    """

    address: str
    tokens: int
    streams: int
    connections: int = CONNECTIONS
    seconds: float = 2.0
    settle: float = 0.5
    num_requests: int = 0
    lag: float = 0.0
    watched: tuple[tuple[int, ...], ...] = ()


@dataclass(slots=True)
class Outcome:
    """What the clients saw within the measured time. `cpu` holds the CPU seconds of the watched, then the clients' own."""

    seconds: float = 0.0
    num_requests: int = 0
    num_messages: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    first: list[float] = field(default_factory=list)  # seconds to the first message, without the time in the worker
    cpu: list[float] = field(default_factory=list)


# ---- processes ---------------------------------------------------------------------------------------


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
    last.usage.prompt_tokens, last.usage.completion_tokens = PROMPT, SHORT
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


def run_clients(pipe: multiprocessing.connection.Connection, pace: SharedPace) -> None:
    """Answers every Load that comes through the pipe with an Outcome."""
    os.sched_setaffinity(0, {OTHER_CORE})
    while True:
        try:
            load: Load = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(uvloop.run(_serve_clients(load, pace)))
        except RuntimeError as error:
            pipe.send(str(error))


async def _serve_clients(load: Load, pace: SharedPace) -> Outcome:
    return await Clients(load, pace).run()


class Clients:
    """One load. Create it inside the running event loop. Raises RuntimeError when a stream does not end well."""

    def __init__(self, load: Load, pace: SharedPace) -> None:
        self._load = load
        self._pace = pace
        self._outcome = Outcome()
        self._measured: Outcome | None = None
        sampling = pb.Sampling(max_tokens=load.tokens, temperature=0.0, ignore_eos=True)
        request = pb.GenerateRequest(sampling=sampling)
        request.tokens.ids.extend(range(300, 300 + PROMPT))
        self._request = request.SerializeToString()
        self._started = 0
        self._running = 0
        self._over = False
        self._idle: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # all have ended, or one has failed

    async def run(self) -> Outcome:
        load, loop = self._load, asyncio.get_running_loop()
        host, port = load.address.rsplit(":", 1)
        connections = []
        for _ in range(min(load.connections, load.streams)):
            _, connection = await loop.create_connection(self._connection, host, int(port))
            await connection.ready
            connections.append(connection)
        began = self._snapshot()
        for number in range(load.streams):
            self._start(connections[number % len(connections)])
        if not load.num_requests:
            await asyncio.wait([self._idle], timeout=load.settle)
            began = self._snapshot()
            await asyncio.wait([self._idle], timeout=load.seconds)
            ended = self._snapshot()
            self._over = True
            await self._idle
        else:
            await self._idle
            ended = self._snapshot()
        for connection in connections:
            connection.close()
            await connection.closed
        return Outcome(
            seconds=ended.seconds - began.seconds,
            num_requests=ended.num_requests - began.num_requests,
            num_messages=ended.num_messages - began.num_messages,
            num_tokens=ended.num_tokens - began.num_tokens,
            num_bytes=ended.num_bytes - began.num_bytes,
            first=self._outcome.first,
            cpu=[after - before for before, after in zip(began.cpu, ended.cpu, strict=True)],
        )

    def _connection(self) -> Connection:
        return Connection(PATH, self._on_message, self._on_end, self._load.lag)

    def _start(self, connection: Connection) -> None:
        self._started += 1
        self._running += 1
        connection.send(self._request)

    def _on_message(self, num_tokens: int, num_bytes: int) -> None:
        self._outcome.num_messages += 1
        self._outcome.num_bytes += num_bytes
        self._outcome.num_tokens += num_tokens
        self._pace.received += num_tokens

    def _on_end(self, connection: Connection, answer: Answer) -> None:
        if answer.finish != "length" or len(answer.tokens) != self._load.tokens:
            got = f"{len(answer.tokens)} of {self._load.tokens} tokens"
            self._fail(f"a stream ended as {answer.finish!r} with {got}: {answer.trailers!r}")
            return
        self._running -= 1
        outcome = self._outcome
        outcome.num_requests += 1
        outcome.first.append(answer.first - answer.sent - answer.think)
        if not self._over and (not self._load.num_requests or self._started < self._load.num_requests):
            self._start(connection)
        elif not self._running and not self._idle.done():
            self._idle.set_result(None)

    def _fail(self, reason: str) -> None:
        if not self._idle.done():
            self._idle.set_exception(RuntimeError(reason))

    def _snapshot(self) -> Outcome:
        outcome = self._outcome
        cpu = [sum(map(_cpu_seconds, pids)) for pids in (*self._load.watched, (os.getpid(),))]
        return replace(outcome, seconds=time.monotonic(), first=[], cpu=cpu)


def _cpu_seconds(pid: int) -> float:
    stat = Path(f"/proc/{pid}/stat").read_text()
    fields = stat[stat.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- the benchmark -----------------------------------------------------------------------------------


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
        clients, _ = start(run_clients, pace)
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


def main() -> None:
    arguments = _arguments()
    figures: dict[str, float] = {}
    with running() as rig:
        turns, seconds = (1, 1.5) if arguments.quick else (3, 3.0)
        rig.measure(tokens=SHORT, streams=SHORT_STREAMS, seconds=0.5)  # warm up
        rig.measure(echo=True, tokens=SHORT, streams=SHORT_STREAMS, seconds=0.5)
        figures |= _first_token(rig, 200 if arguments.quick else 1000)
        figures |= _requests(rig, turns, seconds)
        figures |= _messages(rig, turns, seconds)
        if arguments.memory:
            figures |= _memory(rig, arguments.memory)
    with running(decode=2) as rig:
        figures |= _coalesced(rig, seconds + 1)
    with running() as one, running(routers=2) as two:
        figures |= _two_routers(one, two, turns, seconds)
    print(json.dumps(figures))


def _first_token(rig: Rig, count: int) -> dict[str, float]:
    """One request at a time on an idle router; in turns with the echo."""
    through, bare = [], []
    for _ in range(4):
        through += rig.measure(tokens=2, streams=1, num_requests=count // 4).first
        bare += rig.measure(echo=True, tokens=2, streams=1, num_requests=count // 4).first
    ttft, round_trip = 1000 * statistics.median(through), 1000 * statistics.median(bare)
    print(f"first token: {ttft:.3f} ms through the router without the worker's own time, {round_trip:.3f} ms from the echo (p50)")
    return {"added_ttft_ms_p50": round(ttft - round_trip, 3), "echo_first_ms_p50": round(round_trip, 3)}


def _requests(rig: Rig, turns: int, seconds: float) -> dict[str, float]:
    runs, echoes = _in_turn(rig, turns, tokens=SHORT, streams=SHORT_STREAMS, seconds=seconds, step=0.002)
    return {
        "requests_per_s": _median([run.num_requests / run.seconds for run in runs]),
        "requests_per_cpu_s": _median([run.num_requests / run.cpu[0] for run in runs]),
        "echo_requests_per_s": _median([run.num_requests / run.seconds for run in echoes]),
        "messages_per_short_request": _median([run.num_messages / run.num_requests for run in runs], 2),
    }


def _messages(rig: Rig, turns: int, seconds: float) -> dict[str, float]:
    runs, echoes = _in_turn(rig, turns, tokens=LONG, streams=LONG_STREAMS, seconds=seconds, window=LONG_STREAMS)
    rates = [run.num_messages / run.seconds for run in runs]
    bare = [run.num_messages / run.seconds for run in echoes]
    cpu = [(run.cpu[0] / run.num_messages, echo.cpu[0] / echo.num_messages) for run, echo in zip(runs, echoes, strict=True)]
    return {
        "messages_fraction": _median([rate / echo for rate, echo in zip(rates, bare, strict=True)], 3),
        "messages_fraction_cpu": _median([echo / run for run, echo in cpu], 3),
        "messages_per_s": _median(rates),
        "echo_messages_per_s": _median(bare),
        "tokens_per_message": _median([run.num_tokens / run.num_messages for run in runs], 3),
    }


def _coalesced(rig: Rig, seconds: float) -> dict[str, float]:
    run = rig.measure(tokens=LAGGING_TOKENS, streams=LAGGING, seconds=seconds, settle=1.0, window=150 * LAGGING, lag=LAG)
    _print("lagging clients", run)
    return {
        "coalesced_tok_s": round(run.num_tokens / run.seconds),
        "coalesced_tok_cpu_s": round(run.num_tokens / run.cpu[0]),
        "coalesced_tokens_per_message": round(run.num_tokens / run.num_messages, 1),
    }


def _two_routers(one: Rig, two: Rig, turns: int, seconds: float) -> dict[str, float]:
    """The same load per router on one router and on two, one after the other."""
    alone, both = [], []
    for rig in (one, two):  # warm up
        rig.measure(tokens=SHORT, streams=SHORT_STREAMS, seconds=0.5)
    for _ in range(turns):
        alone.append(one.measure(tokens=SHORT, streams=SHORT_STREAMS, seconds=seconds, step=0.002))
        _print("one router", alone[-1])
        before = [_cpu_seconds(pid) for pid in two.router_pids]
        both.append(two.measure(tokens=SHORT, streams=2 * SHORT_STREAMS, seconds=seconds, step=0.002))
        shares = [_cpu_seconds(pid) - cpu for pid, cpu in zip(two.router_pids, before, strict=True)]
        _print("two routers", both[-1])
        if min(shares) < 0.1 * sum(shares):
            raise SystemExit("the kernel gave nearly all connections to one of the two routers: nothing was measured")
    per_cpu = [[run.num_requests / run.cpu[0] for run in runs] for runs in (alone, both)]
    per_clock = [[run.num_requests / run.seconds for run in runs] for runs in (alone, both)]
    return {
        "two_routers_requests_per_cpu_s": _median(per_cpu[1]),
        "two_routers_requests_per_cpu_s_ratio": _median([pair / single for single, pair in zip(*per_cpu, strict=True)], 3),
        "two_routers_speedup": _median([pair / single for single, pair in zip(*per_clock, strict=True)], 3),
        "two_routers_cores": _median([run.cpu[0] / run.seconds for run in both], 2),
    }


def _memory(rig: Rig, num_requests: int) -> dict[str, float]:
    sizes = []
    for _ in range(10):
        rig.measure(tokens=SHORT, streams=SHORT_STREAMS, num_requests=num_requests // 10, step=0.002)
        sizes.append(rig.router_memory())
        print(f"memory after {len(sizes) * num_requests // 10} requests: {sizes[-1] / 2**20:.1f} MiB", flush=True)
    return {"memory_bytes_per_request": round((sizes[-1] - sizes[0]) / (0.9 * num_requests), 1)}


def _in_turn(rig: Rig, turns: int, step: float = 0.0, window: int = 0, **fields: object) -> tuple[list[Outcome], list[Outcome]]:
    """The same load on the echo and on the router, one after the other."""
    runs, echoes = [], []
    for _ in range(turns):
        echoes.append(rig.measure(echo=True, **fields))
        _print("echo", echoes[-1])
        runs.append(rig.measure(step=step, window=window, **fields))
        _print("router", runs[-1])
    return runs, echoes


def _print(name: str, run: Outcome) -> None:
    share = [f"{who} {100 * cpu / run.seconds:.0f}%" for who, cpu in zip(("server", "fakes", "clients"), run.cpu, strict=True)]
    print(
        f"{name}: {run.num_requests / run.seconds:.0f} requests/s, {run.num_messages / run.seconds:.0f} messages/s of "
        f"{run.num_bytes / run.num_messages:.0f} bytes, {run.num_tokens / run.seconds:.0f} tokens/s; server "
        f"{1e6 * run.cpu[0] / run.num_messages:.1f} us a message, {1e6 * run.cpu[0] / max(1, run.num_requests):.0f} us a "
        f"request; CPU: {', '.join(share)}",
        flush=True,
    )


def _median(values: list[float], digits: int = 0) -> float:
    return round(statistics.median(values), digits)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter turns, one of each")
    parser.add_argument("--memory", type=int, default=0, metavar="N", help="also watch the router's memory over N requests")
    return parser.parse_args()


if __name__ == "__main__":
    main()
