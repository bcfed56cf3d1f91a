"""Forming one batch: who gets how much of a step's token budget, and the blocks for it.

Decode rows come first, then the rest of prompts that were begun, then waiting sequences from the head of
the queue. A sequence whose next token is not known yet gets a `pending` row only if the plan just before
samples that token; otherwise it sits this plan out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..core.step import PreemptedEvent, RowNeeds, StepRow
from .blocks import BlockPool
from .phases import Phases
from .sequence import Phase, SequenceState

KNOWN = RowNeeds()  # the executor has all it needs


@dataclass(slots=True)
class Batch:
    """A plan in the making. `budget` and `seats` are the tokens and rows that are left.

    reports  prompt tokens that may still be reported in this step
    """

    step: int
    now: float
    budget: int
    seats: int
    reports: int
    rows: list[StepRow] = field(default_factory=list)
    sequences: list[SequenceState] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return self.budget == 0 or self.seats == 0

    def add(self, sequence: SequenceState, num_tokens: int) -> None:
        """Feed the next `num_tokens` tokens of `sequence`, whose blocks have room for them."""
        start = sequence.num_planned
        end = start + num_tokens
        pending = sequence.num_placeholders > 0
        sample = pending or end == len(sequence.tokens)
        self.rows.append(
            StepRow(
                attempt=sequence.spec.attempt,
                start=start,
                tokens=() if pending else tuple(sequence.tokens[start:end]),
                block_table=sequence.blocks,
                sampling=sequence.spec.sampling,
                output_index=sequence.num_output + sequence.num_placeholders,
                sample=sample,
                pending=pending,
                needs=self._needs(sequence, start, end, sample) if sequence.has_needs else None,
                output=tuple(sequence.output) if sample and sequence.spec.sampling.grammar is not None else (),
            )
        )
        self.sequences.append(sequence)
        self.budget -= num_tokens
        self.seats -= 1
        sequence.num_planned = end
        sequence.num_in_flight += 1
        if sequence.first_scheduled is None:
            sequence.first_scheduled = self.now
        if sample:
            sequence.num_placeholders += 1
            sequence.last_sampled_step = self.step

    def add_next(self, sequence: SequenceState) -> None:
        """`add` of the one token that is left to feed of a sequence, and is known: the plainest and commonest row."""
        if sequence.has_needs:
            self.add(sequence, 1)
            return
        spec, tokens, start = sequence.spec, sequence.tokens, sequence.num_planned
        output_index = len(tokens) - len(spec.prompt)
        self.rows.append(StepRow(spec.attempt, start, (tokens[start],), sequence.blocks, spec.sampling, output_index, True))
        self.sequences.append(sequence)
        self.budget -= 1
        self.seats -= 1
        sequence.num_planned = start + 1
        sequence.num_in_flight += 1
        if sequence.first_scheduled is None:
            sequence.first_scheduled = self.now
        sequence.num_placeholders = 1
        sequence.last_sampled_step = self.step

    def add_prompt(self, sequence: SequenceState) -> None:
        """Feed as much of the known tokens of `sequence` as the batch has room for, which may be nothing."""
        num_tokens = min(sequence.num_remaining, self.budget)
        if sequence.reports_prompt:
            # The last token of the prompt has no target: feeding it is free.
            rest = sequence.num_remaining
            num_tokens = min(num_tokens, self.reports + (rest == self.reports + 1))
        if num_tokens > 0:
            self.add(sequence, num_tokens)

    def _needs(self, sequence: SequenceState, start: int, end: int, sample: bool) -> RowNeeds | None:
        """What the executor is to be told beside the tokens of a row. Asked before the row counts as planned."""
        sampling = sequence.spec.sampling
        targets: tuple[int, ...] = ()
        if sequence.reports_prompt:
            targets = sequence.spec.prompt[start + 1 : end + 1]
            self.reports -= len(targets)
        if not (sample and sampling.shaped):
            return RowNeeds(targets=targets) if targets else None
        if sequence.history_given:
            return KNOWN
        sequence.history_given = True
        return RowNeeds(tuple(sequence.tokens), targets)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a batcher looks at of `SchedulerConfig`, beside a batch's own limits."""

    max_running: int
    watermark: float
    stages: int
    max_context: int
    phases_apart: bool = False
    eager_pipeline: bool = False


class Batcher:
    """Fills batches from the sequences of one scheduler. `preempted` collects the events that this causes."""

    def __init__(
        self,
        pool: BlockPool,
        phases: Phases,
        limits: Limits,
        prefix_cache: bool,
        preempted: list[PreemptedEvent],
    ) -> None:
        self._pool = pool
        self._phases = phases
        self._max_running = limits.max_running
        self._known_only = limits.stages > 1
        self._shares = 1 if limits.eager_pipeline else limits.stages
        self._max_context = limits.max_context
        self._apart = limits.phases_apart
        self._reserve = int(limits.watermark * pool.num_blocks)  # blocks that starting sequences leave to running ones
        self._prefix_cache = prefix_cache
        self._preempted = preempted

    def fill(self, batch: Batch) -> None:
        """Add rows until the budget, the seats, the blocks or the sequences run out."""
        if not self._apart:
            self._add_prompts(batch, self._add_decodes(batch))
            return
        running = self._phases.running
        self._add_prompts(batch, [s for s in running if s.num_remaining > 1 and self._may_run(s, batch.step)])
        if not batch.rows:
            self._add_decodes(batch)

    def _add_decodes(self, batch: Batch) -> list[SequenceState]:
        """A row for every sequence that decodes. Returns those whose prompts have been begun, if there is room for them."""
        begun: list[SequenceState] = []
        # Micro-batches share the sequences out evenly, or all of them would end up in one and the other stages idle.
        share = -(-len(self._phases.running) // self._shares)
        rows, most, size = batch.rows, min(batch.budget, batch.seats), self._pool.block_size
        context, max_context = 0, self._max_context or sys.maxsize
        for sequence in self._in_turn() if self._max_context else self._phases.running:
            if len(rows) == most:
                return []
            if sequence.phase is not Phase.RUNNING:
                continue  # preempted for the benefit of one before it
            if sequence.num_placeholders and not self._may_run(sequence, batch.step):
                continue
            if len(sequence.tokens) + sequence.num_placeholders - sequence.num_planned > 1:
                begun.append(sequence)
                continue
            planned = sequence.num_planned
            if len(rows) == share:
                continue
            if rows and context + planned >= max_context:
                context = max_context  # nobody overtakes one that did not fit
                continue
            if planned < len(sequence.blocks) * size or self._make_room(sequence, 1):
                sequence.place = len(rows)
                if sequence.num_placeholders:
                    batch.add(sequence, 1)
                else:
                    batch.add_next(sequence)
                context += planned + 1
        return begun

    def _in_turn(self) -> list[SequenceState]:
        """Running sequences, those first that have not been in a step for longest: with a limit to the context of a step, all
        that do not fit into one take turns. Those that came while a step ran go before those that were in it."""
        return sorted(self._phases.running, key=turn)

    def _may_run(self, sequence: SequenceState, step: int) -> bool:
        """Whether step `step` may contain a row of this running sequence."""
        if sequence.num_placeholders == 0:
            return True
        if self._known_only:
            return False
        ends_soon = len(sequence.tokens) + sequence.num_placeholders >= sequence.limit
        return sequence.last_sampled_step == step - 1 and not ends_soon and not sequence.spec.hand_over

    def _add_prompts(self, batch: Batch, begun: list[SequenceState]) -> None:
        """Chunks of the prompts in `begun`, then of waiting ones."""
        for sequence in begun:
            if batch.full:
                return
            num_tokens = min(sequence.num_remaining, batch.budget)
            if sequence.phase is Phase.RUNNING and self._make_room(sequence, num_tokens):
                batch.add_prompt(sequence)
        while not batch.full and (started := self._start_next()) is not None:
            batch.add_prompt(started)

    # ---- blocks --------------------------------------------------------------------------------

    def _start_next(self) -> SequenceState | None:
        """Start the head of the queue. When it does not fit it waits, and all behind it do, but for the one overtaken first."""
        head, oldest = self._phases.waiting.first, self._phases.waiting_to_leave.first
        if head is None or len(self._phases.running) >= self._max_running:
            return None
        if self._start(head):
            return head
        if oldest is None or oldest is head or not (oldest.overtaken or self._phases.waiting_before(head)):
            return None
        return oldest if self._start(oldest) else None

    def _start(self, head: SequenceState) -> bool:
        """Give a waiting sequence blocks for all its known tokens, if there are enough."""
        overtaken = self._phases.waiting_before(head)
        pool = self._pool
        # At least one token must be left to compute: its logits are what is sampled from.
        # A prompt whose log probabilities are asked for is computed as a whole.
        cached = self._prefix_cache and not head.reports_prompt
        hits = pool.lookup_hashes(head.hashes((len(head.tokens) - 1) // pool.block_size)) if cached else ()
        missing = pool.num_blocks_for(len(head.tokens)) - len(hits)
        # The last sequences of a pool need no reserve for others: without this rule a long one might never start.
        reserve = self._reserve if len(self._phases.running) else 0
        # Decode workers grant in the order in which sequences came, and the blocks of a sequence to be handed over stay
        # here until its turn: it must leave room for those that it overtakes, or they and it would wait for each other.
        reserve = max([reserve, *(pool.num_blocks_for(len(other.tokens)) for other in overtaken)])
        fresh = pool.allocate(missing) if missing + reserve <= pool.num_free else None
        if fresh is None:
            pool.release(hits)
            return False
        self._phases.start(head, hits + fresh)
        for other in overtaken:
            other.overtaken = True
        head.num_computed = head.num_planned = len(hits) * pool.block_size
        head.num_published = len(hits)
        if head.first_scheduled is None:
            head.cached_tokens = head.num_computed
        return True

    def _make_room(self, sequence: SequenceState, num_tokens: int) -> bool:
        """Blocks for the next `num_tokens` tokens of a running sequence, preempting younger ones if need be."""
        missing = self._pool.num_blocks_for(sequence.num_planned + num_tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        while (blocks := self._pool.allocate(missing)) is None:
            if self._phases.draining_blocks:
                return False  # the next commits free blocks: preempting more now would be too much
            victim = next(self._victims(), None)
            if victim is None:
                return False
            if (event := self._phases.preempt(victim)) is not None:
                self._preempted.append(event)
            if victim is sequence:
                return False
        sequence.blocks += blocks
        return True

    def _victims(self) -> Iterator[SequenceState]:
        """Running sequences, lowest priority and youngest first.

        The one that asks for blocks is among them and everybody before it in the batch is older, so that nobody
        who has a row in this batch is taken. A sequence to be handed over never is: its blocks are being pushed.
        """
        return (sequence for sequence in reversed(self._phases.running) if not sequence.spec.hand_over)


def turn(sequence: SequenceState) -> tuple[int, int]:
    """Who takes turns goes in ascending order of this."""
    return (sequence.last_sampled_step, sequence.place)
