"""Sequences that decode together, one token each per step, without anybody looking at each of them.

From step to step nothing about such a sequence changes but that everything grows by one. So a cohort counts its steps, and
keeps of every member only by how much it is ahead of that count and at which counts something is due: another block, a report,
the end. What a sequence's own fields say is stale meanwhile: `refresh` and `leave` bring them up to date. A step
costs as much as what is due at it, however many members there are.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from ..core.errors import InternalError
from ..core.step import StepRow
from ..policy.ordering import SortKey
from .blocks import BlockPool
from .sequence import SequenceState


@dataclass(slots=True, eq=False)
class Flight:
    """A step of a cohort that is not committed. left: members that left meanwhile, with the rows that they have in it."""

    cohort: Cohort
    left: list[tuple[SequenceState, StepRow]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Member:
    """Everything in steps of the cohort's clock.

    offset   its planned tokens, less the clock
    grows_at when its blocks are full: that step, and every block's size of steps later, needs another block
    ends_at  the step whose token is its last
    rank     its place among the rows, ascending
    """

    sequence: SequenceState
    offset: int
    grows_at: int
    ends_at: int
    rank: int


class Cohort:
    """Members, and when what is due. `token` is what every step samples for each of them; output tokens whose number is a
    multiple of `report_every` are to be reported."""

    def __init__(self, pool: BlockPool, token: int, report_every: int) -> None:
        self.clock = 0  # steps planned
        self.flight: Flight | None = None  # the step that is not committed
        self.context = 0  # planned tokens of all members together
        self._pool = pool
        self._token = token
        self._members: dict[SequenceState, _Member] = {}
        self._reports = _Ring(report_every)
        self._filled = _Ring(pool.block_size)  # whose blocks are full after a step
        self._growing = [0] * pool.block_size  # members whose blocks are full before it
        self._to_grow: dict[int, int] = {}  # by clock: members who will be among them from then on
        self._ends: list[tuple[int, int, _Member]] = []  # a heap; who left is left in it
        self._spare: list[int] = []  # blocks of members who have not been told of them
        self._ranks = (0, 0)  # the first one's, and the one behind the last
        self._youngest: SortKey | None = None  # of the ages of all who ever joined
        self._num_joined = 0
        self._last_step = 0

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: SequenceState) -> bool:
        return sequence in self._members

    def __iter__(self) -> Iterator[SequenceState]:
        return iter(self._members)

    def num_output(self, sequence: SequenceState) -> int:
        """Output tokens of a member, that of a step in flight among them."""
        return self._members[sequence].offset + self.clock + 1 - len(sequence.spec.prompt)

    def may_precede(self, sequence: SequenceState) -> bool:
        """False when every member is older than `sequence` for certain."""
        return self._youngest is None or sequence.age_key < self._youngest

    # ---- members come and go ---------------------------------------------------------------------

    def join(self, sequences: Sequence[SequenceState]) -> None:
        """Sequences that decode and have no row in flight become members. Among the rows those go before all others whose turn
        it is sooner, in the order given, the rest behind them."""
        sooner = [sequence for sequence in sequences if sequence.last_sampled_step <= self._last_step]
        self._ranks = (self._ranks[0] - len(sooner), self._ranks[1] + len(sequences) - len(sooner))
        for rank, sequence in enumerate(sooner, self._ranks[0]):
            self._add(sequence, rank)
        if len(sooner) < len(sequences):
            later = [sequence for sequence in sequences if sequence.last_sampled_step > self._last_step]
            for rank, sequence in enumerate(later, self._ranks[1] - len(later)):
                self._add(sequence, rank)

    def leave(self, sequence: SequenceState) -> None:
        """A member is one no longer, and up to date. With a step in flight it has a row of its own in it."""
        member = self._members[sequence]
        self.refresh(sequence)
        if member.grows_at < self.clock:
            self._growing[member.grows_at % len(self._growing)] -= 1
        elif self._to_grow[member.grows_at] > 1:
            self._to_grow[member.grows_at] -= 1
        else:
            del self._to_grow[member.grows_at]
        self._reports.remove(self._reported_at(member), sequence)
        self._filled.remove(-member.offset, sequence)
        del self._members[sequence]
        self.context -= sequence.num_planned
        if self.flight is not None:
            self.flight.left.append((sequence, self._row(sequence)))

    def disband(self) -> list[SequenceState]:
        """All members leave, in the order of the rows."""
        left = sorted(self._members, key=lambda sequence: self._members[sequence].rank)
        for place, sequence in enumerate(left):
            self.leave(sequence)
            sequence.place = place
        return left

    def refresh(self, sequence: SequenceState) -> None:
        """Let a member say of itself what is so. It stays."""
        planned = self._members[sequence].offset + self.clock
        in_flight = int(self.flight is not None)
        sequence.tokens += [self._token] * (planned + 1 - in_flight - len(sequence.tokens))
        sequence.num_planned = planned
        sequence.num_computed = planned - in_flight
        sequence.num_placeholders = sequence.num_in_flight = in_flight
        sequence.last_sampled_step = self._last_step
        if (missing := self._pool.num_blocks_for(planned) - len(sequence.blocks)) > 0:
            sequence.blocks += tuple(self._spare[-missing:])
            del self._spare[-missing:]

    # ---- steps -------------------------------------------------------------------------------------

    @property
    def growth(self) -> int:
        """Blocks that the next step needs."""
        return self._growing[self.clock % len(self._growing)] + self._to_grow.get(self.clock, 0)

    def plan(self, step: int) -> Flight:
        """Every member has a row in step `step`. Raises InternalError when there are no blocks for them."""
        self._grow()
        self._last_step = step
        self.flight = Flight(self)
        return self.flight

    def go_on(self, steps: int) -> None:
        """The step in flight is committed and planned again, `steps` times; nothing is due meanwhile but blocks."""
        self._grow(steps)
        self._last_step += steps

    def steps_to_spare(self, most: int) -> int:
        """Steps after the one in flight, at most `most`, for which there are blocks."""
        free, size = self._pool.num_free, self._pool.block_size
        if free >= len(self._members) * -(-most // size):
            return most
        begun: dict[int, int] = {}
        for ahead in range(most):
            place = (self.clock + ahead) % size
            begun[place] = begun.get(place, 0) + self._to_grow.get(self.clock + ahead, 0)
            free -= self._growing[place] + begun[place]
            if free < 0:
                return ahead
        return most

    def next_end(self) -> int:
        """Steps, that in flight the first of them, up to one that is the last of a member."""
        while self._members.get(self._ends[0][2].sequence) is not self._ends[0][2]:
            heapq.heappop(self._ends)
        return self._ends[0][0] - self.clock + 1

    def next_report(self, after: int = 0) -> int:
        """The same, up to one whose token is to be reported; not among the first `after`."""
        return after + self._reports.next(self.clock + after) + 1

    def next_filled(self) -> int:
        """The same, up to one that fills a block."""
        return self._filled.next(self.clock) + 1

    def take_ended(self) -> list[SequenceState]:
        """Members whose last token the step in flight samples: they leave."""
        ended = []
        while self._ends and self._ends[0][0] <= self.clock:
            member = heapq.heappop(self._ends)[2]
            if self._members.get(member.sequence) is member:
                self.leave(member.sequence)
                ended.append(member.sequence)
        return ended

    def reported(self, ago: int = 0) -> Collection[SequenceState]:
        """Members whose token of the latest step, or of one some steps ago, is to be reported."""
        return self._reports.at(self.clock - ago)

    def filled(self) -> Collection[SequenceState]:
        """Members for whom the latest step fills a block."""
        return self._filled.at(self.clock)

    # ---- inside ------------------------------------------------------------------------------------

    def _add(self, sequence: SequenceState, rank: int) -> None:
        size, offset = self._pool.block_size, sequence.num_planned - self.clock
        member = _Member(sequence, offset, len(sequence.blocks) * size - offset, sequence.limit - 1 - offset, rank)
        self._members[sequence] = member
        self._youngest = sequence.age_key if self._youngest is None else max(self._youngest, sequence.age_key)
        self._to_grow[member.grows_at] = self._to_grow.get(member.grows_at, 0) + 1
        self._reports.add(self._reported_at(member), sequence)
        self._filled.add(-offset, sequence)
        self._num_joined += 1
        heapq.heappush(self._ends, (member.ends_at, self._num_joined, member))
        self.context += sequence.num_planned

    def _grow(self, steps: int = 1) -> None:
        """Blocks for the next steps, which are planned with them."""
        clock, size = self.clock, len(self._growing)
        rounds, rest = divmod(steps, size)
        first = clock % size
        needed = sum(self._growing[first : first + rest]) + sum(self._growing[: max(0, first + rest - size)])
        if rounds:
            needed += rounds * sum(self._growing)
        for begin in [begin for begin in self._to_grow if begin < clock + steps] if self._to_grow else ():
            members = self._to_grow.pop(begin)
            self._growing[begin % size] += members
            needed += members * (1 + (clock + steps - 1 - begin) // size)
        if needed:
            blocks = self._pool.allocate(needed)
            if blocks is None:
                raise InternalError(f"{len(self)} sequences cannot grow: {needed} blocks are needed, {self._pool.num_free} free")
            self._spare += blocks
        self.clock += steps
        self.context += steps * len(self._members)

    def _reported_at(self, member: _Member) -> int:
        return len(member.sequence.spec.prompt) - 1 - member.offset

    def _row(self, sequence: SequenceState) -> StepRow:
        """Its row in the step in flight."""
        start, spec = sequence.num_computed, sequence.spec
        return StepRow(spec.attempt, start, (self._token,), sequence.blocks, spec.sampling, sequence.num_output, True)


class _Ring:
    """Who is due at which clock, modulo a period."""

    def __init__(self, period: int) -> None:
        self._period = period
        self._places: list[dict[SequenceState, None]] = [{} for _ in range(period)]
        self._taken = 0  # a bit per place where somebody is

    def at(self, clock: int) -> dict[SequenceState, None]:
        return self._places[clock % self._period]

    def add(self, clock: int, sequence: SequenceState) -> None:
        place = clock % self._period
        self._places[place][sequence] = None
        self._taken |= 1 << place

    def remove(self, clock: int, sequence: SequenceState) -> None:
        place = clock % self._period
        del self._places[place][sequence]
        if not self._places[place]:
            self._taken ^= 1 << place

    def next(self, clock: int) -> int:
        """Steps from `clock` on to the next at which somebody is due; the period when nobody is at any."""
        place = clock % self._period
        ahead = self._taken >> place | self._taken << (self._period - place)
        return (ahead & -ahead).bit_length() - 1 if ahead else self._period
