"""One run of the model over a batch: what the scheduler asks for and what comes back.

A plan may be made while earlier plans are still running ("plan ahead"). A decode row of such a plan
feeds a token that is not known yet: the row is `pending`, and the executor takes the token that the
sequence's row of the previous step sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

from .request import Attempt, FinishReason, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class StepRow:
    """One sequence's share of a step.

    start        position of the first token fed; KV of positions [0, start) is in the cache
    tokens       the token ids fed, at positions start, start+1, ...; empty when `pending`
    pending      feed one token: the one sampled by this sequence's row of the previous plan
    block_table  blocks of the sequence in order, covering at least start + num_tokens slots
    sample       whether to sample after the last token fed
    output_index which output token that is (0 is the first): part of the generator's key
    """

    attempt: Attempt
    start: int
    tokens: tuple[int, ...]
    block_table: tuple[int, ...]
    sampling: SamplingParams
    output_index: int
    sample: bool
    pending: bool = False

    @property
    def num_tokens(self) -> int:
        return 1 if self.pending else len(self.tokens)

    @property
    def end(self) -> int:
        """Number of tokens in the cache after the step."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Step number `step` (1, 2, 3, ... per worker) over `rows`."""

    step: int
    rows: tuple[StepRow, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class RowOutput:
    """Tokens sampled for one row: none for an unfinished chunk, one for decode, more with speculation."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """`rows[i]` answers `plan.rows[i]`. `seconds` is how long the device worked."""

    step: int
    rows: tuple[RowOutput, ...]
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Tokens of one sequence made by one step; `position` is the output index of the first of them."""

    attempt: Attempt
    position: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class ComputedEvent:
    """A sequence with `hand_over` now has KV for its first `num_tokens` tokens in `blocks`.

    `last` is set when its whole prompt is computed; the TokenEvent with the first token follows in the same list.
    """

    attempt: Attempt
    num_tokens: int
    blocks: tuple[int, ...]
    last: bool


@dataclass(frozen=True, slots=True)
class PreemptedEvent:
    """The sequence lost its blocks and left this worker; it can be resumed anywhere from its tokens."""

    attempt: Attempt


SequenceEvent = TokenEvent | ComputedEvent | PreemptedEvent
