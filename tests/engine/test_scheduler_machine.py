"""Random lives of a scheduler against the fake device: nothing leaks, nothing is misread, every request ends as it should."""

from __future__ import annotations

from dataclasses import replace

from baton.core.errors import InvalidRequest
from baton.core.request import Attempt, SequenceSpec
from baton.core.step import ComputedEvent
from baton.tests.engine.fake_device import token_of
from baton.tests.engine.rig import Rig
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

# Two families of prompts, so that most prompts share a prefix with others and lengths vary about block borders.
PROMPTS = st.builds(
    lambda family, length, tail: tuple((family * 3 + i) % 7 for i in range(length)) + tail,
    st.integers(0, 1),
    st.integers(0, 14),
    st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple),
)


class SchedulerMachine(RuleBasedStateMachine):
    """A worker's life: sequences come, are adopted, aborted, handed over, preempted and resumed; steps overlap and fail."""

    @initialize(
        num_blocks=st.integers(4, 16),
        block_size=st.integers(1, 4),
        max_step_tokens=st.integers(1, 24),
        max_num_seqs=st.integers(1, 6),
        max_in_flight=st.integers(1, 3),
        pipeline_stages=st.sampled_from((1, 1, 2, 3)),
        max_context=st.sampled_from((0, 0, 12)),
        phases_apart=st.booleans(),
        eager_pipeline=st.booleans(),
        return_preempted=st.booleans(),
        prefix_cache=st.booleans(),
        watermark=st.sampled_from((0.0, 0.2)),
        max_reported=st.sampled_from((1, 4, 256)),
        ordering=st.sampled_from(("fcfs", "shortest_prompt_first")),
    )
    def start(self, num_blocks: int, block_size: int, ordering: str, **config: object) -> None:
        self.rig = Rig(num_blocks, block_size, ordering, max_model_len=40, **config)
        self.num_requests = 0
        self.reserved: list[tuple[SequenceSpec, tuple[int, ...]]] = []
        self.quarantined: list[tuple[int, ...]] = []
        self.pushes: list[ComputedEvent] = []

    # ---- sequences come ------------------------------------------------------------------------

    def _spec(self, prompt: tuple[int, ...], max_tokens: int, output: int, **fields: object) -> SequenceSpec:
        self.num_requests += 1
        output = min(output, max_tokens - 1)
        return self.rig.spec(f"r{self.num_requests}", prompt, max_tokens, output, **fields)  # type: ignore[arg-type]

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 12),
        output=st.sampled_from((0, 0, 3)),
        hand_over=st.booleans(),
        priority=st.integers(0, 1),
        stop=st.sampled_from(((), (0,), (1, 2))),
        min_tokens=st.integers(0, 3),
        shaped=st.booleans(),
        reports=st.booleans(),
    )
    def add(self, prompt: tuple[int, ...], max_tokens: int, output: int, stop: tuple[int, ...], **fields: object) -> None:
        spec = self._spec(prompt, max_tokens, output, stop=() if output else stop, **fields)
        limit = min(len(prompt) + max_tokens, 40)
        longest = len(spec.known_tokens) if spec.hand_over else limit - 1
        try:
            self.rig.add(spec)
        except InvalidRequest:
            assert self.rig.pool.num_blocks_for(longest) > self.rig.pool.num_blocks
        else:
            assert self.rig.pool.num_blocks_for(longest) <= self.rig.pool.num_blocks

    @rule(
        prompts=st.lists(PROMPTS, min_size=2, max_size=5),
        max_tokens=st.integers(4, 12),
        handed_over=st.integers(0, 2),
        steps=st.integers(1, 20),
    )
    def burst(self, prompts: list[tuple[int, ...]], max_tokens: int, handed_over: int, steps: int) -> None:
        """Enough sequences at once to make memory short."""
        for index, prompt in enumerate(prompts):
            self.add(prompt, max_tokens, 0, stop=(), hand_over=len(prompts) - index <= handed_over, priority=0, min_tokens=0)
        self.steps(steps)

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(2, 12),
        output=st.integers(0, 2),
        head_room=st.integers(0, 1),
        shaped=st.booleans(),
    )
    def reserve_and_land(self, prompt: tuple[int, ...], max_tokens: int, output: int, head_room: int, shaped: bool) -> None:
        spec = self._spec(prompt, max_tokens, output, shaped=shaped, reports=shaped)
        spec = replace(spec, output=spec.output[: max_tokens - 2])  # one token is sampled elsewhere, one is left
        pool = self.rig.pool
        if pool.num_free >= pool.num_blocks_for(len(spec.known_tokens)) + head_room:
            self.reserved.append((spec, self.rig.land(spec, head_room)))

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        spec, blocks = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        try:
            self.rig.adopt(spec, blocks)
        except InvalidRequest:
            self.rig.pool.release(blocks)

    # ---- and go --------------------------------------------------------------------------------

    def _draw_attempt(self, data: st.DataObject) -> Attempt | None:
        return data.draw(st.sampled_from(sorted(self.rig.clients))) if self.rig.clients else None

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        attempt = self._draw_attempt(data)
        if attempt is not None:
            client = self.rig.clients[attempt]
            was_here = client.finish is None and not client.gone
            assert self.rig.abort(attempt) == was_here

    @rule(data=st.data())
    def hand_over_done(self, data: st.DataObject) -> None:
        self._hand_over(lambda held: data.draw(st.sampled_from(held)))

    @precondition(lambda self: self.reserved)
    @rule(quarantine=st.booleans())
    def ticket_expires(self, quarantine: bool) -> None:
        _, blocks = self.reserved.pop()
        num_held = sum(self.rig.pool.references(block) > 1 or block in self.rig.pool.snapshot().hashed for block in blocks)
        if quarantine:
            self.rig.pool.release(blocks[:num_held])
            self.rig.pool.quarantine(blocks[num_held:])
            self.quarantined.append(blocks[num_held:])
        else:
            self.rig.pool.release(blocks)

    @precondition(lambda self: self.quarantined)
    @rule()
    def writer_gone(self) -> None:
        self.rig.pool.end_quarantine(self.quarantined.pop())

    @rule(data=st.data())
    def push_starts(self, data: st.DataObject) -> None:
        """A push pins what a ComputedEvent named; the sequence may be aborted or released while it runs."""
        live = [c.computed for c in self.rig.clients.values() if c.computed and not c.gone and c.finish is None]
        if live:
            event = data.draw(st.sampled_from(live))
            self.rig.pool.retain(event.blocks)
            self.pushes.append(event)

    @precondition(lambda self: self.pushes)
    @rule()
    def push_ends(self) -> None:
        event = self.pushes.pop(0)
        self.rig.device.check_holds(event.attempt.request_id, event.blocks, event.num_tokens)
        self.rig.pool.release(event.blocks)

    # ---- steps ---------------------------------------------------------------------------------

    @rule()
    def plan(self) -> None:
        self.rig.plan()

    @rule()
    def run_one(self) -> None:
        self.rig.device.run_one()

    @precondition(lambda self: self.rig.in_flight)
    @rule()
    def commit(self) -> None:
        self.rig.commit()

    @rule(steps=st.integers(1, 8))
    def steps(self, steps: int) -> None:
        """Keep as many plans in flight as allowed, as an engine that plans ahead does."""
        for _ in range(steps):
            if self.rig.plan() is None and self.rig.in_flight:
                self.rig.commit()

    @precondition(lambda self: self.rig.in_flight)
    @rule()
    def device_fails(self) -> None:
        self.rig.fail()

    @precondition(lambda self: self.rig.preempted)
    @rule()
    def resume_preempted(self) -> None:
        self._resume()

    @invariant()
    def books_are_in_order(self) -> None:
        if hasattr(self, "rig"):
            self.rig.scheduler.check()

    # ---- the end -------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        while self.reserved:
            self.rig.pool.release(self.reserved.pop()[1])
        while self.quarantined:
            self.writer_gone()
        while self.pushes:
            self.push_ends()
        while True:
            self.rig.drain()
            self._hand_over(lambda held: held[0])
            if not self.rig.preempted and not self.rig.scheduler.num_held and not self.rig.scheduler.has_work:
                break
            while self.rig.preempted:
                self._resume()
        self.rig.assert_idle()
        for attempt, client in self.rig.clients.items():
            if not client.gone:
                self.rig.assert_finished(attempt)

    def _resume(self) -> None:
        """As the router does: a new attempt with the tokens that the client has."""
        old = self.rig.preempted.pop(0)
        attempt = Attempt(old.attempt.request_id, old.attempt.number + 1)
        self.rig.add(replace(old, attempt=attempt, output=tuple(self.rig.clients[old.attempt].output)))

    def _hand_over(self, choose) -> None:  # type: ignore[no-untyped-def]
        held = [
            attempt
            for attempt, client in self.rig.clients.items()
            if client.computed and client.computed.last and not client.gone
        ]
        assert len(held) == self.rig.scheduler.num_held
        if held:
            attempt = choose(held)
            spec, blocks = self.rig.clients[attempt].spec, self.rig.clients[attempt].computed.blocks
            self.rig.device.check_holds(attempt.request_id, blocks, len(spec.known_tokens))
            assert self.rig.clients[attempt].output[-1] == token_of(attempt.request_id, len(spec.output))
            self.rig.release(attempt)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
