"""The controller with fake members: real processes, real sockets."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

import pytest
from baton.deploy.process import is_alive, start_ticks
from baton.deploy.supervisor import Backoff
from baton.proto import worker_pb2 as pb

pytestmark = pytest.mark.cluster


def _worker(roster: pb.Roster, member_id: str) -> pb.Registration:
    return next(w for w in roster.workers if w.worker.worker_id == member_id)


async def test_members_start_and_register(make_controller):
    cluster = await make_controller("prefill-0", "decode-0", "router-0")
    roster = await cluster.until_ready("prefill-0", "decode-0")
    assert {(w.worker.worker_id, w.role) for w in roster.workers} == {("prefill-0", "prefill"), ("decode-0", "decode")}
    router = await cluster.until_state("router-0", "ready")
    assert router.registration.http_address
    assert [w.worker.worker_id for w in cluster.controller.roster().workers] == ["prefill-0", "decode-0"]  # never the router


async def test_a_killed_member_is_reported_dead_and_restarted(make_controller):
    cluster = await make_controller("decode-0")
    first = _worker(await cluster.until_ready("decode-0"), "decode-0")
    os.kill(first.pid, signal.SIGKILL)
    gone = await cluster.until(lambda roster: first.worker in roster.dead)
    assert all(w.worker != first.worker for w in gone.workers)
    second = _worker(await cluster.until_ready("decode-0"), "decode-0")
    assert second.pid != first.pid
    assert second.worker.epoch != first.worker.epoch
    member = await cluster.member("decode-0")
    assert (member.state, member.restarts, member.last_error) == ("ready", 1, "")


async def test_watch_sends_the_whole_roster_at_every_change(make_controller):
    cluster = await make_controller("prefill-0", "decode-0")
    roster = await cluster.until_ready("prefill-0", "decode-0")
    victim = _worker(roster, "prefill-0")
    call = cluster.stub.Watch(pb.WatchRequest())
    assert {w.worker.worker_id for w in (await call.read()).workers} == {"prefill-0", "decode-0"}
    os.kill(victim.pid, signal.SIGKILL)
    without = await call.read()
    assert [w.worker.worker_id for w in without.workers] == ["decode-0"]
    assert list(without.dead) == [victim.worker]
    again = await call.read()
    assert {w.worker.worker_id for w in again.workers} == {"prefill-0", "decode-0"}
    call.cancel()


async def test_kill_answers_when_a_stopped_process_is_certainly_dead(make_controller):
    cluster = await make_controller("decode-0")
    first = _worker(await cluster.until_ready("decode-0"), "decode-0")
    os.kill(first.pid, signal.SIGSTOP)
    reply = await cluster.stub.Kill(pb.KillRequest(worker=first.worker, reason="hangs"), timeout=10)
    assert reply.dead
    with pytest.raises(ProcessLookupError):
        start_ticks(first.pid)
    roster = await cluster.until(lambda r: first.worker in r.dead and len(r.workers) == 1)
    second = _worker(roster, "decode-0")
    assert second.pid != first.pid
    # Asked again about the life that is over, the answer is the same and the new life goes on.
    assert (await cluster.stub.Kill(pb.KillRequest(worker=first.worker, reason="again"), timeout=10)).dead
    assert (await cluster.member("decode-0")).registration.pid == second.pid


async def test_kill_of_an_unknown_member_confirms_nothing(make_controller):
    cluster = await make_controller("decode-0")
    reply = await cluster.stub.Kill(pb.KillRequest(worker=pb.WorkerId(worker_id="decode-9", epoch=1), reason=""), timeout=10)
    assert not reply.dead


async def _register(cluster, registration: pb.Registration) -> pb.Registered:
    call = cluster.stub.Register(registration)
    reply = await call.read()
    call.cancel()
    return reply


async def test_registrations_of_other_lives_are_refused(make_controller):
    cluster = await make_controller("decode-0")
    first = _worker(await cluster.until_ready("decode-0"), "decode-0")
    os.kill(first.pid, signal.SIGKILL)
    roster = await cluster.until(lambda r: first.worker in r.dead and len(r.workers) == 1)
    second = _worker(roster, "decode-0")

    old = await _register(cluster, first)
    assert not old.accepted
    assert "is over" in old.reason

    other = pb.Registration()
    other.CopyFrom(second)
    other.worker.epoch, other.pid = 99, 1
    stranger = await _register(cluster, other)
    assert not stranger.accepted
    assert f"is process {second.pid} now, not 1" in stranger.reason

    other.pid = second.pid
    twice = await _register(cluster, other)
    assert not twice.accepted
    assert "a process has one epoch" in twice.reason

    other.worker.worker_id = "decode-7"
    unknown = await _register(cluster, other)
    assert not unknown.accepted
    assert "no member 'decode-7'" in unknown.reason
    assert _worker(cluster.controller.roster(), "decode-0") == second


async def test_a_lost_stream_is_not_a_death(make_controller):
    cluster = await make_controller("decode-0")
    worker = _worker(await cluster.until_ready("decode-0"), "decode-0")
    assert (await _register(cluster, worker)).accepted  # and its stream is cut at once
    assert (await _register(cluster, worker)).accepted
    assert list(cluster.controller.roster().workers) == [worker]
    assert not cluster.controller.roster().dead


async def test_a_member_that_cannot_start_fails_with_its_log(make_controller):
    cluster = await make_controller("decode-0", fake="exit")
    member = await cluster.until_state("decode-0", "failed")
    assert member.restarts == 2
    assert "ended with exit status 7" in member.last_error
    assert "a fake member that will not start" in member.last_error


def test_pauses_double_up_to_the_longest():
    backoff = Backoff()
    assert [backoff.pause(n) for n in (1, 2, 3, 4)] == [0.2, 0.4, 0.8, 1.6]
    assert backoff.pause(7) == 10.0
    assert backoff.pause(5000) == 10.0


async def test_a_router_that_restarts_keeps_its_port(make_controller, monkeypatch):
    pinned = []
    monkeypatch.setattr(
        "baton.deploy.controller.pin_router_ports", lambda config, grpc, http: pinned.append(grpc) or _pin(config, grpc)
    )
    cluster = await make_controller("router-0")
    first = (await cluster.until_state("router-0", "ready")).registration
    os.kill(first.pid, signal.SIGKILL)
    while (await cluster.member("router-0")).restarts == 0:
        await asyncio.sleep(0.02)
    second = (await cluster.until_state("router-0", "ready")).registration
    assert second.pid != first.pid
    assert second.address == first.address
    assert pinned == [first.address, first.address]


def _pin(config: str, grpc: str) -> str:
    """The fake's configuration is not a whole RouterConfig; see test_members for the real one."""
    return config.replace('"127.0.0.1:0"', f'"{grpc}"')


@pytest.mark.parametrize("fake", ["serve", "deaf"])
async def test_shutdown_leaves_no_process(make_controller, monkeypatch, fake):
    monkeypatch.setattr("baton.deploy.controller.STOP_PATIENCE", 0.3)
    cluster = await make_controller("prefill-0", "decode-0", fake=fake)
    roster = await cluster.until_ready("prefill-0", "decode-0")
    pids = {w.pid: start_ticks(w.pid) for w in roster.workers}
    await cluster.stub.Shutdown(pb.ShutdownRequest(), timeout=10)
    assert not any(is_alive(pid, started) for pid, started in pids.items())
    assert {m.state for m in cluster.controller.state().members} == {"stopped"}
    with suppress(Exception):
        assert not (await _register(cluster, roster.workers[0])).accepted
