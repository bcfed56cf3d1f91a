"""Taking in what a step computed: counts, tokens, finish rules, the prefix cache, and the events for the worker."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.errors import InternalError
from ..core.step import ComputedEvent, FailedEvent, RowOutput, SequenceEvent, StepOutput, StepPlan, StepRow, TokenEvent
from .blocks import BlockPool
from .phases import Phases
from .sequence import Phase, SequenceState


class Committer:
    """Applies the rows of committed plans to their sequences."""

    def __init__(self, pool: BlockPool, phases: Phases, prefix_cache: bool) -> None:
        self._pool = pool
        self._phases = phases
        self.prefix_cache = prefix_cache

    def commit_row(self, sequence: SequenceState, row: StepRow, output: RowOutput) -> list[SequenceEvent]:
        """Take in one row. That of a sequence that has ended is discarded."""
        events: list[SequenceEvent] = []
        if sequence.phase is not Phase.ENDED:
            sequence.num_computed = row.end
            self.publish(sequence, sequence.num_computed)
            if output.prompt_logprobs:
                sequence.prompt_logprobs += output.prompt_logprobs
            if row.sample:
                events = self._sampled(sequence, row, output)
            elif sequence.spec.hand_over:
                events = [self._computed(sequence, last=False)]
        if (preempted := self._phases.row_done(sequence)) is not None:
            events.append(preempted)
        return events

    def publish(self, sequence: SequenceState, num_computed: int) -> None:
        """Tell the prefix cache of the blocks that are full of computed KV."""
        num_full = num_computed // self._pool.block_size
        first = sequence.num_published
        if self.prefix_cache and num_full > first:
            self._pool.publish_hashes(sequence.hashes(num_full)[first:], sequence.blocks[first:num_full])
            sequence.num_published = num_full

    def _sampled(self, sequence: SequenceState, row: StepRow, output: RowOutput) -> list[SequenceEvent]:
        if output.error:
            self._phases.end(sequence)
            return [FailedEvent(row.attempt, output.error)]
        position = sequence.num_output
        finish = None
        num_taken = 0
        while finish is None and num_taken < len(output.tokens):
            finish = sequence.append(output.tokens[num_taken])
            num_taken += 1
        sequence.num_placeholders -= 1
        if num_taken > 1 and finish is None and sequence.num_placeholders > 0:
            raise InternalError(f"{row.attempt}: {num_taken} tokens came for a row whose next row was planned for one")
        tokens, logprobs, of_prompt = output.tokens[:num_taken], output.logprobs[:num_taken], tuple(sequence.prompt_logprobs)
        sequence.prompt_logprobs.clear()
        event = TokenEvent(row.attempt, position, tokens, logprobs, finish, of_prompt)
        if finish is not None:
            self._phases.end(sequence)
            return [event]
        if sequence.spec.hand_over:
            computed = self._computed(sequence, last=True)
            self._phases.hold(sequence)
            return [computed, event]
        return [event]

    def _computed(self, sequence: SequenceState, last: bool) -> ComputedEvent:
        num_tokens = sequence.num_computed
        blocks = sequence.blocks[: self._pool.num_blocks_for(num_tokens)]
        return ComputedEvent(sequence.attempt, num_tokens, blocks, last)


def check_output(plan: StepPlan, sequences: Sequence[SequenceState], output: StepOutput) -> None:
    """Raise InternalError unless `output` answers `plan` row by row. Rows that are discarded anyway may say anything."""
    if output.step != plan.step or len(output.rows) != len(plan.rows):
        raise InternalError(
            f"the output of step {output.step} with {len(output.rows)} rows cannot answer plan {plan.step} with {len(plan.rows)}"
        )
    for row, sequence, answer in zip(plan.rows, sequences, output.rows, strict=True):
        if sequence.phase is not Phase.ENDED and row.sample != bool(answer.tokens or answer.error):
            wanted = "at least one token" if row.sample else "no token"
            raise InternalError(f"step {plan.step}, {row.attempt}: {wanted} expected, the executor returned {answer.tokens}")
