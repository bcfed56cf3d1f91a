"""One run of the model over a batch: what the scheduler asks for and what comes back.

A plan may be made while earlier plans are still running ("plan ahead"). A decode row of such a plan
feeds a token that is not known yet: the row is `pending`, and the executor takes the token that the
sequence's row of the previous step sampled.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Attempt, FinishReason, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class RowNeeds:
    """What a row brings for sampling that looks at more than its logits.

    history  every token of the sequence up to the last one fed, prompt first: on the first row that samples after the
             sequence came here or was started over. The executor keeps what it needs of it and adds what it samples
             itself, so that it knows the tokens of pending rows too. None on later rows: the executor has it
    targets  the prompt tokens that follow the first fed ones, one by one: their log probabilities are asked for
    """

    history: tuple[int, ...] | None = None
    targets: tuple[int, ...] = ()


@dataclass(slots=True)  # made for every sequence of every step, and freezing it costs four times as much; nobody changes one
class StepRow:
    """One sequence's share of a step.

    start        position of the first token fed; KV of positions [0, start) is in the cache
    tokens       the token ids fed, at positions start, start+1, ...; empty when `pending`
    pending      feed one token: the one sampled by this sequence's row of the previous plan
    block_table  blocks of the sequence in order, covering at least start + num_tokens slots
    sample       whether to sample after the last token fed
    output_index which output token that is (0 is the first): part of the generator's key
    needs        None for the many rows whose sampling needs nothing but the logits
    output       the output tokens that are known; told only to rows that sample under a grammar
    """

    attempt: Attempt
    start: int
    tokens: tuple[int, ...]
    block_table: tuple[int, ...]
    sampling: SamplingParams
    output_index: int
    sample: bool
    pending: bool = False
    needs: RowNeeds | None = None
    output: tuple[int, ...] = ()

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
    """Tokens sampled for one row: none for an unfinished chunk, one for decode, more with speculation.

    `prompt_logprobs` answers `RowNeeds.targets`, one by one. `error` says why no token can be sampled for this
    sequence, now or ever; other rows are not concerned.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """`rows[i]` answers `plan.rows[i]`. `seconds` is how long the device worked."""

    step: int
    rows: tuple[RowOutput, ...]
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Tokens of one sequence made by one step; `position` is the output index of the first of them.

    `prompt_logprobs` come with output token 0, for every prompt token but the first.
    """

    attempt: Attempt
    position: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


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
    """The sequence lost its blocks and left this worker; it can be resumed anywhere from its `num_output` output tokens."""

    attempt: Attempt
    num_output: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """The sequence cannot go on here or anywhere else: it has left this worker."""

    attempt: Attempt
    reason: str


SequenceEvent = TokenEvent | ComputedEvent | PreemptedEvent | FailedEvent
