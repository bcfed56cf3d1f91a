"""The scheduler of a simulated worker: it decides as the `Scheduler` that serves, without a look at every row of every step.

A simulated device samples the same token for every row, and nobody reads it. So sequences that decode are counted (`cohort`)
instead of planned one by one: a plan has rows for the others alone, and what a step costs does not grow with its decode rows.
Where it matters who comes first (blocks run out, not all fit into a step) the cohort is disbanded and the inherited
rules decide, row by row. Tests compare the two step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..core.errors import InternalError
from ..core.request import Attempt, SequenceSpec
from ..core.step import PreemptedEvent, RowOutput, SequenceEvent, StepOutput, StepPlan, StepRow, TokenEvent
from ..policy.ordering import Ordering, SortKey
from .batching import Batch, Batcher, Limits, turn
from .blocks import BlockPool
from .cohort import Cohort, Flight
from .committing import check_output
from .phases import Phases
from .scheduler import Scheduler, SchedulerConfig
from .sequence import SequenceInfo, SequenceState

REPORT_EVERY = 32  # output tokens of a counted sequence between two events


class CountingScheduler(Scheduler):
    """A `Scheduler` whose plans leave out rows that are only counted; all of these sample `token`.

    Of a counted sequence it reports output tokens whose number is a multiple of REPORT_EVERY, and the last one. It makes no plan
    ahead of a commit, but for pipeline stages.
    """

    def __init__(self, pool: BlockPool, config: SchedulerConfig, order: Ordering, token: int) -> None:
        self._token = token
        self._counted = RowOutput((token,))
        self._disturbed = False  # whether the next plan may differ because of what came or went
        self._flights: dict[int, tuple[Flight | None, int]] = {}  # by step: its cohort, and how many of its rows decode
        super().__init__(pool, replace(config, max_in_flight=1), order)

    def _make_parts(self, limits: Limits, prefix_cache: bool) -> tuple[Phases, Batcher]:
        phases = _Phases(self._pool, self._config.return_preempted)
        self._counts = _Counts(self._pool, phases, self._token)
        self._counting = _Batcher(self._pool, phases, limits, prefix_cache, self._preempted, self._counts)
        self._prefix_cache = prefix_cache
        return phases, self._counting

    # ---- what is here --------------------------------------------------------------------------

    def info(self, attempt: Attempt) -> SequenceInfo | None:
        self._refresh(attempt)
        return super().info(attempt)

    def num_output(self, attempt: Attempt) -> int | None:
        self._refresh(attempt)
        return super().num_output(attempt)

    @property
    def disturbed(self) -> bool:
        """Whether a sequence came or went, or a plan failed, since the latest plan."""
        return self._disturbed

    def counted(self, plan: StepPlan) -> tuple[int, int]:
        """Rows of `plan`, the newest, that are only counted, and the tokens that they attend to together."""
        flight, _ = self._flights[plan.step]
        return (0, 0) if flight is None else (len(flight.cohort), flight.cohort.context)

    # ---- sequences come and go -----------------------------------------------------------------

    def add(self, spec: SequenceSpec, now: float) -> None:
        super().add(spec, now)
        self._disturbed = True

    def adopt(self, spec: SequenceSpec, blocks: Sequence[int], first_token: int, now: float) -> None:
        super().adopt(spec, blocks, first_token, now)
        self._disturbed = True

    def abort(self, attempt: Attempt) -> bool:
        sequence = self._phases.get(attempt)
        if sequence is None:
            return False
        self._counts.leave(sequence)
        self._disturbed = True
        return super().abort(attempt)

    # ---- plan, commit --------------------------------------------------------------------------

    def commit(self, plan: StepPlan, output: StepOutput, now: float) -> list[SequenceEvent]:
        """`output` answers the rows of `plan`: nobody answers for those that are counted."""
        entry = self._oldest(plan)
        check_output(plan, entry.sequences, output)
        self._uncommitted.popleft()
        self._just_ended = {}
        flight, num_decodes = self._flights.pop(plan.step)
        rows = list(zip(entry.sequences, plan.rows, output.rows, strict=True))
        events: list[SequenceEvent] = []
        if flight is None:
            num_decodes = 0
        else:
            events += self._land(flight, rows[:num_decodes])
        for row in rows[num_decodes:]:
            events += self._commit_row(*row)
        return events

    def fail(self, plan: StepPlan) -> list[Attempt]:
        entry = self._oldest(plan)
        self._counts.disband()
        flight, _ = self._flights.pop(plan.step)
        if flight is not None:
            self._counts.settle(flight)
            entry.sequences += [sequence for sequence, _ in flight.left]
        self._disturbed = True
        return super().fail(plan)

    # ---- many decode steps at once ---------------------------------------------------------------

    def repeatable(self, plan: StepPlan) -> int:
        """How many steps in a row consist of this plan's rows, each one token further on, if no event comes: up to one that is
        the last of a sequence. Asked before `plan` is committed. At least 1: the plan itself."""
        if self._disturbed or plan.rows or len(self._uncommitted) != 1 or self._uncommitted[0].plan is not plan:
            return 1
        flight, _ = self._flights[plan.step]
        if flight is None or flight.left or not len(flight.cohort):
            return 1
        cohort, max_context = flight.cohort, self._config.max_context
        repeats = cohort.next_end()
        if max_context:
            if len(cohort) < self.num_running:
                return 1  # others take their turn
            repeats = min(repeats, max(1, (max_context - cohort.context) // len(cohort) + 1))
        if self._prefix_cache and self.num_waiting and self._has_seat:
            repeats = min(repeats, cohort.next_filled())  # somebody who waits might find it and start
        return 1 + cohort.steps_to_spare(repeats - 1)

    def advance(self, plan: StepPlan, steps: int) -> None:
        """Take in `steps` (below `repeatable`) recurrences of `plan`: as if they had been committed and planned again one by one.
        `plan` goes on standing for the step in flight."""
        flight, _ = self._flights[plan.step]
        if plan.rows or flight is None or flight.left or self._oldest(plan).plan is not self._uncommitted[-1].plan:
            raise InternalError(f"plan {plan.step} holds more than rows that are counted: it does not recur")
        if self._prefix_cache:
            for _ in range(steps):
                self._publish(flight.cohort)
                flight.cohort.go_on(1)
        else:
            flight.cohort.go_on(steps)
        self._step += steps
        self._just_ended = {}

    def next_report(self, plan: StepPlan, after: int) -> int:
        """Steps, that of `plan` as it stands the first of them, up to the first beyond `after` of which a token is to be
        reported."""
        flight, _ = self._flights[plan.step]
        return after + 1 if flight is None else flight.cohort.next_report(after)

    def reports(self, plan: StepPlan, number: int) -> list[tuple[Attempt, int]]:
        """Sequences of which a token of step `number` is to be reported, and how many output tokens they have after it. Steps are
        counted in the same way; one that was taken in already is 0 or below."""
        flight, _ = self._flights[plan.step]
        if flight is None:
            return []
        cohort = flight.cohort
        sequences = cohort.reported(1 - number)
        if len(sequences) > 1:
            sequences = sorted(sequences, key=_age)
        return [(each.spec.attempt, cohort.num_output(each) + number - 1) for each in sequences]

    # ---- inside --------------------------------------------------------------------------------

    def _form(self, batch: Batch) -> StepPlan | None:
        num_preempted = self._phases.num_preempted
        plan = super()._form(batch)
        # With the blocks of whom this plan preempted the next one may start somebody.
        self._disturbed = self._phases.num_preempted > num_preempted
        flight = self._counting.flight
        if plan is None and flight is not None:
            plan = StepPlan(batch.step, ())
        if plan is not None:
            self._flights[plan.step] = (flight, self._counting.num_decodes)
        return plan

    def _land(self, flight: Flight, rows: Sequence[tuple[SequenceState, StepRow, RowOutput]]) -> list[SequenceEvent]:
        """Commit the decode rows of a plan with a cohort in the order of age: those of `rows`, and those of members that are
        due, or were members."""
        cohort = flight.cohort
        due: list[tuple[SequenceState, StepRow | None, RowOutput]] = list(rows)
        if cohort.flight is flight:
            cohort.take_ended()
            self._counts.settle(flight)
            going_on = dict.fromkeys(cohort.reported())
            if self._prefix_cache:
                going_on |= dict.fromkeys(cohort.filled())
            due += [(sequence, None, self._counted) for sequence in going_on]
        due += [(sequence, row, self._counted) for sequence, row in flight.left]
        due.sort(key=lambda entry: entry[0].age_key)
        events: list[SequenceEvent] = []
        for sequence, row, answer in due:
            if row is not None:
                events += self._commit_row(sequence, row, answer)
                continue
            if self._prefix_cache:
                cohort.refresh(sequence)
                self._committer.publish(sequence, sequence.num_computed)
            if (num_output := cohort.num_output(sequence)) % REPORT_EVERY == 0:
                events.append(TokenEvent(sequence.spec.attempt, num_output - 1, self._counted.tokens))
        return events

    def _publish(self, cohort: Cohort) -> None:
        """As members whose blocks the step in flight fills would do when it commits."""
        for sequence in sorted(cohort.filled(), key=_age):
            cohort.refresh(sequence)
            self._committer.publish(sequence, sequence.num_planned)

    def _refresh(self, attempt: Attempt) -> None:
        sequence = self._phases.get(attempt)
        if sequence is not None:
            self._counts.refresh(sequence)

    def _sequences_in_flight(self) -> set[SequenceState]:
        left = {sequence for flight, _ in self._flights.values() if flight is not None for sequence, _ in flight.left}
        return super()._sequences_in_flight() | left


class _Phases(Phases):
    """loose: running sequences that nobody counts."""

    def __init__(self, pool: BlockPool, return_preempted: bool) -> None:
        super().__init__(pool, return_preempted)
        self.loose: dict[SequenceState, None] = {}

    def adopt(self, sequence: SequenceState) -> None:
        super().adopt(sequence)
        self.loose[sequence] = None

    def start(self, sequence: SequenceState, blocks: tuple[int, ...]) -> None:
        super().start(sequence, blocks)
        self.loose[sequence] = None

    def hold(self, sequence: SequenceState) -> None:
        self.loose.pop(sequence, None)
        super().hold(sequence)

    def preempt(self, sequence: SequenceState) -> PreemptedEvent | None:
        self.loose.pop(sequence, None)
        return super().preempt(sequence)

    def end(self, sequence: SequenceState) -> None:
        self.loose.pop(sequence, None)
        super().end(sequence)


class _Counts:
    """All cohorts of a scheduler: one that is idle at most when a plan has been made, and one in each uncommitted plan."""

    def __init__(self, pool: BlockPool, phases: _Phases, token: int) -> None:
        self._pool = pool
        self._phases = phases
        self._token = token
        self._idle: list[Cohort] = []
        self._flying: list[Cohort] = []

    def idle(self) -> Cohort:
        """All that can go on now, as one."""
        if not self._idle:
            self._idle.append(Cohort(self._pool, self._token, REPORT_EVERY))
        self._idle.sort(key=len)
        while len(self._idle) > 1:
            smaller = self._idle.pop(0)
            self._idle[-1].join(smaller.disband())
        return self._idle[0]

    def fly(self, cohort: Cohort, step: int) -> Flight:
        """An idle cohort has a step in flight from now on."""
        self._idle.remove(cohort)
        self._flying.append(cohort)
        return cohort.plan(step)

    def settle(self, flight: Flight) -> None:
        """The step of its cohort has been committed."""
        cohort = flight.cohort
        if cohort.flight is flight:
            cohort.flight = None
            self._flying.remove(cohort)
            if len(cohort):
                self._idle.append(cohort)

    def refresh(self, sequence: SequenceState) -> None:
        for cohort in (*self._idle, *self._flying):
            if sequence in cohort:
                cohort.refresh(sequence)

    def leave(self, sequence: SequenceState) -> None:
        """A sequence is not counted any more, if it was."""
        for cohort in (*self._idle, *self._flying):
            if sequence in cohort:
                cohort.leave(sequence)
                self._phases.loose[sequence] = None

    def disband(self) -> None:
        """No sequence is counted any more."""
        for cohort in (*self._idle, *self._flying):
            self._phases.loose |= dict.fromkeys(cohort.disband())


class _Batcher(Batcher):
    """Fills batches as its base does. flight: what is counted of the latest one; num_decodes: its rows, of any kind of decode."""

    def __init__(
        self,
        pool: BlockPool,
        phases: _Phases,
        limits: Limits,
        prefix_cache: bool,
        preempted: list[PreemptedEvent],
        counts: _Counts,
    ) -> None:
        super().__init__(pool, phases, limits, prefix_cache, preempted)
        self._loose = phases.loose
        self._counts = counts
        self.flight: Flight | None = None
        self.num_decodes = 0

    def fill(self, batch: Batch) -> None:
        self.flight, self.num_decodes = None, 0
        super().fill(batch)

    def _add_decodes(self, batch: Batch) -> list[SequenceState]:
        if self._max_context and self._known_only:
            return super()._add_decodes(batch)  # taking turns in several stages: too rare to be counted
        begun: list[SequenceState] = []
        ready: list[SequenceState] = []
        others: list[SequenceState] = []  # decode a token that was not sampled here, or with a rule that looks at it
        for sequence in sorted(self._loose, key=_age):
            if sequence.num_placeholders == 0:
                (begun if sequence.num_remaining > 1 else ready if _is_plain(sequence) else others).append(sequence)
        cohort = self._counts.idle()
        if not self._have_place(batch, cohort, ready, others):
            self._counts.disband()
            return super()._add_decodes(batch)
        cohort.join(sorted(ready, key=turn) if self._max_context else ready)
        for sequence in ready:
            del self._loose[sequence]
        if not self._have_room(cohort, others):
            self._counts.disband()
            return super()._add_decodes(batch)
        for sequence in others:
            if self._make_room(sequence, 1):
                batch.add_next(sequence)
        self.num_decodes = len(batch.rows)
        if len(cohort):
            batch.budget -= len(cohort)
            batch.seats -= len(cohort)
            self.flight = self._counts.fly(cohort, batch.step)
        for sequence in ready:
            if sequence.first_scheduled is None:
                sequence.first_scheduled = batch.now
        return begun

    def _have_place(self, batch: Batch, cohort: Cohort, ready: list[SequenceState], others: list[SequenceState]) -> bool:
        """Leave out whoever does not fit into the batch. Returns False when they have to take turns."""
        num_rows = len(cohort) + len(ready) + len(others)
        most = min(batch.budget, batch.seats, -(-len(self._phases.running) // self._shares))
        if self._max_context:
            context = cohort.context + sum(sequence.num_planned for sequence in ready) + num_rows
            return num_rows <= most and not others and (num_rows <= 1 or context <= self._max_context)
        if num_rows > most:
            self._leave_out(most, cohort, ready, others)
        return True

    def _leave_out(self, most: int, cohort: Cohort, ready: list[SequenceState], others: list[SequenceState]) -> None:
        """Whoever is not among the `most` who came first."""
        new = sorted([*ready, *others], key=_age)
        if new and len(cohort) <= most and not cohort.may_precede(new[0]):
            chosen = set(new[: most - len(cohort)])
        else:
            chosen = set(sorted([*cohort, *new], key=_age)[:most])
            for sequence in [sequence for sequence in cohort if sequence not in chosen]:
                self._counts.leave(sequence)
        ready[:] = [sequence for sequence in ready if sequence in chosen]
        others[:] = [sequence for sequence in others if sequence in chosen]

    def _have_room(self, cohort: Cohort, others: list[SequenceState]) -> bool:
        """Whether there are blocks for all of them."""
        full = sum(sequence.num_planned == len(sequence.blocks) * self._pool.block_size for sequence in others)
        return cohort.growth + full <= self._pool.num_free

    def _make_room(self, sequence: SequenceState, num_tokens: int) -> bool:
        missing = self._pool.num_blocks_for(sequence.num_planned + num_tokens) - len(sequence.blocks)
        if missing > self._pool.num_free:
            self._counts.disband()  # somebody has to give way
        return super()._make_room(sequence, num_tokens)


def _is_plain(sequence: SequenceState) -> bool:
    """Whether it feeds a token that was sampled here (or came with its KV), and only its length ends it."""
    spec = sequence.spec
    return not (spec.hand_over or sequence.has_needs or spec.sampling.stop_token_ids or sequence.num_planned < sequence.num_given)


def _age(sequence: SequenceState) -> SortKey:
    return sequence.age_key
