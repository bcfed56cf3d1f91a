"""A scheduler, a fake device and a client that checks every token: what the scheduler's tests drive."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.core.request import Attempt, FinishReason, SamplingParams, SequenceSpec
from baton.core.step import ComputedEvent, PreemptedEvent, SequenceEvent, StepPlan, TokenEvent
from baton.engine.blocks import BlockPool
from baton.engine.scheduler import Scheduler, SchedulerConfig
from baton.policy.ordering import ORDERING
from baton.tests.engine.fake_device import FakeDevice, expected_end, token_of


@dataclass
class Client:
    """What the client of one request has seen, over all its attempts."""

    spec: SequenceSpec
    output: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    computed: ComputedEvent | None = None  # the latest
    attempts: int = 1
    gone: bool = False  # aborted, failed or handed over: nothing more may come


class Rig:
    """Drives one scheduler; every event is checked on its way to `clients`."""

    def __init__(self, num_blocks: int = 64, block_size: int = 4, ordering: str = "fcfs", **config: object) -> None:
        defaults: dict[str, object] = {"max_step_tokens": 64, "max_num_seqs": 8, "max_model_len": 100, "watermark": 0.0}
        self.config = SchedulerConfig(**(defaults | config))  # type: ignore[arg-type]
        self.pool = BlockPool(num_blocks, block_size, self.config.prefix_cache)
        self.scheduler = Scheduler(self.pool, self.config, ORDERING[ordering])
        self.device = FakeDevice(self.pool)
        self.clients: dict[Attempt, Client] = {}
        self.in_flight: deque[StepPlan] = deque()
        self.preempted: list[SequenceSpec] = []
        self.now = 0.0

    # ---- sequences -----------------------------------------------------------------------------

    def spec(
        self,
        name: str,
        prompt: Sequence[int],
        max_tokens: int = 4,
        output: int = 0,
        hand_over: bool = False,
        priority: int = 0,
        stop: tuple[int, ...] = (),
        min_tokens: int = 0,
        shaped: bool = False,
        reports: bool = False,
    ) -> SequenceSpec:
        """A sequence whose client already has `output` tokens."""
        self.now += 1.0
        sampling = SamplingParams(
            max_tokens=max_tokens,
            stop_token_ids=stop,
            min_tokens=min_tokens,
            presence_penalty=0.5 if shaped else 0.0,
            prompt_logprobs=0 if reports else None,
        )
        earlier = tuple(token_of(name, index) for index in range(output))
        return SequenceSpec(Attempt(name, 1), tuple(prompt), sampling, earlier, priority, self.now, hand_over)

    def add(self, spec: SequenceSpec) -> Attempt:
        self.device.knows(spec)
        self.scheduler.add(spec, self.now)
        self.clients[spec.attempt] = Client(spec, list(spec.output))
        return spec.attempt

    def adopt(self, spec: SequenceSpec, blocks: Sequence[int]) -> Attempt:
        """The KV has landed in `blocks` and the client has the first token."""
        self.device.knows(spec)
        first_token = token_of(spec.attempt.request_id, len(spec.output))
        self.scheduler.adopt(spec, blocks, first_token, self.now)
        self.clients[spec.attempt] = Client(spec, [*spec.output, first_token])
        return spec.attempt

    def land(self, spec: SequenceSpec, head_room: int = 0) -> tuple[int, ...]:
        """Reserve blocks as a decode worker does and land the KV of the known tokens in them."""
        self.device.knows(spec)
        known = spec.known_tokens
        held = self.pool.lookup(known)
        fresh = self.pool.allocate(self.pool.num_blocks_for(len(known)) + head_room - len(held))
        assert fresh is not None, "the pool is too small for this test"
        self.device.landed(spec.attempt.request_id, held + fresh, len(known), num_held=len(held))
        return held + fresh

    def abort(self, attempt: Attempt) -> bool:
        self.clients[attempt].gone = True
        return self.scheduler.abort(attempt)

    def release(self, attempt: Attempt) -> None:
        self.clients[attempt].gone = True
        self.scheduler.release(attempt)

    # ---- steps ---------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        self.now += 1.0
        plan = self.scheduler.plan(self.now)
        self._deliver(self.scheduler.take_events())
        if plan is not None:
            assert len(plan.rows) <= self.config.max_num_seqs
            assert plan.num_tokens <= self.config.max_step_tokens
            assert sum(len(row.needs.targets) for row in plan.rows if row.needs) <= self.config.max_reported
            for row in plan.rows:
                assert row.num_tokens >= 1, f"an empty row: {row}"
                assert row.output_index < row.sampling.max_tokens, f"beyond max_tokens: {row}"
                assert row.end < self.config.max_model_len, f"beyond the model's limit: {row}"
            self.in_flight.append(plan)
            self.device.submit(plan)
        return plan

    def commit(self) -> list[SequenceEvent]:
        self.now += 1.0
        output = self.device.output()
        events = self.scheduler.commit(self.in_flight.popleft(), output, self.now)
        self._deliver(events)
        self.scheduler.check()
        return events

    def fail(self) -> list[Attempt]:
        self.device.drop()
        given_up = self.scheduler.fail(self.in_flight.popleft())
        for attempt in given_up:
            self.clients[attempt].gone = True
        return given_up

    def step(self) -> list[SequenceEvent]:
        """One plan, run and committed; [] when there is nothing to do."""
        return self.commit() if self.plan() is not None else []

    def drain(self, limit: int = 3000) -> None:
        """Run until nothing is left, or nothing can go on before a held sequence is released."""
        for _ in range(limit):
            if self.plan() is None and not self.in_flight:
                stuck = self.scheduler.has_work and not self.scheduler.num_held
                assert not stuck, "sequences wait or run, but nothing is planned for them"
                return
            while self.in_flight:
                self.commit()
        raise AssertionError(f"no end after {limit} steps")

    # ---- the client ----------------------------------------------------------------------------

    def expected(self, attempt: Attempt) -> tuple[list[int], FinishReason]:
        spec = self.clients[attempt].spec
        return expected_end(attempt.request_id, spec.prompt, spec.sampling, self.config.max_model_len)

    def assert_finished(self, attempt: Attempt) -> None:
        client = self.clients[attempt]
        assert (client.output, client.finish) == self.expected(attempt)

    def assert_idle(self) -> None:
        """Every block is back."""
        self.scheduler.check()
        assert not self.scheduler.has_work
        assert (self.pool.num_free, self.pool.num_quarantined) == (self.pool.num_blocks, 0)
        assert (self.scheduler.num_waiting, self.scheduler.num_running, self.scheduler.num_held) == (0, 0, 0)
        assert self.scheduler.queued_tokens == 0

    def _deliver(self, events: Sequence[SequenceEvent]) -> None:
        for index, event in enumerate(events):
            client = self.clients[event.attempt]
            assert not client.gone, f"{event} for a sequence that is gone"
            assert client.finish is None, f"{event} after the end"
            if isinstance(event, TokenEvent):
                self._tokens(client, event)
            elif isinstance(event, ComputedEvent):
                self._computed(client, event, events[index + 1 :])
            elif isinstance(event, PreemptedEvent):
                client.gone = True
                self.preempted.append(client.spec)

    def _tokens(self, client: Client, event: TokenEvent) -> None:
        assert event.position == len(client.output), f"{event} does not follow {len(client.output)} tokens"
        reports = client.spec.sampling.prompt_logprobs is not None and event.position == 0
        of_prompt = tuple(entry.token for entry in event.prompt_logprobs)
        assert of_prompt == (client.spec.prompt[1:] if reports else ()), f"{event} tells of another prompt"
        client.output += event.tokens
        client.finish = event.finish
        output, finish = self.expected(event.attempt)
        assert client.output == output[: len(client.output)], f"{event.attempt} went astray: {client.output} is not {output}"
        assert event.finish == (finish if len(client.output) == len(output) else None)

    def _computed(self, client: Client, event: ComputedEvent, following: Sequence[SequenceEvent]) -> None:
        spec = client.spec
        assert spec.hand_over
        assert event.last == (event.num_tokens == len(spec.known_tokens))
        assert len(event.blocks) == self.pool.num_blocks_for(event.num_tokens)
        if event.last:
            assert isinstance(following[0], TokenEvent)
            assert following[0].attempt == event.attempt
        if client.computed is not None:
            assert client.computed.num_tokens < event.num_tokens
            assert event.blocks[: len(client.computed.blocks)] == client.computed.blocks, "blocks moved under a push"
        self.device.check_holds(event.attempt.request_id, event.blocks, event.num_tokens)
        client.computed = event


def rows(plan: StepPlan | None) -> list[tuple[str, int, int, bool]]:
    """(request, start, end, sample) of every row."""
    assert plan is not None
    return [(row.attempt.request_id, row.start, row.end, row.sample) for row in plan.rows]
