"""The token log: order, duplicates, gaps, stale attempts, times."""

from __future__ import annotations

import pytest
from baton.core.request import Attempt, FinishReason, Request, SamplingParams, TokenLogprob, WorkerRef
from baton.router.sequence import Sequence, TokenGap, TokenRun
from hypothesis import given
from hypothesis import strategies as st

P, D, OTHER = WorkerRef("p", 1), WorkerRef("d", 1), WorkerRef("x", 1)
FIRST, SECOND = Attempt("r", 1), Attempt("r", 2)


def new() -> Sequence:
    return Sequence(Request("r", (1, 2), SamplingParams(max_tokens=50), arrival=10.0), 0)


def split(attempt: Attempt = FIRST) -> Sequence:
    sequence = new()
    sequence.place(attempt, None, D)
    sequence.place(attempt, P, None)
    return sequence


def feed(sequence: Sequence, worker: WorkerRef, attempt: Attempt, run: TokenRun, now: float = 11.0) -> None:
    for source, accepted, first in sequence.accept(worker, attempt, run):
        sequence.append(source, accepted, first, now)


def test_decode_worker_may_overtake_the_first_token() -> None:
    sequence = split()
    assert sequence.accept(D, FIRST, TokenRun(1, (11,))) == []
    assert sequence.accept(D, FIRST, TokenRun(2, (12, 13), finish=FinishReason.LENGTH)) == []
    accepted = sequence.accept(P, FIRST, TokenRun(0, (10,)))
    assert [(worker, run.tokens, first) for worker, run, first in accepted] == [
        (P, (10,), True),
        (D, (11,), False),
        (D, (12, 13), False),
    ]
    assert accepted[-1][1].finish is FinishReason.LENGTH


def test_duplicates_are_dropped_with_their_logprobs() -> None:
    sequence = split()
    feed(sequence, P, FIRST, TokenRun(0, (10,)))
    logprobs = tuple(TokenLogprob(token, -1.0) for token in (10, 11, 12))
    feed(sequence, D, FIRST, TokenRun(0, (10, 11, 12), logprobs))
    assert sequence.tokens == [10, 11, 12]
    assert [entry.token for entry in sequence.take().logprobs] == [11, 12]
    feed(sequence, D, FIRST, TokenRun(1, (11,)))
    assert sequence.tokens == [10, 11, 12]


def test_gap_is_never_accepted() -> None:
    sequence = split()
    feed(sequence, P, FIRST, TokenRun(0, (10,)))
    with pytest.raises(TokenGap, match="position 2 cannot follow 1 "):
        sequence.accept(D, FIRST, TokenRun(2, (12,)))
    assert sequence.tokens == [10]


def test_stale_attempts_and_foreign_workers_are_ignored() -> None:
    sequence = split()
    feed(sequence, OTHER, FIRST, TokenRun(0, (99,)))
    feed(sequence, P, FIRST, TokenRun(0, (10,)))
    sequence.place(SECOND, OTHER, OTHER)
    feed(sequence, D, FIRST, TokenRun(1, (98,)))
    assert sequence.tokens == [10]
    assert sequence.attempt_output == [10]
    feed(sequence, OTHER, SECOND, TokenRun(1, (11,)))
    assert sequence.tokens == [10, 11]
    assert sequence.attempt_output == [10]  # what the workers of this attempt were told does not grow
    assert sequence.retries == ["worker_lost"]


def test_retracted_tokens_were_never_there() -> None:
    sequence = split()
    run = TokenRun(0, (10,), (TokenLogprob(10, -1.0),), FinishReason.LENGTH)
    feed(sequence, P, FIRST, run)
    sequence.retract(run)
    assert sequence.tokens == []
    assert not sequence.has_news
    assert sequence.first_token_at is None


def test_stage_times_add_up() -> None:
    sequence = split()
    feed(sequence, P, FIRST, TokenRun(0, (10,), computing=0.25, cached_tokens=1), now=11.0)
    sequence.adopted(FIRST, 11.5)
    feed(sequence, D, FIRST, TokenRun(1, (11,)), now=12.0)
    feed(sequence, D, FIRST, TokenRun(2, (12,)), now=14.0)
    sequence.end(FinishReason.LENGTH, 14.5)
    stages = sequence.stages()
    assert (stages.ttft, stages.queue, stages.prefill) == (1.0, 0.75, 0.25)
    assert (stages.handoff, stages.first_decode) == (0.5, 0.5)
    assert (stages.tpot, stages.total) == (1.5, 4.5)
    assert (sequence.first_worker, sequence.rest_worker, sequence.cached_tokens) == (P, D, 1)


def test_updates_merge_until_they_are_taken() -> None:
    sequence = split()
    feed(sequence, P, FIRST, TokenRun(0, (10,)))
    assert sequence.take().tokens == (10,)
    assert not sequence.has_news
    for position in range(1, 5):
        feed(sequence, D, FIRST, TokenRun(position, (10 + position,)))
    sequence.end(FinishReason.LENGTH, 20.0)
    update = sequence.take()
    assert (update.tokens, update.finish) == ((11, 12, 13, 14), FinishReason.LENGTH)
    assert not sequence.has_news


@given(st.data())
def test_any_interleaving_of_both_workers_gives_the_same_log(data: st.DataObject) -> None:
    """Runs of random length, with repetitions, prefill and decode racing each other."""
    total = data.draw(st.integers(2, 20))
    prefill = [TokenRun(0, (0,))]
    decode, position = [], 1
    while position < total:
        length = data.draw(st.integers(1, total - position))
        start = data.draw(st.integers(max(1, position - 2), position))
        decode.append(TokenRun(start, tuple(range(start, position + length))))
        position += length
    sequence = split()
    streams = {P: prefill, D: decode}
    while any(streams.values()):
        worker = data.draw(st.sampled_from([ref for ref, runs in streams.items() if runs]))
        feed(sequence, worker, FIRST, streams[worker].pop(0))
    assert sequence.tokens == list(range(total))


def test_the_logprobs_of_the_prompt_are_taken_once() -> None:
    of_prompt = (TokenLogprob(2, -1.0),)
    sequence = split()
    feed(sequence, P, FIRST, TokenRun(0, (10,), prompt_logprobs=of_prompt))
    feed(sequence, D, FIRST, TokenRun(1, (11,)))
    assert sequence.take().prompt_logprobs == of_prompt
    sequence.place(SECOND, P, P)
    feed(sequence, P, SECOND, TokenRun(2, (12,)))
    assert sequence.take().prompt_logprobs == ()
    stale = split()
    run = TokenRun(0, (10,), prompt_logprobs=of_prompt)
    feed(stale, P, FIRST, run)
    stale.retract(run)
    stale.place(SECOND, P, P)
    feed(stale, P, SECOND, TokenRun(0, (10,)))
    assert stale.take().prompt_logprobs == ()


def test_plain_tokens_follow_without_a_run() -> None:
    sequence = split()
    assert not sequence.follow(D, 1, 0, [10], 11.0)  # the first token is not plain
    feed(sequence, P, FIRST, TokenRun(0, (10,)))
    assert not sequence.follow(D, 1, 1, [11], 11.5)  # nor is the second
    feed(sequence, D, FIRST, TokenRun(1, (11,)), 11.5)
    assert sequence.follow(D, 1, 2, [12, 13], 12.0)
    assert sequence.take().tokens == (10, 11, 12, 13)
    assert (sequence.rest_worker, sequence.last_token_at) == (D, 12.0)


def test_what_is_not_plain_does_not_follow() -> None:
    sequence = split()
    feed(sequence, P, FIRST, TokenRun(0, (10,)))
    feed(sequence, D, FIRST, TokenRun(1, (11,)))
    for worker, number, position, tokens in (
        (P, 1, 2, [12]),  # not its turn
        (OTHER, 1, 2, [12]),
        (D, 2, 2, [12]),  # another attempt
        (D, 1, 1, [11]),  # known already
        (D, 1, 3, [13]),  # a gap
        (D, 1, 2, []),
    ):
        assert not sequence.follow(worker, number, position, tokens, 12.0)
    assert sequence.tokens == [10, 11]
    sequence.end(FinishReason.ABORT, 12.0)
    assert not sequence.follow(D, 1, 2, [12], 12.0)


def test_log_probabilities_are_not_left_behind() -> None:
    sequence = Sequence(Request("r", (1, 2), SamplingParams(max_tokens=50, logprobs=0), arrival=10.0), 0)
    sequence.place(FIRST, D, D)
    feed(sequence, D, FIRST, TokenRun(0, (10, 11), (TokenLogprob(10, -1.0), TokenLogprob(11, -1.0))))
    assert not sequence.follow(D, 1, 2, [12], 12.0)
