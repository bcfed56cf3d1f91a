"""An executor or a transport that raises: attempts go back to the router, blocks come back, the worker serves on or ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from baton.core.step import StepOutput, StepPlan
from baton.core.view import Role
from baton.engine.loop import MAX_FAILURES
from baton.kv_transfer.ticket import Ticket
from baton.kv_transfer.transport import Copy, Note, TransferStats
from baton.proto import worker_pb2 as pb
from baton.tests.worker.test_handoff_live import at_rest, hand_over, whole

Spec = Callable[..., pb.SequenceSpec]


class Broken(Exception):
    """What a device throws."""


def break_steps(member: Any, monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    """The next `num_steps` steps of this worker raise."""
    submit, left = member.engine.executor.submit, [num_steps]

    def failing(plan: StepPlan) -> Future[StepOutput]:
        if left[0] == 0:
            future: Future[StepOutput] = submit(plan)
            return future
        left[0] -= 1
        failed: Future[StepOutput] = Future()
        failed.set_exception(Broken("the device is on fire"))
        return failed

    monkeypatch.setattr(member.engine.executor, "submit", failing)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_a_failed_step_costs_an_attempt_and_nothing_else(
    rig: Any, make_spec: Spec, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    prefill, decode = await rig.start(Role.PREFILL), await rig.start(Role.DECODE)
    links = {Role.PREFILL: prefill, Role.DECODE: decode}
    spec = make_spec("r", 40)
    break_steps(rig.members[links[role].registration.worker.worker_id], monkeypatch, 1)
    await hand_over(prefill, decode, spec)
    failed = (await links[role].expect("failed")).failed
    assert failed.retriable
    assert "on fire" in failed.reason
    for link in links.values():
        await link.send(abort=pb.AbortAttempt(attempt=spec.attempt))
        await link.until(at_rest)
    again = make_spec("r", 40)
    again.attempt.number = 1
    await hand_over(prefill, decode, again)
    await decode.finished("r")
    for link in links.values():
        await link.until(at_rest)
    assert len(await whole(decode, spec)) == 8


async def test_a_worker_whose_every_step_fails_ends_itself(rig: Any, make_spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = await rig.start(Role.DECODE)
    break_steps(rig.members["decode-0"], monkeypatch, 1000)
    for index in range(MAX_FAILURES):
        await decode.send(submit=pb.Submit(sequence=make_spec("r" * (index + 1), 40)))
        if index < MAX_FAILURES - 1:  # with the last one it ends
            await decode.expect("failed", lambda m, n=index + 1: len(m.failed.attempt.request_id) == n)
    (worker,) = rig._tasks
    async with asyncio.timeout(10):
        with pytest.raises(Broken):
            await worker
    rig._tasks.clear()


async def test_an_unforeseen_error_in_a_push_gives_the_blocks_back(
    rig: Any, make_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = await rig.start(Role.PREFILL), await rig.start(Role.DECODE)

    async def push(copies: Sequence[Copy], ticket: Ticket, note: Note) -> TransferStats:
        raise OSError("no such device")

    monkeypatch.setattr(rig.members["prefill-0"]._transports["shm"], "push", push)
    spec = make_spec("r", 40)
    await hand_over(prefill, decode, spec)
    failed = (await prefill.expect("failed")).failed
    assert failed.retriable
    assert "no such device" in failed.reason
    await prefill.until(at_rest)
    await decode.until(at_rest)


async def test_an_abort_during_a_push_leaves_no_trace(rig: Any, make_spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = await rig.start(Role.PREFILL), await rig.start(Role.DECODE)
    member = rig.members["prefill-0"]
    transport, pushing, go_on = member._transports["shm"], asyncio.Event(), asyncio.Event()
    push = transport.push

    async def slow(copies: Sequence[Copy], ticket: Ticket, note: Note) -> TransferStats:
        pushing.set()
        await go_on.wait()
        stats: TransferStats = await push(copies, ticket, note)
        return stats

    monkeypatch.setattr(transport, "push", slow)
    spec = make_spec("r", 40)
    await hand_over(prefill, decode, spec)
    await pushing.wait()
    for link in (prefill, decode):
        await link.send(abort=pb.AbortAttempt(attempt=spec.attempt))
    await decode.until(at_rest)
    go_on.set()
    await prefill.until(at_rest)
    await decode.until(at_rest)
    left = (member._sent, member._first_token_at, member._without_token, member.sessions._owner, member._tasks)
    assert not any(left), left
