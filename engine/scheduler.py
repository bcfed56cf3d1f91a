"""Every batching decision of a worker: which tokens of which sequences the next step feeds.

There is no prefill phase in here, only sequences whose computed tokens catch up with their known tokens.
The scheduler never looks at a clock, never does I/O and never draws a random number: the same calls give
the same plans, in the service and in the simulator.

Its parts: `sequence` (one sequence), `phases` (where each one stands, who gives blocks back), `batching`
(forming a plan), `committing` (taking in what a step computed). `counting` is the same scheduler for simulators.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import InternalError, InvalidRequest
from ..core.request import Attempt, SequenceSpec
from ..core.step import PreemptedEvent, RowOutput, SequenceEvent, StepOutput, StepPlan, StepRow
from ..policy.ordering import Ordering, Waiting
from .batching import Batch, Batcher, Limits
from .blocks import BlockPool, HashChain
from .committing import Committer, check_output
from .phases import Phases
from .sequence import Phase, SequenceInfo, SequenceState


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one scheduler.

    max_step_tokens   token budget of a step: decode rows first, then chunks of prompts
    max_num_seqs      rows of a step at most; sequences are not started beyond it (adopted ones may exceed it)
    max_model_len     prompt and output tokens of a sequence at most
    return_preempted  a preempted sequence leaves with a PreemptedEvent instead of waiting here to be computed again
    watermark         share of the pool that a starting sequence leaves free for those that run
    max_in_flight     plans that may be uncommitted at a time
    max_reported      prompt tokens of a step whose log probabilities are reported: each costs a row of logits
    pipeline_stages   above 1, plans are micro-batches: as many may be uncommitted as there are stages, none feeds a token
                      that is not known yet, and each takes its share of the sequences that decode
    max_context       tokens that the decode rows of a step may attend to together; all that do not fit take turns. 0 is no limit
    phases_apart      a step feeds prompts or decodes, never both, and prompts go first, as in engines without chunked prefill
    eager_pipeline    with stages, a step takes all sequences that are ready, and any number may be under way: no even shares
    """

    max_step_tokens: int
    max_num_seqs: int
    max_model_len: int
    return_preempted: bool = False
    prefix_cache: bool = True
    watermark: float = 0.01
    max_in_flight: int = 2
    max_reported: int = 256
    pipeline_stages: int = 1
    max_context: int = 0
    phases_apart: bool = False
    eager_pipeline: bool = False


@dataclass(slots=True)
class InFlight:
    """A plan that is not committed, and the sequences of its rows."""

    plan: StepPlan
    sequences: list[SequenceState]


class Scheduler:
    """Batches the sequences of one worker. Plans are committed (or failed) in the order in which they were made.

    Events come from `commit`, except for sequences that `plan` preempts: those wait for `take_events`.
    """

    def __init__(self, pool: BlockPool, config: SchedulerConfig, order: Ordering) -> None:
        limits = (config.max_step_tokens, config.max_num_seqs, config.max_model_len, config.max_in_flight, config.max_reported)
        if min(*limits, config.pipeline_stages) < 1:
            raise InternalError(f"every limit of a scheduler must be at least 1: {config}")
        prefix_cache = config.prefix_cache and pool.prefix_cache
        self._pool = pool
        self._config = config
        self._order = order
        self._preempted: list[PreemptedEvent] = []
        batch_limits = Limits(
            config.max_num_seqs,
            config.watermark,
            config.pipeline_stages,
            config.max_context,
            config.phases_apart,
            config.eager_pipeline,
        )
        self._phases, self._batcher = self._make_parts(batch_limits, prefix_cache)
        self._committer = Committer(pool, self._phases, prefix_cache)
        self._uncommitted: deque[InFlight] = deque()
        self._max_in_flight = _max_in_flight(config)
        self._step = 0
        self._num_taken_in = 0
        self._just_ended: dict[Attempt, SequenceInfo] = {}

    # ---- what is here --------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether anything waits, runs or is in flight. Held sequences are no work."""
        return bool(self._uncommitted) or len(self._phases) > self._phases.num_held

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks."""
        return len(self._phases.waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks, without those that are held."""
        return len(self._phases) - self.num_waiting - self.num_held

    @property
    def num_held(self) -> int:
        """Sequences that are prefilled and wait to be handed over."""
        return self._phases.num_held

    @property
    def queued_tokens(self) -> int:
        """Tokens that have to be prefilled still, over all sequences."""
        begun = sum(s.num_remaining for s in self._phases.running if s.num_placeholders == 0 and s.num_remaining > 1)
        return begun + sum(len(s.tokens) for s in self._phases.waiting)

    def info(self, attempt: Attempt) -> SequenceInfo | None:
        """What is known of a sequence that is here, or that ended by its own rules in the latest commit."""
        sequence = self._phases.get(attempt)
        return self._just_ended.get(attempt) if sequence is None else sequence.info

    def num_output(self, attempt: Attempt) -> int | None:
        """Output tokens of a sequence that is here, those of earlier attempts among them."""
        sequence = self._phases.get(attempt)
        return None if sequence is None else sequence.num_output

    # ---- sequences come and go -----------------------------------------------------------------

    def add(self, spec: SequenceSpec, now: float) -> None:
        """Queue a sequence to be prefilled here. `spec.output` is prefilled like the prompt.

        Raises InvalidRequest when it can never run.
        """
        self._phases.wait(self._sequence(spec, list(spec.known_tokens), now))

    def adopt(self, spec: SequenceSpec, blocks: Sequence[int], first_token: int, now: float) -> None:
        """Run on a sequence whose KV for `spec.known_tokens` lies in `blocks`, one reference of each passing to the scheduler.

        `first_token` was sampled elsewhere and reported there; the next one sampled is output token len(spec.output) + 1.
        Raises InvalidRequest when the sequence can never run; the references then stay with the caller.
        """
        known = spec.known_tokens
        if spec.hand_over or len(blocks) * self._pool.block_size < len(known):
            raise InternalError(f"{spec.attempt} cannot be adopted with {len(blocks)} blocks for {len(known)} tokens, {spec=}")
        sequence = self._sequence(spec, [*known, first_token], now)
        sequence.blocks = tuple(blocks)
        sequence.num_computed = sequence.num_planned = len(known)
        sequence.last_sampled_step = self._step  # its turn comes after all that wait for theirs
        self._phases.adopt(sequence)
        self._committer.publish(sequence, sequence.num_computed)

    def abort(self, attempt: Attempt) -> bool:
        """Drop a sequence in whatever phase. Returns whether it was here. No event follows."""
        sequence = self._phases.get(attempt)
        if sequence is None:
            return False
        self._phases.end(sequence)
        return True

    def release(self, attempt: Attempt) -> None:
        """A sequence to be handed over has been, or is given up: its blocks go. Harmless when it is not here."""
        sequence = self._phases.get(attempt)
        if sequence is not None and not sequence.spec.hand_over:
            raise InternalError(f"{attempt} runs here to its end and was never to be handed over")
        self.abort(attempt)

    # ---- plan, commit --------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None: nothing can run now, or as many plans as may be are uncommitted."""
        if len(self._uncommitted) >= self._max_in_flight:
            return None
        batch = Batch(self._step + 1, now, self._config.max_step_tokens, self._config.max_num_seqs, self._config.max_reported)
        plan = self._form(batch)
        if plan is not None:
            self._step = batch.step
            self._uncommitted.append(InFlight(plan, batch.sequences))
        return plan

    def commit(self, plan: StepPlan, output: StepOutput, now: float) -> list[SequenceEvent]:
        """Take in what the oldest uncommitted plan computed. Returns its events, in the order of its rows."""
        entry = self._oldest(plan)
        check_output(plan, entry.sequences, output)
        self._uncommitted.popleft()
        self._just_ended = {}
        events: list[SequenceEvent] = []
        for sequence, row, answer in zip(entry.sequences, plan.rows, output.rows, strict=True):
            events += self._commit_row(sequence, row, answer)
        return events

    def fail(self, plan: StepPlan) -> list[Attempt]:
        """The executor failed on the oldest uncommitted plan: its sequences are given up. Returns those that were here still."""
        given_up = []
        entry = self._oldest(plan)
        self._uncommitted.popleft()
        for sequence in entry.sequences:
            if sequence.phase is not Phase.ENDED:
                self._phases.end(sequence)
                given_up.append(sequence.attempt)
            self._phases.row_done(sequence)
        return given_up

    def take_events(self) -> list[SequenceEvent]:
        """The PreemptedEvents that `plan` gave rise to since the last call."""
        events: list[SequenceEvent] = list(self._preempted)
        self._preempted.clear()
        return events

    def check(self) -> None:
        """Raise InternalError unless the books are in order."""
        self._phases.check()
        self._pool.check()
        draining = sum(len(s.blocks) for s in self._sequences_in_flight() if s.phase in (Phase.ENDED, Phase.LEAVING))
        if draining != self._phases.draining_blocks:
            raise InternalError(f"{self._phases.draining_blocks} blocks are expected from plans in flight, not {draining}")

    # ---- inside --------------------------------------------------------------------------------

    def _make_parts(self, limits: Limits, prefix_cache: bool) -> tuple[Phases, Batcher]:
        phases = Phases(self._pool, self._config.return_preempted)
        return phases, Batcher(self._pool, phases, limits, prefix_cache, self._preempted)

    def _form(self, batch: Batch) -> StepPlan | None:
        self._batcher.fill(batch)
        return StepPlan(batch.step, tuple(batch.rows)) if batch.rows else None

    def _commit_row(self, sequence: SequenceState, row: StepRow, output: RowOutput) -> list[SequenceEvent]:
        events = self._committer.commit_row(sequence, row, output)
        if events and sequence.phase is Phase.ENDED:
            self._just_ended[sequence.attempt] = sequence.info
        return events

    def _sequences_in_flight(self) -> set[SequenceState]:
        return {sequence for entry in self._uncommitted for sequence in entry.sequences}

    def _sequence(self, spec: SequenceSpec, tokens: list[int], now: float) -> SequenceState:
        self._require_possible(spec, len(tokens))
        self._num_taken_in += 1
        waiting = Waiting(len(tokens), spec.arrival, spec.priority)
        return SequenceState(
            spec=spec,
            limit=self._limit(spec),
            age_key=(-spec.priority, spec.arrival, self._num_taken_in),
            queue_key=(*self._order(waiting), self._num_taken_in),
            chain=HashChain(self._pool.block_size),
            tokens=tokens,
            added=now,
            has_needs=spec.sampling.shaped or spec.sampling.prompt_logprobs is not None or spec.sampling.grammar is not None,
            num_given=len(spec.prompt) + len(spec.output),
        )

    def _limit(self, spec: SequenceSpec) -> int:
        return min(len(spec.prompt) + spec.sampling.max_tokens, self._config.max_model_len)

    def _require_possible(self, spec: SequenceSpec, num_tokens: int) -> None:
        """`num_tokens` is how many are known; there must be something to feed, something to sample, and room for all of it."""
        limit = self._limit(spec)
        if not spec.prompt:
            raise InvalidRequest(f"{spec.attempt}: the prompt is empty, at least one token is needed", field="prompt")
        if num_tokens >= limit:
            raise InvalidRequest(
                f"{spec.attempt}: {num_tokens} tokens are there already and the sequence ends at {limit} (prompt + max_tokens, "
                f"and max_model_len {self._config.max_model_len}): nothing is left to sample",
                field="prompt" if num_tokens >= self._config.max_model_len else "max_tokens",
            )
        num_cached = num_tokens if spec.hand_over else limit - 1  # the last token sampled is never fed
        need = self._pool.num_blocks_for(num_cached)
        if need > self._pool.num_blocks:
            raise InvalidRequest(
                f"{spec.attempt}: KV for {num_cached} tokens needs {need} blocks of {self._pool.block_size}, "
                f"the pool has {self._pool.num_blocks}",
                field="max_tokens",
            )

    @property
    def _has_seat(self) -> bool:
        """Whether a waiting sequence may start as far as the number of those that run is concerned."""
        return len(self._phases.running) < self._config.max_num_seqs

    def _oldest(self, plan: StepPlan) -> InFlight:
        if not self._uncommitted or self._uncommitted[0].plan is not plan:
            oldest = self._uncommitted[0].plan.step if self._uncommitted else "none"
            raise InternalError(f"plan {plan.step} cannot be committed now: the oldest uncommitted plan is {oldest}")
        return self._uncommitted[0]


def _max_in_flight(config: SchedulerConfig) -> int:
    if config.pipeline_stages == 1:
        return config.max_in_flight
    return sys.maxsize if config.eager_pipeline else config.pipeline_stages
