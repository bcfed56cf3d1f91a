"""The router service against fake workers over real gRPC, with the real lifecycle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from baton.core.clock import MonotonicClock
from baton.core.errors import Cancelled, DeadlineExceeded, InternalError, InvalidRequest, Overloaded, Unavailable
from baton.core.request import FinishReason, SamplingParams
from baton.core.slo import Slo
from baton.core.view import Role
from baton.observability.metrics import Metrics
from baton.policy.admission import ADMISSION
from baton.policy.routing import ROUTING
from baton.router.events import Action, Event, Granted
from baton.router.lifecycle import Lifecycle, LifecycleConfig
from baton.router.readiness import Readiness
from baton.router.roster import ControllerLink
from baton.router.service import RouterService, ServiceOptions
from baton.router.stream import Stream, Submission
from baton.router.tape import pack, read_tape, replay
from baton.tests.router.fake_cluster import FakeCluster, expected_tokens, running_cluster

PROMPT = (1, 2, 3)


def new_lifecycle(max_queue: int = 1000) -> Lifecycle:
    return Lifecycle(LifecycleConfig(), ROUTING["least_loaded"], ADMISSION["queue_length"](max_queue, Slo()))


@contextlib.asynccontextmanager
async def serving(cluster: FakeCluster, max_queue: int = 1000, **options: object) -> AsyncIterator[RouterService]:
    """A service that has seen every worker of the cluster."""
    link = ControllerLink(cluster.controller.address, "r0")
    tape = options.pop("tape", None)
    service = RouterService(
        ServiceOptions("r0", 0xABC, seed=1), new_lifecycle(max_queue), MonotonicClock(), link, Metrics(), tape
    )
    service.start()
    try:
        await until(service, lambda: len([m for m in service.membership.members if m.live]) == len(cluster.workers))
        yield service
    finally:
        await service.close(0.0)


async def until(service: RouterService, condition: Callable[[], bool]) -> None:
    """Wait for a condition that changes with the membership."""
    while not condition():
        service.changed.clear()
        await service.changed.wait()


def submission(count: int = 8, **fields: object) -> Submission:
    return Submission(PROMPT, SamplingParams(temperature=0.0, max_tokens=count), **fields)


async def collect(stream: Stream) -> tuple[dict[int, list[int]], dict[int, FinishReason]]:
    tokens: dict[int, list[int]] = {index: [] for index in range(stream.submission.n)}
    finishes: dict[int, FinishReason] = {}
    async for update in stream:
        tokens[update.index].extend(update.tokens)
        if update.finish is not None:
            finishes[update.index] = update.finish
    return tokens, finishes


def assert_idle(service: RouterService) -> None:
    """Nothing is left of any request."""
    assert service.num_active == 0
    assert service.num_pending == 0
    assert all(not member.attempts for member in service.membership.members)


async def first_update(stream: Stream) -> list[int]:
    return list((await anext(stream)).tokens)


@pytest.mark.parametrize("roles", [(Role.PREFILL, Role.DECODE), (Role.MIXED,)])
async def test_request_streams_every_token_once(roles: tuple[Role, ...]) -> None:
    async with running_cluster(*roles) as cluster, serving(cluster) as service:
        stream = service.submit(submission(100))
        tokens, finishes = await collect(stream)
        assert tokens[0] == expected_tokens(PROMPT, 100)
        assert finishes == {0: FinishReason.LENGTH}
        stages = stream.sequences[0].stages()
        assert stages.ttft is not None
        assert stages.queue is not None
        assert stages.ttft == pytest.approx(stages.queue + (stages.prefill or 0.0))
        assert stages.tpot is not None
        assert stages.total >= stages.ttft
        if len(roles) == 2:
            assert stream.sequences[0].first_worker == cluster.workers["p0"].ref
            assert stream.sequences[0].rest_worker == cluster.workers["d1"].ref
            await cluster.workers["p0"].until_received("grant")
        await asyncio.sleep(0)
        assert_idle(service)


async def test_recent_requests_are_remembered_whatever_their_end() -> None:
    async with running_cluster(Role.MIXED) as cluster, serving(cluster, max_queue=2) as service:
        await collect(service.submit(submission(100)))
        await collect(service.submit(submission(5, n=2)))
        with pytest.raises(Overloaded):
            service.submit(submission(7, n=3))
        await collect(service.submit(submission(4, internal=True)))
        served, *rest = service.recent.requests()
        assert (served.input_tokens, served.output_tokens, served.cached_tokens, served.ok) == (
            3,
            100,
            3,
            True,
        )  # fake workers find all in their caches
        assert served.ttft is not None
        assert served.tpot is not None
        both = [each for each in rest if each.ok]
        assert [each.output_tokens for each in both] == [5, 5]
        assert both[0].arrival == both[1].arrival > served.arrival
        refused = [each for each in rest if not each.ok]
        assert refused
        assert all(each.input_tokens == 3 and each.ttft is None for each in refused)
        assert len(rest) == 2 + len(refused)  # not the router's own canary


async def test_first_token_can_finish_at_the_prefill_worker() -> None:
    async with running_cluster(Role.PREFILL, Role.DECODE) as cluster, serving(cluster) as service:
        tokens, finishes = await collect(service.submit(submission(1)))
        assert tokens[0] == expected_tokens(PROMPT, 1)
        assert finishes == {0: FinishReason.LENGTH}
        await cluster.workers["d1"].until_received("abort")  # its reservation is given up
        assert_idle(service)


async def test_sequences_share_a_request_and_differ_by_index() -> None:
    async with running_cluster(Role.PREFILL, Role.DECODE) as cluster, serving(cluster) as service:
        stream = service.submit(submission(5, n=3))
        tokens, finishes = await collect(stream)
        assert tokens == dict.fromkeys(range(3), expected_tokens(PROMPT, 5))
        assert len(finishes) == 3
        specs = [m.submit.sequence for m in cluster.workers["p0"].received if m.WhichOneof("body") == "submit"]
        assert [spec.sampling.sequence_index for spec in specs] == [0, 1, 2]
        assert [spec.attempt.request_id for spec in specs] == [f"{stream.id}.{index}" for index in range(3)]
        assert len({spec.sampling.seed for spec in specs}) == 1  # one seed, drawn here
        assert stream.id.startswith("r0-abc-")


async def test_seeds_come_from_the_service_unless_given() -> None:
    async with running_cluster(Role.MIXED) as cluster, serving(cluster) as service:
        for seed in (None, None, 77):
            await collect(service.submit(submission(1, seed=seed)))
        seeds = [m.submit.sequence.sampling.seed for m in cluster.workers["m0"].received if m.WhichOneof("body") == "submit"]
        assert seeds[2] == 77
        assert seeds[0] != seeds[1]


async def test_lost_decode_worker_is_invisible() -> None:
    async with running_cluster(Role.PREFILL, Role.DECODE, Role.DECODE) as cluster, serving(cluster) as service:
        stream = service.submit(submission(60))
        tokens = await first_update(stream)
        while len(tokens) < 5:
            tokens += await first_update(stream)
        victim = next(w for w in cluster.workers.values() if w.role is Role.DECODE and w.running)
        await victim.die()
        rest, finishes = await collect(stream)
        assert tokens + rest[0] == expected_tokens(PROMPT, 60)
        assert finishes == {0: FinishReason.LENGTH}
        assert stream.sequences[0].num_attempts == 2
        assert stream.sequences[0].retries == ["worker_lost"]
        # The controller is asked to confirm the death, and the others hear of it.
        await cluster.workers["p0"].until_received("gone")
        assert cluster.controller.killed[0].worker.worker_id == victim.worker_id


async def test_resumed_attempt_carries_the_tokens_the_client_has() -> None:
    async with running_cluster(Role.MIXED) as cluster, serving(cluster) as service:
        worker = cluster.workers["m0"]
        stream = service.submit(submission(40))
        tokens = await first_update(stream)
        while len(tokens) < 3:
            tokens += await first_update(stream)
        await worker.break_streams()
        rest, _ = await collect(stream)
        assert tokens + rest[0] == expected_tokens(PROMPT, 40)
        specs = [m.submit.sequence for m in worker.received if m.WhichOneof("body") == "submit"]
        assert len(specs) == 2
        assert list(specs[1].output) == expected_tokens(PROMPT, len(specs[1].output))
        assert len(specs[1].output) >= 3
        assert stream.sequences[0].retries == ["stream_reset"]


async def test_restarted_worker_serves_under_its_new_epoch() -> None:
    async with running_cluster(Role.PREFILL, Role.DECODE) as cluster, serving(cluster) as service:
        old = cluster.workers["d1"]
        stream = service.submit(submission(50))
        tokens = await first_update(stream)
        new = await cluster.replace("d1")
        rest, _ = await collect(stream)
        assert tokens + rest[0] == expected_tokens(PROMPT, 50)
        refs = {member.ref for member in service.membership.members}
        assert new.ref in refs
        assert old.ref not in refs


async def test_gap_in_positions_is_a_failed_attempt() -> None:
    async with running_cluster(Role.MIXED) as cluster, serving(cluster) as service:
        stream = service.submit(submission(20))
        tokens = await first_update(stream)
        cluster.workers["m0"].skip_position = True
        rest, _ = await collect(stream)
        assert tokens + rest[0] == expected_tokens(PROMPT, 20)
        assert stream.sequences[0].retries == ["gap"]


async def test_first_token_that_never_comes_does_not_hang_the_request() -> None:
    """The prefill worker hands over and dies before its first token has reached the router."""
    async with running_cluster(Role.PREFILL, Role.DECODE) as cluster, serving(cluster) as service:
        prefill = cluster.workers["p0"]
        prefill.mute_first = True
        stream = service.submit(submission(10))
        await prefill.until_received("grant")
        await prefill.die()
        tokens, _ = await collect(stream)
        assert tokens[0] == expected_tokens(PROMPT, 10)


async def test_worker_failures_are_retried_or_reported() -> None:
    async with running_cluster(Role.MIXED) as cluster, serving(cluster) as service:
        worker = cluster.workers["m0"]
        worker.refuse_attempts = 1
        tokens, _ = await collect(service.submit(submission(3)))
        assert tokens[0] == expected_tokens(PROMPT, 3)
        worker.refuse_attempts, worker.retriable = 1, False
        with pytest.raises(Exception, match="told to"):
            await collect(service.submit(submission(3)))
        assert_idle(service)


async def test_a_bug_in_the_brain_ends_its_request_and_nothing_else() -> None:
    async with running_cluster(Role.PREFILL, Role.DECODE) as cluster, serving(cluster) as service:
        brain = service._brain
        handle, fail = brain.handle, ["once"]

        def buggy(event: Event) -> list[Action]:
            if isinstance(event, Granted) and fail:
                fail.clear()
                raise ZeroDivisionError("a bug")
            return handle(event)

        brain.handle = buggy  # type: ignore[method-assign]
        with pytest.raises(InternalError, match="a bug"):
            await collect(service.submit(submission()))
        tokens, _ = await collect(service.submit(submission()))
        assert len(tokens[0]) == 8
        assert_idle(service)


async def test_cancel_reaches_both_workers() -> None:
    async with running_cluster(Role.PREFILL, Role.DECODE) as cluster, serving(cluster) as service:
        cluster.workers["p0"].open.clear()
        stream = service.submit(submission(50))
        await cluster.workers["d1"].until_received("reserve")
        stream.cancel()
        with pytest.raises(Cancelled):
            await collect(stream)
        await cluster.workers["p0"].until_received("abort")
        await cluster.workers["d1"].until_received("abort")
        assert_idle(service)


async def test_abort_by_either_name() -> None:
    async with running_cluster(Role.MIXED) as cluster, serving(cluster) as service:
        cluster.workers["m0"].open.clear()
        first, second = service.submit(submission(5, client_id="mine")), service.submit(submission(5))
        with pytest.raises(InvalidRequest, match="mine"):
            service.submit(submission(5, client_id="mine"))
        assert service.abort("mine")
        assert service.abort(second.id)
        assert not service.abort("mine")
        for stream in (first, second):
            with pytest.raises(Cancelled):
                await collect(stream)
        service.submit(submission(5, client_id="mine")).cancel()


async def test_stop_string_ends_a_sequence_well_and_aborts_early() -> None:
    async with running_cluster(Role.MIXED) as cluster, serving(cluster) as service:
        stream = service.submit(submission(1000, n=2))
        await first_update(stream)
        stream.finish(0)
        cluster.workers["m0"].open.clear()
        await cluster.workers["m0"].until_received("abort")
        assert stream.sequences[0].done
        assert stream.sequences[0].finish is FinishReason.STOP
        assert not stream.sequences[1].done
        stream.finish(1)
        assert [update async for update in stream] == []
        assert_idle(service)


async def test_deadline_drops_queued_work() -> None:
    async with running_cluster() as cluster, serving(cluster) as service:  # nobody could ever serve it
        stream = service.submit(submission(5, timeout=0.05))
        assert service.num_pending == 1
        with pytest.raises(DeadlineExceeded):
            await collect(stream)
        assert_idle(service)
        assert service.num_timers == 0


async def test_overload_is_shed_at_once_with_all_sequences() -> None:
    async with running_cluster(Role.MIXED) as cluster, serving(cluster, max_queue=3) as service:
        cluster.workers["m0"].open.clear()
        held = service.submit(submission(5, n=2))
        with pytest.raises(Overloaded) as shed:
            service.submit(submission(5, n=2))
        assert shed.value.retry_after > 0
        assert service.num_active == 1
        cluster.workers["m0"].open.set()
        await collect(held)
        assert_idle(service)


async def test_slow_client_finds_its_news_merged() -> None:
    async with running_cluster(Role.MIXED) as cluster, serving(cluster) as service:
        slow, fast = service.submit(submission(200)), service.submit(submission(200))
        tokens, _ = await collect(fast)
        assert tokens[0] == expected_tokens(PROMPT, 200)
        await service.idle()
        updates = [update async for update in slow]
        assert len(updates) == 1
        assert list(updates[0].tokens) == expected_tokens(PROMPT, 200)


async def test_shutdown_ends_streams_with_unavailable() -> None:
    async with running_cluster(Role.MIXED) as cluster:
        async with serving(cluster) as service:
            cluster.workers["m0"].open.clear()
            stream = service.submit(submission(5))
            await cluster.workers["m0"].until_received("submit")
        with pytest.raises(Unavailable, match="can be sent again"):
            await collect(stream)
        with pytest.raises(Unavailable):
            service.submit(submission(5))
        await cluster.workers["m0"].until_received("abort")


async def test_hanging_worker_is_lost_and_killed() -> None:
    async with running_cluster(Role.MIXED, Role.MIXED) as cluster, serving(cluster) as service:
        victim, other = cluster.workers["m0"], cluster.workers["m1"]
        victim.beating = False
        victim.open.clear()
        other.open.clear()
        streams = [service.submit(submission(10)) for _ in range(4)]
        other.open.set()
        results = await asyncio.gather(*(collect(stream) for stream in streams))
        assert all(tokens[0] == expected_tokens(PROMPT, 10) for tokens, _ in results)
        assert [kill.worker.epoch for kill in cluster.controller.killed] == [victim.epoch]
        assert "heartbeat" in cluster.controller.killed[0].reason


async def test_readiness_needs_both_pools_and_a_canary() -> None:
    async with running_cluster(Role.PREFILL) as cluster, serving(cluster) as service:
        changes: asyncio.Queue[bool] = asyncio.Queue()
        readiness = Readiness(service, (1,), changes.put_nowait)
        task = asyncio.create_task(readiness.run())
        await asyncio.sleep(0)  # it looks once
        assert readiness.reason == "no live decode worker"
        decode = await cluster.add(Role.DECODE, "d1")
        assert await changes.get()
        assert any(m.WhichOneof("body") == "reserve" for m in decode.received)  # the canary went through it
        await decode.die()
        assert not await changes.get()
        assert "decode" in readiness.reason
        await cluster.replace("d1")
        assert await changes.get()
        task.cancel()


async def test_tape_of_a_live_run_replays_to_the_same_actions() -> None:
    recorded = bytearray()
    async with (
        running_cluster(Role.PREFILL, Role.DECODE, Role.DECODE) as cluster,
        serving(cluster, tape=lambda event, actions: recorded.extend(pack(event, actions))) as service,
    ):
        streams = [service.submit(submission(40, n=1 + index % 2)) for index in range(6)]
        await first_update(streams[0])
        streams[1].cancel()
        await cluster.workers["d1"].die()
        results = await asyncio.gather(*(collect(stream) for stream in streams), return_exceptions=True)
        assert isinstance(results[1], Cancelled)
    tape = list(read_tape(bytes(recorded)))
    assert len(tape) > 20
    assert replay(tape, new_lifecycle()) is None
    assert replay(tape[1:], new_lifecycle()) is not None  # it does compare


async def test_controller_may_go_and_come_back() -> None:
    async with running_cluster(Role.MIXED) as cluster, serving(cluster) as service:
        port = int(cluster.controller.address.rpartition(":")[2])
        await cluster.controller.stop()
        tokens, _ = await collect(service.submit(submission(5)))
        assert tokens[0] == expected_tokens(PROMPT, 5)
        await cluster.controller.start(port)
        await cluster.add(Role.MIXED, "m1")
        await until(service, lambda: len(service.membership.members) == 2)
