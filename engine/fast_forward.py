"""How often a plan would recur, so that a simulator may price many decode steps at once."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.step import StepPlan
from .blocks import BlockPool
from .sequence import SequenceState


def num_repeats(plan: StepPlan, sequences: Sequence[SequenceState], pool: BlockPool, until_publish: bool) -> int:
    """How many steps in a row consist of the rows of `plan` (in any order), each one token further on.

    `plan` is the only uncommitted plan, and holds one single-token row per sequence. It ends where the first
    sequence reaches its length limit, or the pool has no block left for growth. Stop tokens are not
    foreseen: who knows of them bounds the number further. `until_publish`: stop before a block becomes
    full, because a waiting sequence could find it in the prefix cache and start.
    """
    repeats = min(sequence.limit - row.end for row, sequence in zip(plan.rows, sequences, strict=True))
    if until_publish:
        repeats = min(repeats, min(pool.block_size - row.start % pool.block_size for row in plan.rows))
    low, high = 1, max(1, repeats)  # the plan itself has its blocks
    while low < high:
        middle = (low + high + 1) // 2
        if _growth(plan, sequences, pool, middle) <= pool.num_free:
            low = middle
        else:
            high = middle - 1
    return low


def _growth(plan: StepPlan, sequences: Sequence[SequenceState], pool: BlockPool, repeats: int) -> int:
    """Blocks that `repeats` runs of the plan need beyond those its sequences hold."""
    return sum(
        max(0, pool.num_blocks_for(row.start + repeats) - len(sequence.blocks))
        for row, sequence in zip(plan.rows, sequences, strict=True)
    )
