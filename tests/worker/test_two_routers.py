"""One worker, two routers: each hears of its own requests, and neither can starve or take down the other's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from baton.core.view import Role
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as rpc

Spec = Callable[..., pb.SequenceSpec]


async def told(link: Any, router_id: str) -> pb.Heartbeat:
    """What the worker tells this router of its load."""
    worker_epoch = link.registration.worker.epoch
    call = rpc.WorkerStub(link.channel).Heartbeats(pb.HeartbeatRequest(worker_epoch=worker_epoch, router_id=router_id))
    beat = await call.read()
    call.cancel()
    assert isinstance(beat, pb.Heartbeat)
    return beat


def others(beat: pb.Heartbeat) -> tuple[int, int, int]:
    return beat.others_assigned, beat.others_pending_tokens, beat.others_context_tokens


def first_step(link: Any, request_id: str) -> int:
    """The step that gave a request its first token."""
    return min(
        message.tokens.step
        for message in link.seen
        if message.WhichOneof("body") == "tokens"
        and any(sequence.attempt.request_id == request_id for sequence in message.tokens.sequences)
    )


async def test_each_router_is_told_of_the_others_share(rig: Any, make_spec: Spec) -> None:
    one = await rig.start(Role.DECODE, step_delay=0.02)
    two = await rig.connect(one.registration, "router-1")
    await one.send(submit=pb.Submit(sequence=make_spec("ours", 40, max_tokens=300)))
    await one.expect("tokens")
    spec, nobody = make_spec("theirs", 64), pb.WorkerId(worker_id="prefill-9", epoch=9)
    await two.send(reserve=pb.Reserve(sequence=spec, source=nobody))  # its KV never comes
    await two.expect("granted")
    assert others(await told(one, "router-0")) == (1, 0, 64)
    assert others(await told(one, "router-1")) == (1, 0, 40)
    await two.send(abort=pb.AbortAttempt(attempt=spec.attempt))
    await one.until(lambda beat: beat.tickets == 0)
    assert others(await told(one, "router-0")) == (0, 0, 0)


async def test_prompts_that_wait_are_told_until_they_are_prefilled(rig: Any, make_spec: Spec) -> None:
    one = await rig.start(Role.PREFILL, step_delay=0.05, max_step_tokens=16)
    two = await rig.connect(one.registration, "router-1")
    await two.send(submit=pb.Submit(sequence=make_spec("theirs", 100, max_tokens=1)))
    await one.until(lambda beat: beat.others_assigned == 1)
    assert others(await told(one, "router-0")) == (1, 100, 100)
    assert others(await told(one, "router-1")) == (0, 0, 0)
    await two.finished("theirs")
    assert others(await told(one, "router-0")) == (0, 0, 0)


async def test_requests_of_all_routers_wait_in_one_queue(rig: Any, make_spec: Spec) -> None:
    one = await rig.start(Role.DECODE, step_delay=0.02, max_step_tokens=16)
    two = await rig.connect(one.registration, "router-1")
    await one.send(submit=pb.Submit(sequence=make_spec("busy", 160, max_tokens=1)))
    await one.until(lambda beat: beat.num_running == 1)
    await one.send(submit=pb.Submit(sequence=make_spec("later", 40, max_tokens=1)))
    await one.until(lambda beat: beat.num_waiting == 1)
    older = make_spec("the older one", 40, max_tokens=1)
    older.age = 60.0  # it has waited at its router, or on another worker
    await two.send(submit=pb.Submit(sequence=older))
    await one.finished("later")
    await two.finished("the older one")
    assert first_step(two, "the older one") < first_step(one, "later")
    assert not two.tokens_of("later")
    assert not one.tokens_of("the older one")


async def test_a_lost_router_takes_only_its_own_attempts(rig: Any, make_spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.worker.host.ROUTER_GRACE", 0.3)
    one = await rig.start(Role.DECODE, step_delay=0.01)
    two = await rig.connect(one.registration, "router-1")
    await one.send(submit=pb.Submit(sequence=make_spec("lost", 20, max_tokens=300)))
    await two.send(submit=pb.Submit(sequence=make_spec("kept", 20, max_tokens=150)))
    await one.expect("tokens")
    one.call.cancel()
    await two.until(lambda beat: beat.num_running == 1)
    assert (await told(two, "router-1")).others_assigned == 0
    await two.finished("kept")
    assert len(two.tokens_of("kept")) == 150


async def test_leases_are_renewed_by_each_for_itself(rig: Any, make_spec: Spec) -> None:
    one = await rig.start(Role.DECODE, lease=1.0)
    two = await rig.connect(one.registration, "router-1")
    nobody = pb.WorkerId(worker_id="prefill-9", epoch=9)
    forgotten, renewed = make_spec("forgotten", 20), make_spec("renewed", 20)
    await one.send(reserve=pb.Reserve(sequence=forgotten, source=nobody))
    await two.send(reserve=pb.Reserve(sequence=renewed, source=nobody))
    await one.expect("granted")
    await two.expect("granted")

    async def renew() -> None:
        while True:
            await two.send(renew=pb.Renew(attempts=[renewed.attempt]))
            await asyncio.sleep(0.2)

    renewing = asyncio.create_task(renew())
    failed = await one.expect("failed")
    assert failed.failed.attempt == forgotten.attempt
    assert (await two.heartbeat()).tickets == 1
    renewing.cancel()
    assert not [message for message in two.seen if message.WhichOneof("body") == "failed"]


async def test_steps_are_told_to_whoever_plans(rig: Any, make_spec: Spec) -> None:
    one = await rig.start(Role.MIXED, step_delay=0.01)
    await one.send(submit=pb.Submit(sequence=make_spec("r", 100, max_tokens=40)))
    await one.finished("r")
    steps = (await rpc.WorkerStub(one.channel).GetSteps(pb.StepsRequest())).steps
    (prefill,) = [step for step in steps if step.prefill_rows]
    assert (prefill.prefill_tokens, prefill.prefill_pairs, prefill.decode_rows, prefill.sampled) == (100, 5050, 0, 1)
    decode = [step for step in steps if step.decode_rows]
    assert decode
    for step in decode:
        assert (step.decode_rows, step.prefill_rows) == (1, 0)
        assert 101 < step.decode_context <= 139
    assert all(0.01 <= step.seconds <= step.period for step in steps)
