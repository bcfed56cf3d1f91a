"""A torch process group of two: one worker sends, the other receives. NCCL between GPUs, gloo between hosts.

Each direction between two workers has a group of its own, and a thread that runs its operations in the order in which they
were announced on the side channel. So both ends agree on the order without asking, and two workers that push to each other
cannot wait for each other in a circle.
"""

from __future__ import annotations

import asyncio
import socket
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Protocol, TypeVar, cast

import msgpack
import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroupGloo, Store, TCPStore, Work

from ..core.errors import PeerLost, TransferDamaged, TransferError

T = TypeVar("T")

SENDER, RECEIVER = 0, 1  # ranks
EXIT_PATIENCE = 1.0  # seconds that the end of the process waits for an operation


class Group(Protocol):
    """The part of a torch process group that is used."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Work: ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Work: ...


@dataclass(frozen=True, slots=True)
class Invitation:
    """Where the two ends meet: the sender's store, and which backend both use."""

    host: str
    port: int
    backend: str

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb((self.host, self.port, self.backend))
        return packed

    @classmethod
    def unpack(cls, data: memoryview) -> Invitation:
        """The inverse of `pack`. Raises TransferDamaged for anything else."""
        try:
            host, port, backend = msgpack.unpackb(data)
            return cls(str(host), int(port), str(backend))
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise TransferDamaged(f"these {len(data)} bytes are no invitation: {error}") from error


class Lane:
    """One direction: a group, and the thread that runs its operations one by one, in the order in which they were asked for.

    Waiting is bounded by `patience` seconds. The thread ends with `close`, at the latest when its operation gives up.
    """

    def __init__(self, patience: float) -> None:
        self.order = asyncio.Lock()  # held while a segment is announced and its sending asked for
        self._patience = timedelta(seconds=patience)
        self._closed = False
        self._group: Group | None = None
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        thread = Thread(target=self._run, name="torch_dist", daemon=True)
        thread.start()
        weakref.finalize(self, _end, self._work, thread)

    def open(self, invitation: Invitation, rank: int, store: Store | None = None) -> asyncio.Future[None]:
        """Meet the other end; the sender brings the `store`. The future raises PeerLost, as all of them do."""
        return self.do(lambda: self._meet(invitation, rank, store))

    def send(self, packed: Tensor) -> asyncio.Future[Tensor]:
        """Send uint8 [n]; done when it may change."""
        return self.do(lambda: self._exchange(packed, SENDER))

    def receive(self, empty: Callable[[], Tensor]) -> asyncio.Future[Tensor]:
        """Fill what `empty` returns, uint8, with what was sent."""
        return self.do(lambda: self._exchange(empty(), RECEIVER))

    def do(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Run `work` on the thread, behind what it was asked for before."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if self._closed:
            future.set_exception(PeerLost("the process group is closed"))
            return future

        def run() -> None:
            try:
                settle = partial(_settle, future, work())
            except TransferError as error:
                settle = partial(_fail, future, error)
            except Exception as error:
                settle = partial(_fail, future, PeerLost(f"torch.distributed: {error}"))
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle)

        self._work.put(run)
        return future

    def close(self) -> None:
        """Nothing more is taken on; what was asked for before is still done."""
        self._closed = True
        self._work.put(None)

    def _meet(self, invitation: Invitation, rank: int, store: Store | None) -> None:
        if store is None:
            store = TCPStore(invitation.host, invitation.port, 2, False, self._patience, wait_for_workers=False)
        if invitation.backend == "nccl":
            from torch._C._distributed_c10d import ProcessGroupNCCL  # not there in torch for the CPU

            self._group = cast(Group, ProcessGroupNCCL(store, rank, 2, ProcessGroupNCCL.Options()))
            return
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = self._patience
        options._devices = [ProcessGroupGloo.create_device(hostname=_own_address(invitation))]
        self._group = cast(Group, ProcessGroupGloo(store, rank, 2, options))

    def _exchange(self, tensor: Tensor, rank: int) -> Tensor:
        if self._group is None:
            raise PeerLost("the other end was never met")
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            work = self._group.send([tensor], RECEIVER, 0) if rank == SENDER else self._group.recv([tensor], SENDER, 0)
            work.wait(self._patience)
            if tensor.is_cuda:  # until here only the stream waits
                torch.cuda.current_stream().synchronize()
        return tensor

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
        self._group = None


def _end(work: SimpleQueue[Callable[[], None] | None], thread: Thread) -> None:
    """Before the interpreter ends: a group that is taken down while it does ends the process with an abort."""
    work.put(None)
    if thread is not current_thread():  # the lane's last holder may be its own thread
        thread.join(EXIT_PATIENCE)


def _settle(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _own_address(invitation: Invitation) -> str:
    """The address of this host from which the other end is reached. Nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(invitation.host, invitation.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        own: str = probe.getsockname()[0]
    return own


def open_store(host: str, patience: float) -> TCPStore:
    """A store for one meeting, on a free port of `host`."""
    return TCPStore(host, 0, 2, True, timedelta(seconds=patience), wait_for_workers=False)
