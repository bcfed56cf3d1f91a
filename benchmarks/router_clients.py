"""The clients of `router.py`: they put one load on an address, see every message through, and say what came of it."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing.connection
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import uvloop
from baton.proto import inference_pb2 as pb
from raw_client import Answer, Connection

PATH = "/baton.v1.Inference/Generate"
PROMPT = 64
CONNECTIONS = 16


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


def run_clients(pipe: multiprocessing.connection.Connection, pace: SharedPace, core: int) -> None:
    """Answers every Load that comes through the pipe with an Outcome."""
    os.sched_setaffinity(0, {core})
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
        cpu = [sum(map(cpu_seconds, pids)) for pids in (*self._load.watched, (os.getpid(),))]
        return replace(outcome, seconds=time.monotonic(), first=[], cpu=cpu)


def cpu_seconds(pid: int) -> float:
    """What a process has used since it began."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    fields = stat[stat.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
