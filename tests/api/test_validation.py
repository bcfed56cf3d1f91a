"""Parameters to submissions: defaults, limits and refusals that name the field."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from baton.api.model_info import ModelInfo
from baton.api.validation import Parameters, check_model, to_submission
from baton.core.errors import DeadlineExceeded, InvalidRequest, ModelNotFound
from baton.core.slo import Slo

MODEL = ModelInfo("m", max_model_len=100, vocab_size=50, dtype="float32", eos_token_ids=(1, 4), temperature=0.7, top_k=9)
PLAIN = Parameters(prompt=(5, 6))


def test_defaults_are_the_models() -> None:
    submission = to_submission(PLAIN, MODEL, None)
    sampling = submission.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 9, 1.0)
    assert sampling.max_tokens == 98  # up to the model's limit
    assert sampling.stop_token_ids == (1, 4)
    assert submission.seed is None


def test_what_is_said_wins() -> None:
    said = replace(PLAIN, temperature=0.0, top_k=0, top_p=0.5, seed=3, stop_token_ids=(7, 4), max_tokens=98, n=2)
    submission = to_submission(said, MODEL, None)
    sampling = submission.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_tokens) == (0.0, 0, 0.5, 98)
    assert sampling.stop_token_ids == (1, 4, 7)
    assert (submission.seed, submission.n) == (3, 2)
    assert to_submission(replace(said, ignore_eos=True), MODEL, None).sampling.stop_token_ids == (7, 4)


def test_default_length_is_clipped_but_a_wish_is_not() -> None:
    long = replace(PLAIN, prompt=(5,) * 95, default_max_tokens=16)
    assert to_submission(long, MODEL, None).sampling.max_tokens == 5
    with pytest.raises(InvalidRequest, match="at most 5 can be asked for") as refused:
        to_submission(replace(long, max_tokens=6), MODEL, None)
    assert refused.value.field == "max_tokens"


def test_kv_pool_is_a_limit_too() -> None:
    assert to_submission(PLAIN, MODEL, 64).sampling.max_tokens == 62
    with pytest.raises(InvalidRequest, match="64 tokens that a worker's KV pool can hold"):
        to_submission(replace(PLAIN, max_tokens=63), MODEL, 64)
    with pytest.raises(InvalidRequest, match="leave no room"):
        to_submission(replace(PLAIN, prompt=(5,) * 64), MODEL, 64)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": ()}, "prompt"),
        ({"prompt": (50,)}, "prompt"),
        ({"prompt": (-1,)}, "prompt"),
        ({"prompt": (5,) * 100}, "prompt"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 1 << 63}, "seed"),
        ({"n": 129}, "n"),
        ({"min_tokens": 11, "max_tokens": 10}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"logit_bias": ((50, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((5, 100.5),)}, "logit_bias"),
        ({"logit_bias": ((5, math.nan),)}, "logit_bias"),
        ({"logit_bias": ((5, 0.0),) * 1025}, "logit_bias"),
        ({"stop": ("a",) * 17}, "stop"),
        ({"stop": ("",)}, "stop"),
        ({"stop_token_ids": (50,)}, "stop_token_ids"),
        ({"priority": 1 << 20}, "priority"),
        ({"slo": Slo(0.0, 1.0)}, "slo"),
        ({"max_tokens": -3, "max_tokens_field": "max_completion_tokens"}, "max_completion_tokens"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: ") as refused:
        to_submission(replace(PLAIN, **fields), MODEL, None)
    assert refused.value.field == field


def test_the_models_own_penalties_are_defaults() -> None:
    own = replace(MODEL, repetition_penalty=1.1, min_p=0.05)
    sampling = to_submission(PLAIN, own, None).sampling
    assert (sampling.repetition_penalty, sampling.min_p) == (1.1, 0.05)
    said = replace(PLAIN, repetition_penalty=1.0, min_p=0.0)
    assert not to_submission(said, own, None).sampling.shaped
    assert not to_submission(PLAIN, MODEL, None).sampling.shaped


def test_best_of_samples_more_and_asks_for_their_likelihood() -> None:
    submission = to_submission(replace(PLAIN, n=2, best_of=5), MODEL, None)
    assert (submission.n, submission.sampling.logprobs) == (5, 0)
    assert to_submission(replace(PLAIN, n=2, best_of=5, logprobs=3), MODEL, None).sampling.logprobs == 3
    assert to_submission(replace(PLAIN, n=2, best_of=2), MODEL, None).sampling.logprobs is None


def test_passed_deadline() -> None:
    with pytest.raises(DeadlineExceeded):
        to_submission(replace(PLAIN, timeout=0.0), MODEL, None)


def test_model_name() -> None:
    check_model("", MODEL)
    check_model("m", MODEL)
    with pytest.raises(ModelNotFound, match="'other'"):
        check_model("other", MODEL)
