"""Two routers on one event loop, on the same ports, in front of one fake cluster."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import grpc
import httpx
import pytest
from baton.core.errors import TopologyError
from baton.core.topology import RouterSpec
from baton.core.view import Role
from baton.deploy.ports import shared_router_ports
from baton.deploy.router_process import serve_router
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as rpc
from baton.proto import worker_pb2
from baton.tests.router.fake_cluster import FakeCluster, running_cluster
from baton.tests.router.router_process import router_config, until_health
from grpc_health.v1 import health_pb2

NAMES = ("router-0", "router-1")


@dataclass
class Pair:
    """Both routers as they registered, by name; `worker` is all they have to serve with."""

    cluster: FakeCluster
    routers: dict[str, worker_pb2.Registration]

    @contextlib.asynccontextmanager
    async def stub(self, address: str) -> AsyncIterator[rpc.InferenceStub]:
        """Over a connection of its own."""
        async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            yield rpc.InferenceStub(channel)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with running_cluster(Role.MIXED) as cluster, contextlib.AsyncExitStack() as stack:
        config = router_config(cluster, RouterSpec(replicas=2))
        topology = stack.enter_context(shared_router_ports(config.topology))
        tasks = [asyncio.create_task(serve_router(replace(config, router_id=name, topology=topology))) for name in NAMES]
        try:
            while len(cluster.controller.registered) < 2:
                cluster.controller.registration.clear()
                await cluster.controller.registration.wait()
            routers = {router.worker.worker_id: router for router in cluster.controller.registered}
            for router in routers.values():
                await until_health(router.address, health_pb2.HealthCheckResponse.SERVING)
            yield Pair(cluster, routers)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_both_answer_at_the_shared_address_and_each_at_its_own(pair: Pair) -> None:
    one, two = (pair.routers[name] for name in NAMES)
    assert (one.shared_address, one.shared_http_address) == (two.shared_address, two.shared_http_address)
    assert len({one.address, two.address, one.http_address, two.http_address, one.shared_address, one.shared_http_address}) == 6
    met = set()
    async with asyncio.timeout(30):
        while len(met) < 2:
            async with pair.stub(one.shared_address) as stub:
                met.add((await stub.GetServerInfo(pb.GetServerInfoRequest())).router_id)
    for name, router in pair.routers.items():
        async with pair.stub(router.address) as stub:
            assert (await stub.GetServerInfo(pb.GetServerInfoRequest())).router_id == name


async def test_prometheus_is_sent_to_each_router(pair: Pair) -> None:
    one = pair.routers["router-0"]
    async with httpx.AsyncClient() as http:
        answer = await http.get(f"http://{one.shared_http_address}/metrics/targets")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == [{"targets": [pair.routers[name].http_address], "labels": {"router": name}} for name in NAMES]
        async with pair.stub(one.address) as stub:
            request = pb.GenerateRequest(text="a", sampling=pb.Sampling(max_tokens=2))
            async for _ in stub.Generate(request):
                pass
        counted = [(await http.get(f"http://{router.http_address}/metrics")).text for router in pair.routers.values()]
        assert ['baton_requests_total{outcome="ok"} 1.0' in text for text in counted] == [
            name == "router-0" for name in pair.routers
        ]


@pytest.mark.parametrize("name", ["", "mine"])
async def test_a_request_is_ended_through_the_other_router(pair: Pair, name: str) -> None:
    one, two = (pair.routers[each] for each in NAMES)
    worker = pair.cluster.workers["m0"]
    async with pair.stub(one.address) as owner, pair.stub(two.address) as other:
        call = owner.Generate(pb.GenerateRequest(text="a", request_id=name, sampling=pb.Sampling(max_tokens=500)))
        request_id = (await call.read()).request_id
        worker.open.clear()  # nothing more comes
        assert request_id == name or request_id.startswith("router-0-")
        assert not (await other.Abort(pb.AbortRequest(request_id=request_id, only_here=True))).found
        assert (await other.Abort(pb.AbortRequest(request_id=request_id))).found
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await _read_all(call)
        assert ended.value.code() == grpc.StatusCode.CANCELLED
        await worker.until_received("abort")
        for gone in (request_id, "nobodys", "router-9-1-1"):
            assert not (await other.Abort(pb.AbortRequest(request_id=gone))).found


async def test_several_routers_need_a_port_that_is_given() -> None:
    async with running_cluster(Role.MIXED) as cluster:
        with pytest.raises(TopologyError, match=r"router\.grpc.*several routers need a given one"):
            await serve_router(router_config(cluster, RouterSpec(replicas=2)))


async def _read_all(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
