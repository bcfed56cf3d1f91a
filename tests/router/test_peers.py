"""Peers over real gRPC: who is asked to end whose request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from baton.core.request import WorkerRef
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as rpc
from baton.proto import worker_pb2
from baton.router import peers as peers_module
from baton.router.peers import Peers, id_prefix

OWN = WorkerRef("router-0", 0xA)


class FakeRouter(rpc.InferenceServicer):
    """Has the requests it is told it has; remembers what it was asked."""

    def __init__(self, name: str, epoch: int, *has: str) -> None:
        self.ref = WorkerRef(name, epoch)
        self.has = set(has)
        self.asked: list[str] = []
        self.address = ""
        self.answering = asyncio.Event()
        self.answering.set()

    async def Abort(self, request: pb.AbortRequest, context: object) -> pb.AbortResponse:  # noqa: N802
        assert request.only_here  # or two routers would send a question to and fro
        self.asked.append(request.request_id)
        await self.answering.wait()
        return pb.AbortResponse(found=request.request_id in self.has)

    def registration(self) -> worker_pb2.Registration:
        worker = worker_pb2.WorkerId(worker_id=self.ref.worker_id, epoch=self.ref.epoch)
        return worker_pb2.Registration(worker=worker, role="router", address=self.address)


@asynccontextmanager
async def serving(*routers: FakeRouter) -> AsyncIterator[Peers]:
    """The peers of OWN; all of these routers are on its roster, and itself."""
    servers = []
    for router in routers:
        server = grpc.aio.server()
        rpc.add_InferenceServicer_to_server(router, server)
        router.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        servers.append(server)
    peers = Peers(OWN)
    own = worker_pb2.Registration(worker=worker_pb2.WorkerId(worker_id=OWN.worker_id, epoch=OWN.epoch), role="router")
    peers.update([*(router.registration() for router in routers), own])
    try:
        yield peers
    finally:
        await peers.close()
        for server in servers:
            await server.stop(None)


async def test_the_router_that_gave_the_id_is_asked_and_nobody_else() -> None:
    mine = f"{id_prefix(WorkerRef('router-1', 0xB))}7"
    one, two = FakeRouter("router-1", 0xB, mine), FakeRouter("router-10", 0xC)
    async with serving(one, two) as peers:
        assert await peers.abort(mine)
        assert not await peers.abort("router-10-c-9")
        assert (one.asked, two.asked) == ([mine], ["router-10-c-9"])


async def test_a_name_that_a_client_chose_is_looked_for_everywhere() -> None:
    one, two = FakeRouter("router-1", 1), FakeRouter("router-2", 1, "mine")
    async with serving(one, two) as peers:
        assert await peers.abort("mine")
        assert not await peers.abort("nobodys")
        assert one.asked == two.asked == ["mine", "nobodys"]


async def test_a_request_of_a_dead_router_is_as_unknown_as_any() -> None:
    one, gone = FakeRouter("router-1", 1), FakeRouter("router-2", 1, "router-2-1-5")
    async with serving(one, gone) as peers:
        assert await peers.abort("router-2-1-5")
        peers.update([one.registration()])  # it has left the roster
        assert not await peers.abort("router-2-1-5")
        assert gone.asked == ["router-2-1-5"]
    async with serving() as alone:
        assert not await alone.abort("router-2-1-5")


async def test_a_peer_that_cannot_answer_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "PATIENCE", 0.2)
    nowhere, hung = FakeRouter("router-1", 1), FakeRouter("router-2", 1)
    async with serving(hung) as peers:
        nowhere.address = "127.0.0.1:1"
        peers.update([nowhere.registration(), hung.registration()])
        hung.answering.clear()
        assert not await peers.abort("router-1-1-1")
        assert not await peers.abort("router-2-1-1")


async def test_a_question_under_way_outlives_the_roster_that_named_the_peer() -> None:
    one = FakeRouter("router-1", 1, "router-1-1-1")
    async with serving(one) as peers:
        one.answering.clear()
        asked = asyncio.create_task(peers.abort("router-1-1-1"))
        while not one.asked:
            await asyncio.sleep(0)
        peers.update([])
        one.answering.set()
        assert await asked


async def test_all_routers_are_listed_by_name() -> None:
    async with serving(FakeRouter("router-2", 1), FakeRouter("router-1", 1)) as peers:
        assert [router.worker.worker_id for router in peers.routers] == ["router-0", "router-1", "router-2"]
