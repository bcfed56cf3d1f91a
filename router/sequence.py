"""One sequence in the router: its token log, the attempt that serves it, and when things happened.

Pure: no clock, no I/O. The log is append-only and what the client sees; whatever workers send is put in
order by position here. Tokens of stale attempts are dropped, repeated ones too, and a gap is never accepted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ..core.request import Attempt, FinishReason, Request, TokenLogprob, WorkerRef
from ..core.slo import time_per_output_token
from ..observability.records import StageTimes


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Consecutive tokens of one sequence; `position` is the output index of the first.

    computing and cached_tokens are set on an attempt's first tokens: seconds from its first step to the token,
    prompt tokens found in the worker's prefix cache. prompt_logprobs come with output token 0.
    """

    position: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    computing: float = 0.0
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)  # made for every message to a client, and freezing it would cost as much again; nobody changes one
class Update:
    """What is new for one sequence since the consumer last looked. `finish` is set on the last one only.

    The first one with tokens carries the log probabilities of the prompt, where they were asked for.
    """

    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class TokenGap(Exception):
    """A worker sent tokens that do not continue the log."""


@dataclass(slots=True)
class _Progress:
    """The attempt in flight. `base` is the length of the log when it was placed: what its workers are told."""

    attempt: Attempt
    base: int
    first_worker: WorkerRef | None = None
    rest_worker: WorkerRef | None = None
    begun: bool = False
    held: tuple[TokenRun, ...] = ()


class Sequence:
    """State of one sequence from arrival to its end."""

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self.done = False
        self.wanted_finish: FinishReason | None = None  # how it ends if it ends well
        self.ended_at = request.arrival
        self.trouble = "worker_lost"  # why the attempt in flight would be replaced
        self.retries: list[str] = []
        self.cached_tokens = 0
        self.first_worker: WorkerRef | None = None  # of the attempts that gave the first token and the others
        self.rest_worker: WorkerRef | None = None
        self._progress: _Progress | None = None
        self._logprobs: list[TokenLogprob] = []  # not yet taken
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()  # not yet taken
        self._taken = 0
        self._finish_taken = False
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self._second_token_at: float | None = None
        self._prefill = 0.0
        self._adopted_at: float | None = None
        self._bare = request.sampling.logprobs is None

    # ---- attempts --------------------------------------------------------------------------------

    @property
    def attempt(self) -> Attempt | None:
        """The attempt in flight, None before the first."""
        return self._progress.attempt if self._progress else None

    @property
    def num_attempts(self) -> int:
        return self._progress.attempt.number if self._progress else 0

    @property
    def workers(self) -> tuple[WorkerRef, ...]:
        """Where the attempt in flight was placed."""
        progress = self._progress
        if progress is None:
            return ()
        return tuple(ref for ref in (progress.first_worker, progress.rest_worker) if ref is not None)

    def place(self, attempt: Attempt, first: WorkerRef | None, rest: WorkerRef | None) -> bool:
        """`attempt` goes to a worker that makes its first token, or the rest, or both. True when the attempt is new."""
        progress = self._progress
        new = progress is None or progress.attempt != attempt
        if new:
            if progress is not None:
                self.retries.append(self.trouble)
                self.trouble = "worker_lost"
            progress = self._progress = _Progress(attempt, len(self.tokens))
        assert progress is not None
        progress.first_worker = first or progress.first_worker
        progress.rest_worker = rest or progress.rest_worker
        return new

    @property
    def attempt_output(self) -> list[int]:
        """The tokens that the attempt in flight starts from, beside the prompt: equal for all of its workers."""
        return self.tokens[: self._progress.base] if self._progress else []

    def awaits_first_token_from(self, worker: WorkerRef) -> bool:
        """Whether the attempt in flight cannot go on without tokens that only `worker` can send."""
        progress = self._progress
        return progress is not None and not progress.begun and progress.first_worker == worker

    # ---- tokens ----------------------------------------------------------------------------------

    def accept(self, worker: WorkerRef, attempt: Attempt, run: TokenRun) -> list[tuple[WorkerRef, TokenRun, bool]]:
        """Put tokens in order: the runs to append now, whose they are, and whether they are the attempt's first.

        Tokens of another attempt or a foreign worker give nothing. A decode worker may be faster than the first
        token of the prefill worker: its runs are held until that has come. Raises TokenGap.
        """
        progress = self._progress
        if self.done or progress is None or progress.attempt != attempt:
            return []
        if worker not in (progress.first_worker, progress.rest_worker):
            return []
        if not progress.begun and worker != progress.first_worker:
            progress.held = (*progress.held, run)
            return []
        first = not progress.begun
        trimmed = self._trim(run, len(self.tokens))
        if trimmed is None:
            return []
        progress.begun = True
        accepted = [(worker, trimmed, first)]
        if first and progress.held and progress.rest_worker is not None:
            length = len(self.tokens) + len(trimmed.tokens)
            for held in progress.held:
                following = self._trim(held, length)
                if following is not None:
                    accepted.append((progress.rest_worker, following, False))
                    length += len(following.tokens)
            progress.held = ()
        return accepted

    def follow(self, worker: WorkerRef, number: int, position: int, tokens: Collection[int], now: float) -> bool:
        """`accept` and `append` of the plainest and commonest run: it goes on where the log ends, and neither ends the
        sequence nor carries log probabilities. False when it is not known to be one: then nothing has happened.
        """
        progress, log = self._progress, self.tokens
        if progress is None or not progress.begun or self.done or progress.attempt.number != number:
            return False
        if worker is not progress.rest_worker or position != len(log) or position < 2 or not (self._bare and tokens):
            return False
        log.extend(tokens)
        self.rest_worker = worker
        self.last_token_at = now
        return True

    def append(self, worker: WorkerRef, run: TokenRun, first: bool, now: float) -> None:
        """Append an accepted run to the log."""
        before, after = len(self.tokens), len(self.tokens) + len(run.tokens)
        if before == 0 < after:
            self.first_worker = worker
            self.first_token_at = now
            self._prefill = run.computing
            self.cached_tokens = run.cached_tokens
            self._prompt_logprobs = run.prompt_logprobs
        elif not first or self.rest_worker is None:
            self.rest_worker = worker
        if before < 2 <= after:
            self._second_token_at = now
        if run.tokens:
            self.last_token_at = now
        self.tokens.extend(run.tokens)
        self._logprobs.extend(run.logprobs)

    def retract(self, run: TokenRun) -> None:
        """Undo the `append` of the latest run, which no consumer has seen: its attempt turned out to be stale."""
        if run.tokens:
            del self.tokens[-len(run.tokens) :]
        if run.logprobs:
            del self._logprobs[-len(run.logprobs) :]
        if not self.tokens:
            self.first_token_at = self.last_token_at = None
            self._prompt_logprobs = ()

    def adopted(self, attempt: Attempt, now: float) -> None:
        """The decode worker runs the sequence."""
        if self.attempt == attempt and self._adopted_at is None:
            self._adopted_at = now

    def end(self, finish: FinishReason, now: float) -> None:
        self.done = True
        self.finish = finish
        self.ended_at = now

    # ---- the consumer's side ---------------------------------------------------------------------

    @property
    def has_news(self) -> bool:
        return self._taken < len(self.tokens) or (self.done and not self._finish_taken)

    def take(self) -> Update:
        """Everything since the last `take`, merged into one update."""
        tokens = tuple(self.tokens[self._taken :])
        self._taken = len(self.tokens)
        self._finish_taken = self.done
        finish = self.finish if self.done else None
        if not self._logprobs and not self._prompt_logprobs:
            return Update(self.index, tokens, (), finish)
        logprobs, prompt_logprobs = tuple(self._logprobs), self._prompt_logprobs
        self._logprobs.clear()
        self._prompt_logprobs = ()
        return Update(self.index, tokens, logprobs, finish, prompt_logprobs)

    def drop_news(self) -> None:
        """The consumer has what it wants."""
        self._taken = len(self.tokens)
        self._logprobs.clear()
        self._prompt_logprobs = ()
        self._finish_taken = True

    # ---- times -----------------------------------------------------------------------------------

    def stages(self) -> StageTimes:
        """Where the time went; `total` counts up to the end, or to the last token while it runs."""
        arrival, first, second = self.request.arrival, self.first_token_at, self._second_token_at
        total = (self.ended_at if self.done else (self.last_token_at or arrival)) - arrival
        if first is None or self.last_token_at is None:
            return StageTimes(total=total)
        ttft = first - arrival
        prefill = min(self._prefill, ttft)
        if second is None or len(self.tokens) < 2:
            return StageTimes(ttft=ttft, queue=ttft - prefill, prefill=prefill, total=total)
        handoff = min(max(0.0, self._adopted_at - first), second - first) if self._adopted_at is not None else 0.0
        return StageTimes(
            ttft=ttft,
            queue=ttft - prefill,
            prefill=prefill,
            total=total,
            handoff=handoff,
            first_decode=second - first - handoff,
            tpot=time_per_output_token(first, self.last_token_at, len(self.tokens)),
        )

    @staticmethod
    def _trim(run: TokenRun, length: int) -> TokenRun | None:
        """`run` without what a log of `length` tokens has already; None when nothing is left. Raises TokenGap."""
        if run.position > length:
            raise TokenGap(f"tokens at position {run.position} cannot follow {length} tokens")
        skip = length - run.position
        if skip == 0:
            return run
        if skip >= len(run.tokens) and run.finish is None:
            return None
        return replace(run, position=length, tokens=run.tokens[skip:], logprobs=run.logprobs[skip:])
