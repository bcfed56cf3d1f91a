"""Which phase every sequence is in, and the one place that gives blocks back.

A block that an uncommitted plan uses is never given back: the device may still read or write it. So a
sequence that ends or is preempted while plans are in flight keeps its blocks until `row_done` of its last row.
"""

from __future__ import annotations

from itertools import takewhile

from ..core.errors import InternalError
from ..core.request import Attempt
from ..core.step import PreemptedEvent
from .blocks import BlockPool
from .sequence import Phase, SequenceState, SortedSequences


class Phases:
    """Every sequence of one scheduler. Every method is one transition.

    waiting          in the order of the ordering policy
    waiting_to_leave those of them that are to be handed over, in the order in which they came
    running          from the one served first to the one preempted first
    draining_blocks  blocks that become free (or lose a reference) as plans commit
    num_preempted    how often a sequence was preempted
    """

    def __init__(self, pool: BlockPool, return_preempted: bool) -> None:
        self.waiting = SortedSequences(lambda sequence: sequence.queue_key)
        self.waiting_to_leave = SortedSequences(lambda sequence: sequence.queue_key[-1:])
        self.running = SortedSequences(lambda sequence: sequence.age_key)
        self.num_held = 0
        self.draining_blocks = 0
        self.num_preempted = 0
        self._pool = pool
        self._return_preempted = return_preempted
        self._sequences: dict[Attempt, SequenceState] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def get(self, attempt: Attempt) -> SequenceState | None:
        return self._sequences.get(attempt)

    def wait(self, sequence: SequenceState) -> None:
        """A new sequence joins the queue."""
        self._take_in(sequence)
        self._enqueue(sequence)

    def waiting_before(self, sequence: SequenceState) -> list[SequenceState]:
        """Waiting sequences to be handed over that came before `sequence`, which is to be handed over too (else: none)."""
        if not sequence.spec.hand_over or self.waiting_to_leave.first is sequence:
            return []
        return list(takewhile(lambda other: other is not sequence, self.waiting_to_leave))

    def adopt(self, sequence: SequenceState) -> None:
        """A new sequence comes with its blocks."""
        self._take_in(sequence)
        sequence.phase = Phase.RUNNING
        self.running.insert(sequence)

    def start(self, sequence: SequenceState, blocks: tuple[int, ...]) -> None:
        """A waiting sequence gets its blocks."""
        self._dequeue(sequence)
        sequence.blocks = blocks
        sequence.phase = Phase.RUNNING
        self.running.insert(sequence)

    def hold(self, sequence: SequenceState) -> None:
        """A running sequence is prefilled and waits, blocks pinned, to be handed over."""
        self.running.remove(sequence)
        sequence.phase = Phase.HELD
        self.num_held += 1

    def preempt(self, sequence: SequenceState) -> PreemptedEvent | None:
        """Take a running sequence's blocks away, now or when its rows in flight have committed."""
        self.num_preempted += 1
        self.running.remove(sequence)
        if sequence.num_in_flight == 0:
            return self._leave(sequence)
        sequence.phase = Phase.LEAVING
        self.draining_blocks += len(sequence.blocks)
        return None

    def end(self, sequence: SequenceState) -> None:
        """A sequence of any phase leaves for good."""
        match sequence.phase:
            case Phase.WAITING:
                self._dequeue(sequence)
            case Phase.RUNNING:
                self.running.remove(sequence)
            case Phase.HELD:
                self.num_held -= 1
            case Phase.LEAVING:
                self.draining_blocks -= len(sequence.blocks)
            case Phase.ENDED:
                raise InternalError(f"{sequence.attempt} has ended already")
        sequence.phase = Phase.ENDED
        del self._sequences[sequence.attempt]
        if sequence.num_in_flight == 0:
            self._pool.release(sequence.blocks)
        else:
            self.draining_blocks += len(sequence.blocks)

    def row_done(self, sequence: SequenceState) -> PreemptedEvent | None:
        """One plan with a row of this sequence has committed or failed, and its row has been dealt with."""
        sequence.num_in_flight -= 1
        if sequence.num_in_flight > 0:
            return None
        if sequence.phase is Phase.ENDED:
            self.draining_blocks -= len(sequence.blocks)
            self._pool.release(sequence.blocks)
        elif sequence.phase is Phase.LEAVING:
            self.draining_blocks -= len(sequence.blocks)
            return self._leave(sequence)
        return None

    def check(self) -> None:
        """Raise InternalError unless the lists and the phases agree and every block in use is referenced."""
        for sequence in self._sequences.values():
            if sequence.phase is Phase.ENDED or (sequence.phase is Phase.WAITING) != (not sequence.blocks):
                raise InternalError(f"{sequence.attempt} is {sequence.phase.value} and has {len(sequence.blocks)} blocks")
            if not sequence.num_computed <= sequence.num_planned <= len(sequence.tokens) + sequence.num_placeholders:
                raise InternalError(f"{sequence.attempt}: computed, planned and known tokens are out of order")
            for block in sequence.blocks:
                if self._pool.references(block) < 1:
                    raise InternalError(f"{sequence.attempt} uses block {block}, of which nobody holds a reference")
        listed = [(self.waiting, Phase.WAITING), (self.running, Phase.RUNNING)]
        for sequences, phase in listed:
            members = list(sequences)
            if any(member.phase is not phase or self.get(member.attempt) is not member for member in members):
                raise InternalError(f"a sequence that is not {phase.value} is listed as {phase.value}")
            if len(members) != sum(sequence.phase is phase for sequence in self._sequences.values()):
                raise InternalError(f"a sequence that is {phase.value} is not listed")
        if self.num_held != sum(sequence.phase is Phase.HELD for sequence in self._sequences.values()):
            raise InternalError(f"{self.num_held} sequences are counted as held, which is wrong")

    # ---- inside --------------------------------------------------------------------------------

    def _take_in(self, sequence: SequenceState) -> None:
        if sequence.attempt in self._sequences:
            raise InternalError(f"attempt {sequence.attempt} is here already; a retry needs a new attempt number")
        self._sequences[sequence.attempt] = sequence

    def _leave(self, sequence: SequenceState) -> PreemptedEvent | None:
        self._pool.release(sequence.blocks)
        sequence.start_over()
        if self._return_preempted:
            sequence.phase = Phase.ENDED
            del self._sequences[sequence.attempt]
            return PreemptedEvent(sequence.attempt, sequence.num_output)
        sequence.phase = Phase.WAITING
        self._enqueue(sequence)
        return None

    def _enqueue(self, sequence: SequenceState) -> None:
        self.waiting.insert(sequence)
        if sequence.spec.hand_over:
            self.waiting_to_leave.insert(sequence)

    def _dequeue(self, sequence: SequenceState) -> None:
        self.waiting.remove(sequence)
        if sequence.spec.hand_over:
            self.waiting_to_leave.remove(sequence)
