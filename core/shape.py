"""What a step asks of a device, in the few numbers that its time depends on.

A `StepShape` is made of a `StepPlan` alone: the same plan has the same shape whatever hardware runs it or prices it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .step import StepPlan


@dataclass(frozen=True, slots=True)
class StepShape:
    """Rows that feed more than one token, or the whole of a short prompt, are prefill; the others are decode.

    prefill_rows      rows that prefill
    prefill_tokens    tokens that they feed (the sum of l)
    prefill_pairs     pairs of a fed token and a token that it attends to, over all prefill rows (for whole prompts about
                      half the sum of l^2; chunks and prefix hits count what they really attend to)
    prefill_context   tokens whose KV the prefill rows read or write: the sum of their ends
    decode_rows       rows that feed the one token that their sequence sampled last
    decode_context    tokens whose KV those read: the sum of their ends
    sampled           rows that are sampled from: each needs logits over the vocabulary
    """

    prefill_rows: int = 0
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    prefill_context: int = 0
    decode_rows: int = 0
    decode_context: int = 0
    sampled: int = 0

    @property
    def num_tokens(self) -> int:
        return self.prefill_tokens + self.decode_rows

    def with_decodes(self, rows: int, context: int) -> StepShape:
        """The same with more decode rows, which are sampled from, and the tokens whose KV they read together."""
        if not rows:
            return self
        return StepShape(
            self.prefill_rows,
            self.prefill_tokens,
            self.prefill_pairs,
            self.prefill_context,
            self.decode_rows + rows,
            self.decode_context + context,
            self.sampled + rows,
        )


def shape_of(plan: StepPlan) -> StepShape:
    """The shape of a plan."""
    prefill_rows = prefill_tokens = prefill_pairs = prefill_context = decode_rows = decode_context = sampled = 0
    for row in plan.rows:
        fed = 1 if row.pending else len(row.tokens)
        end = row.start + fed
        sampled += row.sample
        if fed == 1 and row.output_index > 0:
            decode_rows += 1
            decode_context += end
        else:
            prefill_rows += 1
            prefill_tokens += fed
            prefill_pairs += fed * row.start + fed * (fed + 1) // 2
            prefill_context += end
    return StepShape(prefill_rows, prefill_tokens, prefill_pairs, prefill_context, decode_rows, decode_context, sampled)
