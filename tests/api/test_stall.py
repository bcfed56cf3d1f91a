"""The stall guard: it ends writes that nobody reads, and leaves everything else alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import grpc
import pytest
from baton.api import grpc_server
from baton.api.grpc_server import InferenceFace, ServerInfo
from baton.api.model_info import load_model_info
from baton.api.stall import StallGuard
from baton.core.clock import MonotonicClock
from baton.core.slo import Slo
from baton.core.view import Role
from baton.deploy.router_process import make_lifecycle
from baton.observability.metrics import Metrics
from baton.proto import inference_pb2 as pb
from baton.router.readiness import Readiness
from baton.router.roster import ControllerLink
from baton.router.service import RouterService, ServiceOptions
from baton.tests.router.fake_cluster import running_cluster
from baton.tests.router.router_process import MODEL, router_config, tokenizer

LIMIT = 0.01


async def write(write: Awaitable[object], limit: float = LIMIT) -> None:
    """One guarded write."""
    async with StallGuard(limit) as guard:
        guard.begin()
        await write
        guard.end()


async def test_write_that_never_ends_is_a_timeout() -> None:
    with pytest.raises(TimeoutError, match=r"nothing was read for 0\.01 s"):
        await write(asyncio.Event().wait())
    await asyncio.sleep(0)  # the task is not cancelled any more


async def test_waiting_between_writes_may_take_any_time() -> None:
    looked = asyncio.Event()
    asyncio.get_running_loop().call_later(5 * LIMIT, looked.set)
    async with StallGuard(LIMIT) as guard:
        guard.begin()
        guard.end()
        await looked.wait()


async def test_many_short_writes_are_no_long_one() -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + 5 * LIMIT
    async with StallGuard(LIMIT) as guard:
        while loop.time() < end:
            guard.begin()
            await asyncio.sleep(0)
            guard.end()


async def test_cancellation_from_outside_stays_one() -> None:
    entered = asyncio.Event()

    async def never() -> None:
        entered.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(write(never(), 60.0))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_errors_of_a_write_pass_through() -> None:
    async def broken() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await write(broken(), 60.0)


class Unread:
    """The context of a call whose client reads nothing."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None

    def time_remaining(self) -> None:
        return None

    async def write(self, message: pb.GenerateResponse) -> None:
        await asyncio.Event().wait()

    async def abort(self, code: grpc.StatusCode, details: str, metadata: object) -> None:
        self.code = code


async def test_grpc_client_that_reads_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "STALL_TIMEOUT", LIMIT)
    async with running_cluster(Role.MIXED) as cluster:
        config, context = router_config(cluster), Unread()
        link = ControllerLink(cluster.controller.address, "r0")
        service = RouterService(ServiceOptions("r0", 1), make_lifecycle(config.topology), MonotonicClock(), link, Metrics())
        service.start()
        while not any(member.live for member in service.membership.members):
            await service.changed.wait()
            service.changed.clear()
        readiness = Readiness(service, (1,), lambda _: None)
        info = ServerInfo("0", "test", "r0", Slo())
        face = InferenceFace(service, readiness, load_model_info(config.topology.model, MODEL), tokenizer(), info)
        request = pb.GenerateRequest(text="a", sampling=pb.Sampling(max_tokens=3))
        await face.Generate(request, context)  # type: ignore[arg-type]
        assert context.code is grpc.StatusCode.CANCELLED
        await service.idle()
        await service.close(0.0)
