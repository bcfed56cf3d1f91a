"""The controller and its members as actors of a real Ray. One Ray for the whole file: starting one takes seconds."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from pathlib import Path

import grpc
import pytest
from baton.core.errors import Unavailable
from baton.core.topology import ModelSpec, PoolSpec, RouterSpec, Topology
from baton.core.view import Role
from baton.deploy import members
from baton.deploy.cluster import RunningCluster
from baton.deploy.process import WatchedProcess, is_alive, start_ticks
from baton.deploy.settings import prepare_ray_environment
from baton.deploy.supervisor import Backoff
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as rpc

pytest.importorskip("ray")
pytestmark = pytest.mark.cluster

TOPOLOGY = Topology(
    "raytest",
    ModelSpec("/models/m"),
    (PoolSpec(Role.DECODE), PoolSpec(Role.PREFILL)),
    router=RouterSpec(grpc="127.0.0.1:0", http="127.0.0.1:0"),
)


async def _roster(stub: rpc.ControllerStub, wanted) -> pb.Roster:
    """The first roster that is as wanted; dials again when the controller dies meanwhile."""
    async with asyncio.timeout(30):
        while True:
            try:
                async for roster in stub.Watch(pb.WatchRequest(), wait_for_ready=True):
                    if wanted(roster):
                        return roster
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)


def _all_ready(roster: pb.Roster) -> bool:
    return {w.worker.worker_id for w in roster.workers} == {"decode-0", "prefill-0"}


def _worker(roster: pb.Roster, member_id: str) -> pb.Registration:
    return next(w for w in roster.workers if w.worker.worker_id == member_id)


def _kill_and_wait(pid: int) -> None:
    process = WatchedProcess(pid)
    process.signal(signal.SIGKILL)
    assert process.wait(10)
    process.close()


async def test_a_cluster_on_ray_survives_its_controller_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for role in (Role.PREFILL, Role.DECODE):
        monkeypatch.setitem(members.ENTRY_POINTS, role, "fake_member")
    monkeypatch.setattr(members, "ROUTER_ENTRY_POINT", "fake_member")
    prepare_ray_environment()
    from baton.deploy import ray_host

    folders: list[str] = []
    make_folder = tempfile.mkdtemp
    monkeypatch.setattr(ray_host.tempfile, "mkdtemp", lambda **options: folders.append(make_folder(**options)) or folders[-1])
    pids: dict[int, int] = {}  # of everything that was ever started, with the time of its start

    async with ray_host.local_ray_cluster(TOPOLOGY, tmp_path, Backoff(first=0.01)) as address:
        import ray

        cluster = RunningCluster("raytest", address, tmp_path)
        assert (await cluster.wait_ready()).http

        async with grpc.aio.insecure_channel(address) as channel:
            stub = rpc.ControllerStub(channel)
            before = await _roster(stub, _all_ready)
            pids |= {w.pid: start_ticks(w.pid) for w in before.workers}

            await _other_clusters_on_the_same_ray(tmp_path, monkeypatch)

            # The controller dies: Ray starts it again on its port, and it finds its members alive.
            controller = ray.get_actor("raytest/controller", namespace="baton")
            first = await controller.pid.remote()
            pids[first] = start_ticks(first)
            _kill_and_wait(first)
            after = await _roster(stub, _all_ready)
            assert {(w.worker.worker_id, w.pid, w.worker.epoch) for w in after.workers} == {
                (w.worker.worker_id, w.pid, w.worker.epoch) for w in before.workers
            }
            second = await controller.pid.remote()
            pids[second] = start_ticks(second)
            assert second != first

            # A member that hangs is killed through the controller that did not start it; the death is certain.
            victim = _worker(after, "decode-0")
            os.kill(victim.pid, signal.SIGSTOP)
            reply = await stub.Kill(pb.KillRequest(worker=victim.worker, reason="hangs"), timeout=20)
            assert reply.dead
            assert not is_alive(victim.pid, pids[victim.pid])
            again = await _roster(stub, lambda r: _all_ready(r) and victim.worker in r.dead)
            assert _worker(again, "decode-0").pid != victim.pid
            assert _worker(again, "prefill-0") == _worker(before, "prefill-0")

            # One that dies by itself is restarted as well.
            victim = _worker(again, "prefill-0")
            _kill_and_wait(victim.pid)
            last = await _roster(stub, lambda r: _all_ready(r) and victim.worker in r.dead)
            pids |= {w.pid: start_ticks(w.pid) for w in last.workers}

    assert not ray.is_initialized()
    assert not [pid for pid, started in pids.items() if is_alive(pid, started)]
    assert [folder for folder in folders if os.path.exists(folder)] == []
    assert "is ready at" in (tmp_path / "controller.log").read_text()


async def _other_clusters_on_the_same_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the same name, one that does not fit, and one that comes and goes; none of them disturbs the first."""
    from baton.deploy import ray_host
    from ray.util import list_named_actors

    others = {entry["name"] for entry in list_named_actors(all_namespaces=True)}
    with pytest.raises(Unavailable, match="cluster raytest is already running"):
        await ray_host.start_on_ray(TOPOLOGY, tmp_path, Backoff(), "127.0.0.1")

    monkeypatch.setattr("baton.deploy.ray_launcher.PLACE_PATIENCE", 0.5)
    big = Topology("big", ModelSpec("/m"), (PoolSpec(Role.DECODE, threads=64),))
    with pytest.raises(Unavailable, match=r"cannot place 1 workers \(pack\): they need .*64.*, free in the Ray cluster"):
        await ray_host.start_on_ray(big, tmp_path, Backoff(), "127.0.0.1")
    monkeypatch.setattr("baton.deploy.ray_launcher.PLACE_PATIENCE", 30.0)

    empty = Topology("second", ModelSpec("/m"), (), router=RouterSpec("127.0.0.1:0", "127.0.0.1:0"))
    address, pid = await ray_host.start_on_ray(empty, tmp_path, Backoff(), "127.0.0.1")
    started = start_ticks(pid)
    assert (await RunningCluster("second", address, tmp_path).wait_ready()).grpc
    await ray_host.stop_on_ray("second", address)
    await ray_host.wait_gone(pid)
    assert not is_alive(pid, started)
    assert {entry["name"] for entry in list_named_actors(all_namespaces=True)} == others


def test_folders_of_dead_processes_are_swept(tmp_path: Path) -> None:
    from baton.deploy.ray_host import ray_folder

    (tmp_path / "baton-ray-dead").mkdir()
    (tmp_path / "baton-ray-dead" / "in-use").touch()
    (tmp_path / "baton-ray-unknown").mkdir()  # nothing says whose it is
    with ray_folder(tmp_path) as first:
        with ray_folder(tmp_path) as second:  # the first is in use, though not by another process
            assert sorted(map(str, tmp_path.iterdir())) == sorted([first, second, str(tmp_path / "baton-ray-unknown")])
        assert not Path(second).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["baton-ray-unknown"]
