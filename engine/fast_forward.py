"""How often a plan would recur, and what a sequence is after it did: so that a simulator may take many decode steps at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import InternalError
from ..core.step import StepPlan
from ..policy.ordering import SortKey
from .blocks import BlockPool
from .committing import Committer
from .sequence import SequenceState


@dataclass(slots=True)
class InFlight:
    """A plan that is not committed, and the sequences of its rows.

    recurs  every row feeds a token that was sampled here and samples the next, of a sequence that stays here
    ahead   how many tokens further than `plan` says its rows are
    """

    plan: StepPlan
    sequences: list[SequenceState]
    recurs: bool
    ahead: int = 0

    def repeats_within(self, max_context: int) -> int:
        """How many recurrences attend to at most `max_context` tokens together (0: no limit), at least 1."""
        if not max_context:
            return sys.maxsize
        context = sum(sequence.num_planned for sequence in self.sequences)
        return max(1, (max_context - context) // len(self.sequences) + 1)


def num_repeats(sequences: Sequence[SequenceState], pool: BlockPool, until_publish: bool) -> int:
    """How many steps in a row consist of one row for each of `sequences` (in any order), each one token further on.

    They all have a single-token row in the only uncommitted plan, which counts as the first. It ends where the first
    sequence reaches its length limit, or the pool has no block left for growth. Stop tokens are not
    foreseen: who knows of them bounds the number further. `until_publish`: stop before a block becomes
    full, because a waiting sequence could find it in the prefix cache and start.
    """
    repeats = min([s.limit - s.num_planned for s in sequences])
    if until_publish:
        size = pool.block_size
        repeats = min(repeats, min(size - (s.num_planned - 1) % size for s in sequences))
    low, high = 1, max(1, repeats)  # the plan itself has its blocks
    if _growth(sequences, pool, high) <= pool.num_free:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if _growth(sequences, pool, middle) <= pool.num_free:
            low = middle
        else:
            high = middle - 1
    return low


def advance(sequences: Sequence[SequenceState], pool: BlockPool, committer: Committer, steps: int, token: int) -> None:
    """Every one of `sequences` takes in `steps` single-token rows that all sampled `token`, and has the next row in flight.

    Blocks are taken and prefixes published in the order in which single steps would do it.
    """
    size = pool.block_size
    new_tokens = [token] * steps
    changes: list[tuple[int, int, SortKey, int]] = []  # (step, 0: publishes after it, 1: grows for the next, order, row)
    for index, sequence in enumerate(sequences):
        planned, slots = sequence.num_planned, len(sequence.blocks) * size
        if planned + steps > slots:
            changes += [(s, 1, sequence.age_key, index) for s in range(slots - planned + 1, steps + 1, size)]
        if committer.prefix_cache:
            # After step s, tokens [0, planned - 1 + s) are computed. Rows beyond the first are in order of age.
            full_after = range(size - (planned - 1) % size, steps + 1, size)
            changes += [(s, 0, (index,) if s == 1 else sequence.age_key, index) for s in full_after]
        sequence.tokens += new_tokens
        sequence.num_computed += steps
        sequence.num_planned = planned + steps
        sequence.last_sampled_step += steps
    for step, grows, _, index in sorted(changes):
        sequence = sequences[index]
        if not grows:
            committer.publish(sequence, sequence.num_computed - steps + step)
        elif (blocks := pool.allocate(1)) is not None:
            sequence.blocks += blocks
        else:
            raise InternalError(f"{sequence.attempt} cannot grow: the plan was repeated more often than `num_repeats` says")


def _growth(sequences: Sequence[SequenceState], pool: BlockPool, repeats: int) -> int:
    """Blocks that `repeats` steps need beyond those that the sequences hold."""
    size, ahead = pool.block_size, repeats - 1
    spare = [len(sequence.blocks) * size - sequence.num_planned - ahead for sequence in sequences]
    return sum([-(slots // size) for slots in spare if slots < 0])
