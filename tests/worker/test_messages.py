from __future__ import annotations

from baton.core.request import Attempt, FinishReason, TokenLogprob
from baton.core.step import TokenEvent
from baton.proto import worker_pb2 as pb
from baton.worker.messages import attempt_from, attempt_to, spec_from, tokens_to


def test_a_sequence_arrives_as_it_was_sent() -> None:
    message = pb.SequenceSpec(
        attempt=pb.AttemptId(request_id="r", number=2),
        prompt=[1, 2, 3],
        output=[4],
        sampling=pb.SamplingSpec(temperature=0.5, top_k=3, top_p=0.9, seed=2**62, max_tokens=7, stop_token_ids=[9]),
        priority=-1,
        age=2.5,
    )
    spec = spec_from(message, now=12.5, hand_over=True)
    assert spec.attempt == Attempt("r", 2)
    assert spec.known_tokens == (1, 2, 3, 4)
    assert spec.sampling.seed == 2**62
    assert spec.sampling.stop_token_ids == (9,)
    assert spec.sampling.logprobs is None
    assert (spec.arrival, spec.hand_over, spec.priority) == (10.0, True, -1)


def test_zero_logprobs_differs_from_none() -> None:
    message = pb.SequenceSpec(sampling=pb.SamplingSpec(logprobs=0))
    assert spec_from(message, 0.0, False).sampling.logprobs == 0


def test_a_token_event_keeps_position_finish_and_logprobs() -> None:
    event = TokenEvent(Attempt("r", 1), 5, (8,), (TokenLogprob(8, -0.5, ((8, -0.5), (3, -1.0))),), FinishReason.STOP)
    message = tokens_to(event, 0.5, 32)
    assert attempt_from(message.attempt) == event.attempt
    assert attempt_to(event.attempt) == message.attempt
    assert (message.position, list(message.tokens), message.finish, message.cached_tokens) == (5, [8], "stop", 32)
    assert list(message.logprobs[0].top_tokens) == [8, 3]
