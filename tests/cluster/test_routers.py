"""Two routers on one port, with real processes: both serve, either ends the other's requests, one alone carries on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import psutil
import pytest
import pytest_asyncio
from baton.client.client import AsyncClient
from baton.core.errors import Cancelled, Unavailable
from baton.deploy.ports import why_taken
from baton.deploy.schema import split_host_port
from baton.proto import worker_pb2
from baton.tests.cluster.live_cluster import PROMPT, LiveCluster, at_rest, live, topology

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

NAMES = ("router-0", "router-1")
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveCluster]:
    """Running for all of these tests; when it has ended, nothing of it may be left."""
    async with live(topology("routers", replicas=2), tmp_path_factory.mktemp("logs")) as cluster:
        yield cluster
        await cluster.ready()
        pids = [member.registration.pid for member in (await cluster.status()).members]
    assert len(pids) == 4
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert [why_taken(*split_host_port(address)) for address in (cluster.grpc, cluster.http)] == ["", ""]


async def routers(cluster: LiveCluster) -> dict[str, worker_pb2.Registration]:
    members = [member.registration for member in (await cluster.status()).members]
    return {member.worker.worker_id: member for member in members if member.role == "router"}


@contextlib.asynccontextmanager
async def connected(cluster: LiveCluster, *wanted: str) -> AsyncIterator[list[AsyncClient]]:
    """Clients of these routers, all at the shared address: the kernel chooses, so connect until each was met."""
    async with contextlib.AsyncExitStack() as stack:
        met: dict[str, AsyncClient] = {}
        async with asyncio.timeout(30):
            while not met.keys() >= set(wanted):
                client = await stack.enter_async_context(AsyncClient(cluster.grpc))
                met[(await client.server_info()).router_id] = client
        yield [met[name] for name in wanted]


async def text_of(client: AsyncClient, max_tokens: int = 30) -> str:
    (completion,) = await client.generate(PROMPT, max_tokens=max_tokens, **GREEDY)
    assert completion.usage.completion_tokens == max_tokens
    return completion.text


async def begin(client: AsyncClient, **options: object) -> tuple[str, asyncio.Task[list[int]]]:
    """A long request that has given its first tokens: its id, and what reads the rest."""
    began: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def read() -> list[int]:
        tokens: list[int] = []
        async for chunk in client.stream(PROMPT, **{"max_tokens": 100, **options}, **GREEDY):
            tokens += chunk.token_ids
            if not began.done():
                began.set_result(chunk.request_id)
        return tokens

    task = asyncio.create_task(read())
    await asyncio.wait((began, task), return_when=asyncio.FIRST_COMPLETED)
    return began.result(), task


async def at_rest_everywhere(cluster: LiveCluster) -> None:
    """Blocks and tickets are back, and no router has anything placed."""
    async with asyncio.timeout(10):
        for router in (await routers(cluster)).values():
            async with AsyncClient(router.address) as client:
                while not (load := await client.load()).workers or load.active_requests:
                    await asyncio.sleep(0.05)
    await cluster.until_load(lambda load: len(load) == 2 and all(at_rest(worker) for worker in load.values()), 10.0)


async def test_both_serve_at_once_and_with_the_same_text(cluster: LiveCluster) -> None:
    async with connected(cluster, *NAMES) as clients:
        texts = await asyncio.gather(*(text_of(client) for client in clients * 6))
    assert len(set(texts)) == 1
    await at_rest_everywhere(cluster)


async def test_each_is_seen_by_itself_and_the_cluster_as_one(cluster: LiveCluster) -> None:
    status, known = await cluster.status(), await routers(cluster)
    assert sorted(known) == list(NAMES)
    assert (status.grpc, status.http) == (cluster.grpc, cluster.http)
    assert {(router.shared_address, router.shared_http_address) for router in known.values()} == {(cluster.grpc, cluster.http)}
    assert len({router.address for router in known.values()} | {cluster.grpc}) == 3
    async with httpx.AsyncClient() as http:
        targets = (await http.get(f"http://{cluster.http}/metrics/targets")).json()
        assert {target["labels"]["router"]: target["targets"] for target in targets} == {
            name: [router.http_address] for name, router in known.items()
        }
        for target in targets:
            assert "baton_ready 1.0" in (await http.get(f"http://{target['targets'][0]}/metrics")).text


async def test_an_abort_is_forwarded_to_the_router_that_has_the_request(cluster: LiveCluster) -> None:
    async with connected(cluster, *NAMES) as (one, two):
        request_id, task = await begin(one, max_tokens=400)
        assert request_id.startswith("router-0-")
        assert await two.abort(request_id)
        with pytest.raises(Cancelled):
            await task
        assert not await two.abort(request_id)
        _, task = await begin(two, max_tokens=400, request_id="mine")  # the name tells nothing: everybody is asked
        assert await one.abort("mine")
        with pytest.raises(Cancelled):
            await task
        assert not await one.abort("nobodys")
    await at_rest_everywhere(cluster)


async def test_one_router_is_killed_and_the_other_serves_on(cluster: LiveCluster) -> None:
    async with connected(cluster, *NAMES) as (one, two):
        _, undisturbed = await begin(two)
        expected = await undisturbed
        lost_id, lost = await begin(one, max_tokens=400)
        kept_id, kept = await begin(two)
        assert kept_id.startswith("router-1-")
        await cluster.strike("router-0")
        with pytest.raises(Unavailable):
            await lost
        assert not await two.abort(lost_id)  # as unknown as any
        async with asyncio.timeout(5):
            while not (status := await cluster.status()).waiting_for:
                await asyncio.sleep(0.01)
        assert status.waiting_for.startswith("router-0")
        assert (status.grpc, status.http) == (cluster.grpc, cluster.http)
        async with AsyncClient(cluster.grpc) as newcomer:  # whoever is there: it is served
            assert await text_of(newcomer)
        assert await kept == expected
    await cluster.ready()
    assert (await cluster.status()).http == cluster.http
    async with connected(cluster, *NAMES) as clients:
        assert len({await text_of(client) for client in clients}) == 1
    await at_rest_everywhere(cluster)
