"""What the tests of `deploy` share: fake members, and a controller over real sockets and processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from baton.deploy.controller import Controller
from baton.deploy.controller_server import serving
from baton.deploy.launcher import MemberSpec
from baton.deploy.ports import free_port
from baton.deploy.subprocess_launcher import SubprocessLauncher
from baton.deploy.supervisor import Backoff
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as rpc

QUICK = Backoff(first=0.01, longest=0.05, max_attempts=3)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """State goes to a folder of the test; members can import `fake_member`."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def fake_spec(tmp_path: Path, member_id: str, controller: str, fake: str = "serve") -> MemberSpec:
    """The spec of a fake worker; its role is the first part of its id."""
    role = member_id.partition("-")[0]
    config = {"worker_id": member_id, "pool": {"role": role}, "controller": controller, "fake": fake}
    if role == "router":
        config = {"router_id": member_id, "topology": {"router": {"grpc": "127.0.0.1:0"}}, "controller": controller}
    return MemberSpec(member_id, "test", role, "fake_member", json.dumps(config), str(tmp_path / f"{member_id}.log"))


class Fixture:
    """A controller with fake members, and a client of it."""

    def __init__(self, controller: Controller, address: str, stub: rpc.ControllerStub) -> None:
        self.controller = controller
        self.address = address
        self.stub = stub

    async def member(self, member_id: str) -> pb.Member:
        state = await self.stub.GetCluster(pb.GetClusterRequest())
        return next(m for m in state.members if m.registration.worker.worker_id == member_id)

    async def until(self, wanted: Callable[[pb.Roster], bool]) -> pb.Roster:
        """The first roster that is as wanted."""
        call = self.stub.Watch(pb.WatchRequest(router_id="test"))
        async with asyncio.timeout(30):
            async for roster in call:
                if wanted(roster):
                    call.cancel()
                    return roster
        raise AssertionError("the roster stream ended")

    async def until_ready(self, *member_ids: str) -> pb.Roster:
        return await self.until(lambda roster: {w.worker.worker_id for w in roster.workers} >= set(member_ids))

    async def until_state(self, member_id: str, state: str) -> pb.Member:
        """Rosters hold only registered workers, so other states are looked at."""
        async with asyncio.timeout(30):
            while (member := await self.member(member_id)).state != state:
                await asyncio.sleep(0.02)
        return member


@pytest.fixture
async def make_controller(tmp_path: Path) -> AsyncIterator[Callable[..., object]]:
    """Starts a controller with the named fake members; all of it ends with the test."""
    async with AsyncExitStack() as stack:

        async def make(*member_ids: str, fake: str = "serve", backoff: Backoff = QUICK) -> Fixture:
            address = f"127.0.0.1:{free_port('127.0.0.1')}"
            specs = [fake_spec(tmp_path, member_id, address, fake) for member_id in member_ids]
            launcher = SubprocessLauncher(tmp_path / "members.json")
            stack.push_async_callback(launcher.close)
            controller = Controller("test", specs, launcher, backoff)
            await stack.enter_async_context(serving(controller, address))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            return Fixture(controller, address, rpc.ControllerStub(channel))

        yield make
