"""A whole router (`deploy.router_process.serve_router`) on the test's event loop, in front of a fake cluster."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
from baton.api.tokenizer import TextTokenizer
from baton.core.topology import ModelSpec, PoolSpec, RouterConfig, RouterSpec, Topology
from baton.core.view import Role
from baton.deploy.router_process import serve_router
from baton.tests.router.fake_cluster import FakeCluster, TokenAt, running_cluster
from grpc_health.v1 import health_pb2, health_pb2_grpc

MODEL = Path(__file__).resolve().parents[2] / "examples" / "model" / "pydoc-llama"
EOS = 1


@dataclass(frozen=True)
class Router:
    """Addresses of a running router, and the cluster behind it."""

    cluster: FakeCluster
    grpc: str
    http: str
    task: asyncio.Task[None]

    @property
    def url(self) -> str:
        return f"http://{self.http}"


def router_config(cluster: FakeCluster, router: RouterSpec = RouterSpec(), **topology: object) -> RouterConfig:
    spec = replace(router, grpc="127.0.0.1:0", http="127.0.0.1:0", seed=1)
    pools = (PoolSpec(Role.PREFILL), PoolSpec(Role.DECODE))
    whole = Topology("test", ModelSpec(str(MODEL), name="pydoc"), pools, router=spec, **topology)
    return RouterConfig("r0", whole, cluster.controller.address)


def saying(text: str) -> TokenAt:
    """Tokens of a model that always says `text` and then stops."""
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return lambda prompt, index: tokens[index] if index < len(tokens) else EOS


@contextlib.asynccontextmanager
async def running_router(
    *roles: Role, text: str = "", wait_ready: bool = True, router: RouterSpec = RouterSpec()
) -> AsyncIterator[Router]:
    """A router over fake workers of these roles, whose model says `text`."""
    roles = roles or (Role.PREFILL, Role.DECODE)
    async with running_cluster(*roles, **({"token_at": saying(text)} if text else {})) as cluster:
        for worker in cluster.workers.values():
            worker.total_blocks = 1000
        task = asyncio.create_task(serve_router(router_config(cluster, router)))
        try:
            registered = asyncio.create_task(cluster.controller.registration.wait())
            await asyncio.wait((task, registered), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            registration = cluster.controller.registered[0]
            if wait_ready:
                await until_health(registration.address, health_pb2.HealthCheckResponse.SERVING)
            yield Router(cluster, registration.address, registration.http_address, task)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until_health(address: str, status: int) -> None:
    """Wait until grpc.health.v1 says so."""
    async with grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="baton.v1.Inference"))
        async for answer in watch:
            if answer.status == status:
                break
        watch.cancel()


def tokenizer() -> TextTokenizer:
    return TextTokenizer.load(MODEL)
