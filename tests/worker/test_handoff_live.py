"""Handoffs between real workers: real engines, sockets and shared memory; only the router is played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from baton.core.view import Role
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as rpc

Spec = Callable[..., pb.SequenceSpec]


async def hand_over(prefill: Any, decode: Any, spec: pb.SequenceSpec) -> None:
    """What the router does for one request: reserve and prefill leave together, the ticket is passed on."""
    await decode.send(reserve=pb.Reserve(sequence=spec, source=prefill.registration.worker))
    await prefill.send(submit=pb.Submit(sequence=spec, target=decode.registration.worker))
    granted = await decode.expect("granted", lambda m: m.granted.attempt == spec.attempt)
    await prefill.send(grant=pb.Grant(attempt=spec.attempt, ticket=granted.granted.ticket))


async def whole(worker: Any, spec: pb.SequenceSpec) -> list[int]:
    """The tokens of the same sequence served by one worker alone."""
    other = pb.SequenceSpec()
    other.CopyFrom(spec)
    other.attempt.request_id = spec.attempt.request_id + "-whole"
    await worker.send(submit=pb.Submit(sequence=other))
    await worker.finished(other.attempt.request_id)
    return worker.tokens_of(other.attempt.request_id)


def at_rest(beat: pb.Heartbeat) -> bool:
    idle = beat.num_running == 0 and beat.num_waiting == 0 and beat.tickets == 0
    return idle and beat.quarantined_blocks == 0 and beat.free_blocks == beat.total_blocks


@pytest.mark.parametrize("transport", ["shm", "grpc"])
@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "seeded"])
@pytest.mark.parametrize("num_prompt", [1, 16, 17, 100])
async def test_split_serving_equals_whole_serving(
    rig: Any, make_spec: Spec, transport: str, num_prompt: int, temperature: float
) -> None:
    prefill = await rig.start(Role.PREFILL, transport=transport, max_step_tokens=32)
    decode = await rig.start(Role.DECODE, transport=transport)
    spec = make_spec("r", num_prompt, max_tokens=12, temperature=temperature)
    await hand_over(prefill, decode, spec)
    await decode.finished("r")
    report = (await prefill.expect("handed_over")).handed_over
    assert report.transport == transport
    assert report.bytes > 0
    tokens = prefill.tokens_of("r") + decode.tokens_of("r")
    assert len(tokens) == 12
    assert tokens == await whole(decode, spec)
    await prefill.until(at_rest)
    await decode.until(at_rest)


async def test_a_prompt_that_decode_already_holds_moves_only_its_tail(rig: Any, make_spec: Spec) -> None:
    prefill, decode = await rig.start(Role.PREFILL), await rig.start(Role.DECODE)
    await hand_over(prefill, decode, make_spec("a", 100))
    await decode.finished("a")
    await hand_over(prefill, decode, make_spec("b", 100))
    await decode.finished("b")
    adopted = await decode.expect("adopted", lambda m: m.adopted.attempt.request_id == "b")
    assert adopted.adopted.held_blocks >= 6
    assert prefill.tokens_of("a") + decode.tokens_of("a") == prefill.tokens_of("b") + decode.tokens_of("b")


async def test_a_sequence_that_ends_with_its_first_token_hands_nothing_over(rig: Any, make_spec: Spec) -> None:
    prefill, decode = await rig.start(Role.PREFILL), await rig.start(Role.DECODE)
    spec = make_spec("r", 40, max_tokens=1)
    await hand_over(prefill, decode, spec)
    await prefill.finished("r")
    await decode.send(abort=pb.AbortAttempt(attempt=spec.attempt))
    await prefill.until(at_rest)
    await decode.until(at_rest)
    assert decode.tokens_of("r") == []


async def test_a_ticket_that_nobody_renews_expires_at_both_ends(rig: Any, make_spec: Spec) -> None:
    prefill = await rig.start(Role.PREFILL, lease=0.5)
    decode = await rig.start(Role.DECODE, lease=0.5)
    spec = make_spec("r", 40)
    await decode.send(reserve=pb.Reserve(sequence=spec, source=prefill.registration.worker))
    await prefill.send(submit=pb.Submit(sequence=spec, target=decode.registration.worker))
    granted = await decode.expect("granted")
    assert (await decode.expect("failed")).failed.retriable  # the ticket was never passed on
    assert (await prefill.expect("failed")).failed.retriable
    await prefill.send(grant=pb.Grant(attempt=spec.attempt, ticket=granted.granted.ticket))  # too late: nothing moves
    await prefill.until(at_rest)
    await decode.until(at_rest)


async def test_renewed_tickets_live_on(rig: Any, make_spec: Spec) -> None:
    prefill = await rig.start(Role.PREFILL, lease=0.5)
    decode = await rig.start(Role.DECODE, lease=0.5)
    spec = make_spec("r", 40)
    await decode.send(reserve=pb.Reserve(sequence=spec, source=prefill.registration.worker))
    await prefill.send(submit=pb.Submit(sequence=spec, target=decode.registration.worker))
    granted = await decode.expect("granted")
    for _ in range(10):  # two lease lives, a fifth of a lease apart
        for link in (prefill, decode):
            await link.send(renew=pb.Renew(attempts=[spec.attempt]))
        await asyncio.sleep(0.1)
    await prefill.send(grant=pb.Grant(attempt=spec.attempt, ticket=granted.granted.ticket))
    await decode.finished("r")
    await decode.until(at_rest)


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_damaged_bytes_are_never_served(rig: Any, make_spec: Spec, transport: str) -> None:
    prefill = await rig.start(Role.PREFILL, transport=transport)
    decode = await rig.start(Role.DECODE, transport=transport)
    rig.damage(prefill, transport)
    spec = make_spec("r", 40)
    await hand_over(prefill, decode, spec)
    failed = (await decode.expect("failed")).failed
    assert failed.retriable
    assert "checksum" in failed.reason
    assert decode.tokens_of("r") == []
    await prefill.until(at_rest)
    await decode.until(at_rest)


async def test_a_full_decode_pool_grants_later_and_nothing_is_computed_twice(rig: Any, make_spec: Spec) -> None:
    prefill = await rig.start(Role.PREFILL)
    decode = await rig.start(Role.DECODE, num_blocks=24, step_delay=0.005)
    first, second = make_spec("long", 200, max_tokens=40), make_spec("later", 201, max_tokens=8)
    await hand_over(prefill, decode, first)
    await decode.expect("adopted")
    steps = (await prefill.heartbeat()).step
    await decode.send(reserve=pb.Reserve(sequence=second, source=prefill.registration.worker))
    await prefill.send(submit=pb.Submit(sequence=second, target=decode.registration.worker))
    await prefill.expect("tokens", lambda m: m.tokens.sequences[0].attempt.request_id == "later")
    beat = await prefill.heartbeat()
    assert beat.free_blocks < beat.total_blocks  # the prefilled KV waits here
    granted = await decode.expect("granted", lambda m: m.granted.attempt.request_id == "later")
    await prefill.send(grant=pb.Grant(attempt=second.attempt, ticket=granted.granted.ticket))
    await decode.finished("later")
    assert (await prefill.heartbeat()).step == steps + 1
    await prefill.until(at_rest)
    await decode.until(at_rest)


async def test_a_router_that_stays_away_takes_its_attempts_with_it(
    rig: Any, make_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.worker.host.ROUTER_GRACE", 0.3)
    decode = await rig.start(Role.DECODE, step_delay=0.01)
    watcher = await rig.connect(decode.registration, "router-1")
    await decode.send(submit=pb.Submit(sequence=make_spec("r", 20, max_tokens=200)))
    await decode.expect("tokens")
    decode.call.cancel()
    await watcher.until(at_rest)


async def test_a_hello_to_another_epoch_is_refused(rig: Any) -> None:
    decode = await rig.start(Role.DECODE)
    call = rpc.WorkerStub(decode.channel).Control()
    await call.write(pb.RouterMessage(hello=pb.RouterHello(router_id="r", router_epoch=1, worker_epoch=1)))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "not epoch 1" in (refused.value.details() or "")
