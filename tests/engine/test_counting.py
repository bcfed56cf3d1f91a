"""`CountingScheduler` against the `Scheduler` that serves: the same decisions at every step, one by one and many at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from baton.core.errors import InternalError
from baton.core.request import Attempt, SamplingParams, SequenceSpec
from baton.core.step import ComputedEvent, RowOutput, SequenceEvent, StepOutput, StepPlan, TokenEvent
from baton.engine.blocks import BlockPool
from baton.engine.counting import REPORT_EVERY, CountingScheduler
from baton.engine.scheduler import Scheduler, SchedulerConfig
from baton.policy.ordering import ORDERING
from hypothesis import given, settings
from hypothesis import strategies as st

TOKEN = 5  # what every step samples; some prompts are made of it, so that prefixes may meet


def spec(name: str, prompt: Sequence[int], max_tokens: int, at: float = 0.0, **fields: object) -> SequenceSpec:
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=fields.pop("stop", ()))  # type: ignore[arg-type]
    return SequenceSpec(Attempt(name, 1), tuple(prompt), sampling, arrival=at, **fields)  # type: ignore[arg-type]


class Worker:
    """One scheduler and what is in flight of it."""

    def __init__(self, counting: bool, num_blocks: int = 64, block_size: int = 4, **config: object) -> None:
        defaults: dict[str, object] = {"max_step_tokens": 64, "max_num_seqs": 8, "max_model_len": 400, "watermark": 0.0}
        self.config = SchedulerConfig(**(defaults | {"max_in_flight": 1} | config))  # type: ignore[arg-type]
        self.pool = BlockPool(num_blocks, block_size, self.config.prefix_cache)
        order = ORDERING["fcfs"]
        self.scheduler = (
            CountingScheduler(self.pool, self.config, order, TOKEN) if counting else Scheduler(self.pool, self.config, order)
        )
        self.in_flight: deque[StepPlan] = deque()

    def adopt(self, sequence: SequenceSpec, head_room: int = 1) -> bool:
        blocks = self.pool.allocate(self.pool.num_blocks_for(len(sequence.known_tokens)) + head_room)
        if blocks is not None:
            self.scheduler.adopt(sequence, blocks, TOKEN, 0.0)
        return blocks is not None

    def plan(self) -> tuple[int, int, int] | None:
        """Rows, tokens and context of the next plan."""
        plan = self.scheduler.plan(0.0)
        if plan is None:
            return None
        self.in_flight.append(plan)
        rows, context = self.scheduler.counted(plan) if isinstance(self.scheduler, CountingScheduler) else (0, 0)
        return rows + len(plan.rows), rows + plan.num_tokens, context + sum(row.end for row in plan.rows)

    def commit(self) -> list[SequenceEvent]:
        plan = self.in_flight.popleft()
        rows = tuple(RowOutput((TOKEN,)) if row.sample else RowOutput() for row in plan.rows)
        return self.scheduler.commit(plan, StepOutput(plan.step, rows), 0.0)


def news(events: list[SequenceEvent]) -> list[SequenceEvent]:
    """Without tokens that are neither the first nor the last of a sequence, nor to be reported. Which blocks is free."""
    few = [event for event in events if not isinstance(event, TokenEvent) or _is_news(event)]
    return [replace(event, blocks=(0,) * len(event.blocks)) if isinstance(event, ComputedEvent) else event for event in few]


def _is_news(event: TokenEvent) -> bool:
    return event.finish is not None or event.position == 0 or (event.position + 1) % REPORT_EVERY == 0


@dataclass
class Twins:
    """The two of them, given the same."""

    counting: Worker
    single: Worker
    names: list[Attempt]

    def check(self, in_order: bool) -> None:
        """They are in the same state."""
        counting, single = self.counting.scheduler, self.single.scheduler
        for scheduler in (counting, single):
            scheduler.check()
        assert counting.num_running == single.num_running
        assert counting.num_waiting == single.num_waiting
        assert counting.num_held == single.num_held
        assert counting.queued_tokens == single.queued_tokens
        assert counting.has_work == single.has_work
        assert self.counting.pool.num_free == self.single.pool.num_free
        assert self.counting.pool.num_cached == self.single.pool.num_cached
        if not in_order:
            return
        for name in self.names:
            assert counting.info(name) == single.info(name)
            assert counting.num_output(name) == single.num_output(name)

    def plan(self) -> bool:
        made = self.counting.plan()
        assert made == self.single.plan()
        assert self.counting.scheduler.take_events() == self.single.scheduler.take_events()
        return made is not None

    def commit(self) -> None:
        few, all_of_them = self.counting.commit(), self.single.commit()
        assert news(few) == news(all_of_them)
        assert len(few) <= len(all_of_them)
        for event in few:
            if isinstance(event, TokenEvent):
                assert self.counting.scheduler.info(event.attempt) == self.single.scheduler.info(event.attempt)


LIVES = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 50)),
        st.tuples(st.just("adopt"), st.integers(1, 30), st.integers(2, 50)),
        st.tuples(st.just("hand over"), st.integers(1, 30), st.integers(2, 9)),
        st.tuples(st.just("resume"), st.integers(2, 30), st.integers(4, 50)),
        st.tuples(st.just("stop token"), st.integers(1, 30), st.integers(1, 9)),
        st.tuples(st.just("abort"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("steps"), st.integers(1, 40), st.integers(0, 1)),
        st.tuples(st.just("look"), st.just(0), st.just(0)),
    ),
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(
    lives=LIVES,
    num_blocks=st.sampled_from((14, 24, 200)),
    stages=st.sampled_from((1, 1, 2, 3)),
    max_num_seqs=st.sampled_from((2, 5, 30)),
    max_context=st.sampled_from((0, 0, 60)),
    phases_apart=st.booleans(),
    eager_pipeline=st.booleans(),
    prefix_cache=st.booleans(),
    return_preempted=st.booleans(),
)
def test_every_step_is_the_same(lives: list[tuple[str, int, int]], num_blocks: int, stages: int, **config: object) -> None:
    config |= {"pipeline_stages": stages, "max_step_tokens": 40}
    twins = Twins(Worker(True, num_blocks, **config), Worker(False, num_blocks, **config), [])
    for number, (act, first, second) in enumerate(lives):
        _live(twins, number, act, first, second)
        twins.check(in_order=act == "look")
    for _ in range(5000):
        if twins.single.in_flight:
            twins.commit()
        elif not twins.plan():
            break
    else:
        pytest.fail("it never ends")
    twins.check(in_order=True)


def _live(twins: Twins, number: int, act: str, first: int, second: int) -> None:
    workers = (twins.counting, twins.single)
    prompt = (TOKEN if number % 3 else 1,) * first
    if act in ("add", "hand over", "resume", "stop token"):
        fields = {"hand_over": act == "hand over", "stop": (9,) if act == "stop token" else ()}
        new = spec(f"s{number}", prompt, second, float(number), **fields, output=(TOKEN, TOKEN) if act == "resume" else ())
        longest = len(new.known_tokens) if act == "hand over" else first + second
        if twins.single.pool.num_blocks_for(longest) <= twins.single.pool.num_blocks:
            for worker in workers:
                worker.scheduler.add(new, 0.0)
            twins.names.append(new.attempt)
    elif act == "adopt" and twins.single.pool.num_blocks_for(first + second) <= twins.single.pool.num_blocks:
        new = spec(f"s{number}", prompt, second, float(number))
        taken = [worker.adopt(new) for worker in workers]
        assert taken[0] == taken[1]
        twins.names += [new.attempt] * taken[0]
    elif act == "abort" and twins.names:
        name = twins.names[first % len(twins.names)]
        assert twins.counting.scheduler.abort(name) == twins.single.scheduler.abort(name)
    elif act == "steps":
        for _ in range(first):
            room = len(twins.single.in_flight) < twins.single.config.pipeline_stages + second
            if not (room and twins.plan()) and twins.single.in_flight:
                twins.commit()


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 20), st.integers(2, 90), st.integers(1, 2)), min_size=1, max_size=6),
    num_blocks=st.integers(28, 60),
    prefix_cache=st.booleans(),
    max_context=st.sampled_from((0, 0, 150)),
    waiting=st.booleans(),
    share=st.floats(0, 1),
)
def test_many_steps_at_once_leave_what_single_steps_leave(
    prompts: list[tuple[int, int, int]], num_blocks: int, prefix_cache: bool, max_context: int, waiting: bool, share: float
) -> None:
    config = {"return_preempted": True, "prefix_cache": prefix_cache, "max_context": max_context}
    many, single = Worker(True, num_blocks, **config), Worker(False, num_blocks, **config)
    assert isinstance(many.scheduler, CountingScheduler)
    for index, (length, max_tokens, kind) in enumerate(prompts):
        assert many.adopt(spec(f"s{index}", (TOKEN if kind == 2 else kind,) * length, max_tokens)) == single.adopt(
            spec(f"s{index}", (TOKEN if kind == 2 else kind,) * length, max_tokens)
        )
    if waiting:
        for worker in (many, single):
            worker.scheduler.add(spec("w", (TOKEN,) * 90, 5, 1.0), 0.0)
    for _ in range(1000):
        made = many.plan()
        assert made == single.plan()
        assert many.scheduler.take_events() == single.scheduler.take_events()
        if made is None:
            break
        plan = many.in_flight[0]
        ahead = round(share * (many.scheduler.repeatable(plan) - 1))
        many.scheduler.advance(plan, ahead) if ahead else None
        for done in range(ahead):
            told = news(single.commit())
            assert all(isinstance(event, TokenEvent) and event.finish is None for event in told)
            reached = [(event.attempt, event.position + 1) for event in told if isinstance(event, TokenEvent)]
            if max_context:  # rows in turn: nobody minds in which order their events come
                reached.sort()
            assert reached == many.scheduler.reports(plan, 1 + done - ahead)
            again = single.plan()
            assert again is not None
            assert again[0] == made[0]
        assert many.pool.num_free == single.pool.num_free
        many.scheduler.check()
        for index in range(len(prompts)):
            name = Attempt(f"s{index}", 1)
            assert many.scheduler.info(name) == single.scheduler.info(name)
            assert many.scheduler.num_output(name) == single.scheduler.num_output(name)
        few, all_of_them = news(many.commit()), news(single.commit())
        if max_context:  # rows in turn: nobody minds in which order their events come
            few, all_of_them = sorted(few, key=str), sorted(all_of_them, key=str)
        assert few == all_of_them
    assert not many.scheduler.has_work


# ---- how often a plan recurs ----------------------------------------------------------------------------


def counting(worker: Worker) -> CountingScheduler:
    assert isinstance(worker.scheduler, CountingScheduler)
    return worker.scheduler


def repeats(worker: Worker) -> int:
    worker.plan()
    return counting(worker).repeatable(worker.in_flight[-1])


def test_decode_recurs_until_the_first_sequence_ends_by_length() -> None:
    worker = Worker(True)
    worker.adopt(spec("a", range(5), 20))
    worker.adopt(spec("b", [6] * 5, 9))
    assert repeats(worker) == 8


def test_what_is_to_be_reported_in_the_midst_of_a_run_is_known() -> None:
    worker = Worker(True)
    worker.adopt(spec("a", range(5), 90))
    assert repeats(worker) == 89
    plan = worker.in_flight[0]
    assert counting(worker).next_report(plan, 0) == REPORT_EVERY - 1  # one token was there
    report = (Attempt("a", 1), REPORT_EVERY)
    assert counting(worker).reports(plan, REPORT_EVERY - 1) == [report]
    counting(worker).advance(plan, REPORT_EVERY + 3)
    assert counting(worker).reports(plan, -4) == [report]
    assert counting(worker).reports(plan, -3) == []
    assert counting(worker).next_report(plan, 0) == REPORT_EVERY - 4
    assert counting(worker).next_report(plan, REPORT_EVERY - 4) == 2 * REPORT_EVERY - 4


def test_decode_recurs_until_the_pool_is_exhausted() -> None:
    worker = Worker(True, num_blocks=6)
    worker.adopt(spec("a", range(5), 15))
    worker.adopt(spec("b", [6] * 5, 15))
    assert repeats(worker) == 7  # three blocks each hold 12 tokens, 5 are there


@pytest.mark.parametrize(
    "other", [spec("p", range(5), 2), spec("h", range(5), 2, hand_over=True), spec("s", range(5), 9, stop=(1,))]
)
def test_a_plan_with_rows_that_are_looked_at_does_not_recur(other: SequenceSpec) -> None:
    worker = Worker(True)
    worker.adopt(spec("a", range(5), 20))
    worker.scheduler.add(other, 0.0)
    assert repeats(worker) == 1
    with pytest.raises(InternalError, match="does not recur"):
        counting(worker).advance(worker.in_flight[0], 1)


def test_a_forecast_ends_where_a_waiting_sequence_may_find_a_new_prefix() -> None:
    worker = Worker(True, num_blocks=5)
    worker.adopt(spec("a", [TOKEN] * 5, 6))
    worker.scheduler.add(spec("head", [*[TOKEN] * 8, *[6] * 8], 1, 1.0), 0.0)  # the second block of it is full soon
    assert repeats(worker) == 3
    worker.commit()


def test_news_since_the_plan_end_the_forecast() -> None:
    worker = Worker(True)
    worker.adopt(spec("a", range(5), 20))
    assert repeats(worker) == 19
    worker.scheduler.add(spec("b", range(5), 3), 0.0)
    assert counting(worker).repeatable(worker.in_flight[0]) == 1


def test_a_plan_cannot_be_advanced_beyond_its_blocks() -> None:
    worker = Worker(True, num_blocks=8)
    worker.adopt(spec("a", range(5), 20), 2)
    worker.adopt(spec("b", [6] * 5, 20), 2)
    with pytest.raises(InternalError, match="cannot grow"):
        counting(worker).advance(worker.in_flight[0], repeats(worker)) if worker.plan() else None


def test_a_failed_step_gives_up_whoever_was_counted_in_it() -> None:
    worker = Worker(True)
    worker.adopt(spec("a", range(5), 20))
    worker.plan()
    assert worker.scheduler.fail(worker.in_flight.popleft()) == [Attempt("a", 1)]
    worker.scheduler.check()
    assert not worker.scheduler.has_work
    assert worker.pool.num_free == worker.pool.num_blocks
