from __future__ import annotations

from dataclasses import fields

from baton.core.request import Attempt, FinishReason, Request, SamplingParams, TokenLogprob
from baton.core.step import TokenEvent
from baton.core.view import WorkerLoad
from baton.proto import worker_pb2 as pb
from baton.router.wire import load_from, run_from, spec_to
from baton.worker.messages import attempt_from, attempt_to, heartbeat_to, spec_from, tokens_to


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
    message = pb.SequenceSpec(sampling=pb.SamplingSpec(logprobs=0, prompt_logprobs=0))
    sampling = spec_from(message, 0.0, False).sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (0, 0)
    silent = spec_from(pb.SequenceSpec(), 0.0, False).sampling
    assert (silent.logprobs, silent.prompt_logprobs, silent.repetition_penalty) == (None, None, 1.0)


def test_every_parameter_crosses_the_wire() -> None:
    """Each field has a value of its own, so that a field that is added and not sent is noticed here."""
    sampling = SamplingParams(
        temperature=0.3,
        top_k=4,
        top_p=0.7,
        seed=2**63 - 1,
        sequence_index=3,
        max_tokens=9,
        min_tokens=2,
        stop_token_ids=(1, 5),
        logprobs=2,
        min_p=0.1,
        presence_penalty=-0.3,
        frequency_penalty=0.7,
        repetition_penalty=1.7,
        logit_bias=((3, -0.1), (8, 99.9)),
        bad_words=((4,), (5, 6)),
        prompt_logprobs=1,
        grammar="start: /a+/",
    )
    neutral = SamplingParams()
    assert all(getattr(sampling, each.name) != getattr(neutral, each.name) for each in fields(SamplingParams))
    request = Request("r", (1, 2), sampling, arrival=1.0)
    for output in ((), (7,)):
        wire = pb.SequenceSpec.FromString(spec_to(Attempt("r", 1), request, output, 2.0).SerializeToString())
        assert spec_from(wire, 2.0, False).sampling == sampling
        assert spec_from(wire, 2.0, False).output == output


def test_a_load_report_crosses_the_wire_whole() -> None:
    load = WorkerLoad(3, True, 0.5, 100.0, 0.02, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    assert all(getattr(load, each.name) != getattr(WorkerLoad(), each.name) for each in fields(WorkerLoad))
    assert load_from(pb.Heartbeat.FromString(heartbeat_to(load, draining=False).SerializeToString())) == load


def test_prompt_logprobs_cross_the_wire() -> None:
    exact = (TokenLogprob(8, -0.5, ((8, -0.5), (3, -1.0))), TokenLogprob(9, -2.0))
    event = TokenEvent(Attempt("r", 1), 0, (8,), prompt_logprobs=exact)
    assert run_from(tokens_to(event, 0.0, 0)).prompt_logprobs == exact


def test_a_token_event_keeps_position_finish_and_logprobs() -> None:
    event = TokenEvent(Attempt("r", 1), 5, (8,), (TokenLogprob(8, -0.5, ((8, -0.5), (3, -1.0))),), FinishReason.STOP)
    message = tokens_to(event, 0.5, 32)
    assert attempt_from(message.attempt) == event.attempt
    assert attempt_to(event.attempt) == message.attempt
    assert (message.position, list(message.tokens), message.finish, message.cached_tokens) == (5, [8], "stop", 32)
    assert list(message.logprobs[0].top_tokens) == [8, 3]
