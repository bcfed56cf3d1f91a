"""The engine's loop of one worker in virtual time: plan, price, commit.

With a scheduler that counts, decode steps that recur are taken many at a time: it says how often, and whatever happens to the
worker meanwhile first sees the state that single steps would have left, and may cut the run short. No decision is different.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.request import Attempt
from ..core.shape import StepShape, shape_of
from ..core.step import RowOutput, SequenceEvent, StepOutput, StepPlan
from ..engine.counting import CountingScheduler
from ..engine.scheduler import Scheduler
from ..engine.timing import StepTimes
from .cost import series
from .heap import EventHeap
from .meter import Meter
from .pipeline import Pipeline
from .setup import PoolSetup
from .timeline import Timeline
from .tokens import SAMPLED

_SAMPLED = RowOutput((SAMPLED,))
_NOTHING = RowOutput()


class Owner(Protocol):
    """The worker around a device."""

    @property
    def num_used(self) -> int:
        """Blocks that hold something that cannot be evicted."""
        ...

    @property
    def num_waiting(self) -> int:
        """Sequences and reservations that hold no blocks."""
        ...

    def on_events(self, events: Sequence[SequenceEvent]) -> None:
        """What a step, or the planning of one, made."""
        ...

    def on_progress(self, reached: Sequence[tuple[Attempt, int]]) -> None:
        """Sequences that have so many output tokens, which are to be reported in the midst of a run."""
        ...

    def may_repeat(self) -> bool:
        """Whether decode steps may be taken many at a time: nobody looks at every single one."""
        ...


@dataclass(slots=True, eq=False)
class _Step:
    """A plan under way: `steps` recurrences of it one after the other, of which `done` are taken in. `shape` is that of the
    first."""

    plan: StepPlan
    shape: StepShape
    began: float
    seconds: float
    ends: float
    steps: int = 1
    done: int = 0


class Device:
    """Runs the plans of one scheduler until it is stopped."""

    def __init__(
        self,
        heap: EventHeap,
        scheduler: Scheduler,
        setup: PoolSetup,
        owner: Owner,
        meter: Meter,
        track: tuple[Timeline, str] | None,
    ) -> None:
        self._times = StepTimes()  # in seconds of one stage
        self.step = 0
        self._heap = heap
        self._scheduler = scheduler
        self._cost = setup.cost
        self._overhead = setup.overhead
        self._token_overhead = setup.token_overhead
        self._owner = owner
        self._meter = meter
        self._counting = scheduler if isinstance(scheduler, CountingScheduler) else None
        self._track = track
        self._pipeline = Pipeline(setup.cost.stages)
        self._max_under_way = sys.maxsize if setup.eager_pipeline and setup.cost.stages > 1 else setup.cost.stages
        self._under_way: deque[_Step] = deque()
        self._woken = False
        self._stopped = False
        self._used_before = 0  # blocks, at the last `sync` of a run
        self._warm_up(min(setup.max_step_tokens, setup.max_model_len))

    @property
    def in_step(self) -> bool:
        return bool(self._under_way)

    @property
    def prefill_rate(self) -> float:
        """Tokens per second of recent prefill work: a pipeline takes in the next prompt when its first stage is free."""
        return self._times.prefill_rate

    @property
    def decode_step(self) -> float:
        """Seconds of a recent decode step, all stages of it."""
        return self._times.decode_step * self._pipeline.stages

    @property
    def predicted_step(self) -> float:
        """Seconds that the running step (or the next one) is expected to take."""
        times, stages = self._times, self._pipeline.stages
        if not self._under_way:
            return max(times.decode_step, times.last_step) * stages
        shape = self._under_way[0].shape
        if not shape.prefill_rows:
            return times.decode_step * stages
        return (times.decode_step + shape.num_tokens / times.prefill_rate) * stages

    def wake(self) -> None:
        """New work may exist. It is planned once everything that happens at this moment has happened."""
        if not self._woken and len(self._under_way) < self._max_under_way:
            self._woken = True
            self._heap.push(max(self._heap.now, self._pipeline.enters_at), self._plan_next)

    def stop(self) -> None:
        """The worker is dead: nothing under way will ever end."""
        self._stopped = True
        self._under_way.clear()

    # ---- runs of recurring steps ---------------------------------------------------------------

    def sync(self) -> None:
        """Take in the steps of a run that have ended by now. Precedes everything that happens to the worker."""
        if not self._under_way or (run := self._under_way[0]).steps == 1:
            return
        self._take_ended(run)
        self._used_before = self._owner.num_used

    def settle(self) -> None:
        """Something has happened, after `sync`: the run ends with its running step if others are to follow it."""
        if not self._under_way or (run := self._under_way[0]).steps - run.done == 1:
            return
        used = self._owner.num_used
        if used == self._used_before and not self._runs.disturbed and self._owner.may_repeat():
            return
        # The scheduler knows what came and went, but not that somebody else gave blocks back which a waiting sequence needs.
        may_start = self._scheduler.num_waiting > 0 and used < self._used_before
        repeats = 1 if may_start or not self._owner.may_repeat() else self._runs.repeatable(run.plan)
        if run.done + repeats < run.steps:
            self._set_length(run, run.done + repeats)

    def _take_ended(self, run: _Step) -> None:
        elapsed = self._heap.now - run.began
        last = run.steps - 1  # the last one is taken in when its time comes
        # Steps of a run take nearly the same time each: a guess by proportion is hardly ever wrong by more than one.
        done = min(last, max(run.done, int(run.steps * elapsed / (run.ends - run.began))))
        while done < last and self._run_seconds(run, done + 1) <= elapsed:
            done += 1
        while done > run.done and self._run_seconds(run, done) > elapsed:
            done -= 1
        if done > run.done:
            self._runs.advance(run.plan, done - run.done)
            self._account(run, done)

    def _set_length(self, run: _Step, steps: int) -> None:
        run.steps = steps
        run.ends = run.began + (self._run_seconds(run, steps) if steps > 1 else run.seconds + self._host_seconds(run.shape))
        self._heap.push(run.ends, self._end_step, run, steps)

    def _run_seconds(self, run: _Step, steps: int) -> float:
        """From the beginning of the run to the end of its first `steps` steps."""
        rows, context = run.shape.decode_rows, run.shape.decode_context
        host = steps * self._overhead + self._token_overhead * series(rows, context, steps)
        return self._cost.decode_seconds(rows, context, steps) + host

    def _host_seconds(self, shape: StepShape) -> float:
        return self._overhead + self._token_overhead * (shape.prefill_context + shape.decode_context)

    def _await_report(self, run: _Step, after: int) -> None:
        """See to it that the router hears in time of tokens in the midst of a run, beyond its first `after` steps."""
        if after + 1 < run.steps:
            number = run.done + self._runs.next_report(run.plan, after - run.done)
            if number < run.steps:
                self._heap.push(run.began + self._run_seconds(run, number), self._report, run, number)

    def _report(self, run: _Step, number: int) -> None:
        """The `number`-th step of a run is over."""
        if not self._under_way or self._under_way[0] is not run or number >= run.steps:
            return  # the run was cut: its last step reports like any other
        self._owner.on_progress(self._runs.reports(run.plan, number - run.done))
        self._await_report(run, number)

    # ---- single steps --------------------------------------------------------------------------

    def _plan_next(self) -> None:
        """Start whatever can start now."""
        self._woken = False
        now = self._heap.now
        self._meter.reached(now, self._owner.num_used)
        while not self._stopped and len(self._under_way) < self._max_under_way and self._pipeline.enters_at <= now:
            plan = self._scheduler.plan(now)
            if events := self._scheduler.take_events():
                self._owner.on_events(events)
            elif plan is None:
                break
            if plan is not None:
                self._begin(plan, now)
        self._meter.goes_on(self._owner.num_used, self._owner.num_waiting)

    def _begin(self, plan: StepPlan, now: float) -> None:
        shape = shape_of(plan)
        if self._counting is not None:
            shape = shape.with_decodes(*self._counting.counted(plan))
        seconds = self._cost.seconds(shape)
        step = _Step(plan, shape, now, seconds, now)
        self._under_way.append(step)
        self.step = plan.step
        if self._pipeline.stages > 1:
            step.ends = self._pipeline.enter(now, seconds, self._host_seconds(shape))
            self._heap.push(step.ends, self._end_step, step, 1)
            self._heap.push(self._pipeline.enters_at, self._plan_next)
            return
        repeats = 1
        if self._counting is not None and self._owner.may_repeat():
            repeats = self._counting.repeatable(plan)
        self._set_length(step, repeats)
        self._await_report(step, 0)

    def _end_step(self, step: _Step, steps: int) -> None:
        if not self._under_way or self._under_way[0] is not step or step.steps != steps:
            return
        plan = step.plan
        if step.done < steps - 1:
            self._runs.advance(plan, steps - 1 - step.done)
        self._meter.reached(self._heap.now, self._owner.num_used)
        rows = tuple([_SAMPLED if row.sample else _NOTHING for row in plan.rows])
        events = self._scheduler.commit(plan, StepOutput(plan.step, rows, step.seconds), self._heap.now)
        self._under_way.popleft()
        self._account(step, steps)
        self._woken = True  # planned below, whatever the owner makes of the news
        self._owner.on_events(events)
        self._plan_next()

    @property
    def _runs(self) -> CountingScheduler:
        """The scheduler where steps are taken many at a time: no other lets a plan recur."""
        assert self._counting is not None
        return self._counting

    # ---- books ---------------------------------------------------------------------------------

    def _account(self, step: _Step, done: int) -> None:
        """Steps up to the `done`-th have ended."""
        shape, before = step.shape, step.done
        count = done - before
        step.done = done
        if shape.prefill_rows:
            self._times.observe_prefill(shape.num_tokens, step.seconds)
            seconds = step.seconds
        elif done == 1:
            self._times.observe_decode(step.seconds, step.seconds, 1)
            seconds = step.seconds
        else:
            begin, end = self._decode_seconds(shape, before), self._decode_seconds(shape, done)
            seconds = first = last = end - begin
            if count > 1:
                first = self._decode_seconds(shape, before + 1) - begin
                last = end - self._decode_seconds(shape, done - 1)
            self._times.observe_decode(first, last, count)
        self.step = max(self.step, step.plan.step + min(done, step.steps - 1))
        self._meter.steps(count, seconds, count * shape.num_tokens, shape.decode_rows)
        if self._track is not None:
            self._draw(step, before, done)

    def _decode_seconds(self, shape: StepShape, steps: int) -> float:
        return self._cost.decode_seconds(shape.decode_rows, shape.decode_context, steps) if steps else 0.0

    def _draw(self, step: _Step, before: int, done: int) -> None:
        assert self._track is not None
        timeline, name = self._track
        shape = step.shape
        kind = "decode" if not shape.prefill_rows else "mixed" if shape.decode_rows else "prefill"
        begin = step.began + (self._run_seconds(step, before) if before else 0.0)
        end = step.began + self._run_seconds(step, done) if step.steps > 1 else step.ends
        timeline.span(name, kind, begin, end, steps=done - before, rows=len(step.plan.rows), tokens=shape.num_tokens)

    def _warm_up(self, num_tokens: int) -> None:
        """A worker has run a prompt and a decode step before it joins."""
        prompt = StepShape(1, num_tokens, num_tokens * (num_tokens + 1) // 2, num_tokens, sampled=1)
        decode = StepShape(decode_rows=1, decode_context=num_tokens, sampled=1)
        self._times.observe_prefill(num_tokens, self._cost.seconds(prompt))
        self._times.observe_decode(self._cost.seconds(decode), self._cost.seconds(decode), 1)
