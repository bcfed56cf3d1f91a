"""Bias, penalties, bans and min-p: the logits they leave, and that draws follow the exact probabilities."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from baton.core.request import Attempt, SamplingParams
from baton.core.step import StepRow
from baton.engine.sampler import prompt_logprobs, sample
from baton.engine.shaping import BadWords, Shaper, shape
from baton.tests.engine.sampling_oracle import assert_distributed, probabilities, shaped
from hypothesis import given, settings
from hypothesis import strategies as st

VOCABULARY = 12
LOGITS = [1.0, 0.3, -0.5, 2.0, 1.7, 0.0, -1.0, 0.9, 1.2, -2.0, 0.5, 1.9]
PROMPT, OUTPUT = (3, 4, 4, 9), (11, 3, 11, 5, 11)
TOKENS = st.integers(0, VOCABULARY - 1)


def row(params: SamplingParams, output_index: int = 0) -> StepRow:
    return StepRow(Attempt("r", 1), 0, (1,), (0,), params, output_index, True)


def shaper(params: SamplingParams, prompt: tuple[int, ...], output: tuple[int, ...], known: int = 0) -> Shaper:
    """As if the history had been given after `known` output tokens and the others were sampled since."""
    made = Shaper(params, prompt + output[:known], known)
    for token in output[known:]:
        made.append(token)
    return made


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.floats(-5, 5, width=32), min_size=VOCABULARY, max_size=VOCABULARY),
    prompt=st.lists(TOKENS, min_size=1, max_size=8),
    output=st.lists(TOKENS, max_size=40),
    penalties=st.tuples(st.floats(-2, 2), st.floats(-2, 2), st.sampled_from([1.0, 0.7, 1.3])),
    bias=st.dictionaries(TOKENS, st.floats(-100, 100), max_size=4),
    bad_words=st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=5),
    known=st.integers(0, 40),
)
def test_shaped_logits_equal_the_oracle(
    logits: list[float],
    prompt: list[int],
    output: list[int],
    penalties: tuple[float, float, float],
    bias: dict[int, float],
    bad_words: list[tuple[int, ...]],
    known: int,
) -> None:
    params = SamplingParams(
        presence_penalty=penalties[0],
        frequency_penalty=penalties[1],
        repetition_penalty=penalties[2],
        logit_bias=tuple(bias.items()),
        bad_words=tuple(bad_words),
    )
    grown = shaper(params, tuple(prompt), tuple(output), min(known, len(output)))
    both = torch.tensor([logits, logits])
    shape(both, {1: grown})
    assert both[0].tolist() == logits  # its neighbour is not concerned
    assert both[1].tolist() == pytest.approx(shaped(logits, params, prompt, output), rel=1e-5, abs=1e-4)


CASES = {
    "min-p": SamplingParams(min_p=0.3),
    "min-p of 1 keeps the likeliest": SamplingParams(min_p=1.0, temperature=3.0),
    "min-p after temperature": SamplingParams(min_p=0.2, temperature=0.5),
    "min-p before top-k and top-p": SamplingParams(min_p=0.25, top_k=6, top_p=0.8, temperature=1.3),
    "presence": SamplingParams(presence_penalty=1.5),
    "presence rewards": SamplingParams(presence_penalty=-1.0),
    "frequency": SamplingParams(frequency_penalty=0.6),
    "repetition": SamplingParams(repetition_penalty=1.8),
    "repetition below 1": SamplingParams(repetition_penalty=0.6, temperature=1.4),
    "bias": SamplingParams(logit_bias=((3, -100.0), (9, 4.0), (2, 1.0))),
    "bad words": SamplingParams(bad_words=((4,), (5, 11, 3), (11, 0), (7, 11, 1))),
    "min tokens": SamplingParams(min_tokens=6, stop_token_ids=(3, 11)),
    "min tokens reached": SamplingParams(min_tokens=5, stop_token_ids=(3, 11)),
    "all together": SamplingParams(
        temperature=0.8,
        top_k=9,
        top_p=0.95,
        min_p=0.02,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        logit_bias=((9, 3.0), (11, 2.0)),
        bad_words=((8,), (11, 4)),
        min_tokens=9,
        stop_token_ids=(0,),
    ),
}


@pytest.mark.parametrize("params", CASES.values(), ids=CASES)
def test_draws_have_the_exact_distribution(params: SamplingParams) -> None:
    exact = probabilities(shaped(LOGITS, params, PROMPT, OUTPUT), params)
    num_draws = 4000
    rows = [row(replace(params, seed=seed), len(OUTPUT)) for seed in range(num_draws)]
    shapers = dict.fromkeys(range(num_draws), shaper(params, PROMPT, OUTPUT)) if params.shaped else {}
    outputs = sample(torch.tensor([LOGITS]).repeat(num_draws, 1), rows, None, shapers)
    counts = Counter(output.tokens[0] for output in outputs)
    assert_distributed([counts[token] for token in range(VOCABULARY)], exact)
    plain = probabilities(LOGITS, SamplingParams(temperature=params.temperature))
    if params.min_tokens != len(OUTPUT):
        with pytest.raises(AssertionError):  # and would be seen if the parameters did nothing
            assert_distributed([counts[token] for token in range(VOCABULARY)], plain)


def test_whole_sequences_have_the_exact_distribution() -> None:
    """Three tokens in a row, each penalised by those before it: 27 sequences of exactly known probabilities."""
    logits = [0.7, -0.4, 0.2]
    params = SamplingParams(
        frequency_penalty=0.8,
        presence_penalty=-0.5,
        repetition_penalty=1.5,
        bad_words=((0, 1), (2, 2, 0)),
        logit_bias=((1, 0.5),),
    )
    prompt, num_sequences = (2,), 6000
    rows = [[row(replace(params, seed=seed), index) for seed in range(num_sequences)] for index in range(3)]
    shapers = {i: Shaper(params, prompt, 0) for i in range(num_sequences)}
    drawn: list[tuple[int, ...]] = [()] * num_sequences
    for step in range(3):
        outputs = sample(torch.tensor([logits]).repeat(num_sequences, 1), rows[step], None, shapers)
        for i, output in enumerate(outputs):
            shapers[i].append(output.tokens[0])
            drawn[i] += output.tokens
    counts = Counter(drawn)
    possible = list(product(range(3), repeat=3))
    exact = []
    for tokens in possible:
        p = 1.0
        for index, token in enumerate(tokens):
            p *= probabilities(shaped(logits, params, prompt, tokens[:index]), params)[token]
        exact.append(p)
    assert sum(exact) == pytest.approx(1.0)
    assert_distributed([counts[tokens] for tokens in possible], exact)


def test_greedy_rows_are_shaped_too() -> None:
    def greedy(params: SamplingParams) -> int:
        params = replace(params, temperature=0.0)
        return sample(torch.tensor([LOGITS]), [row(params, 5)], None, {0: shaper(params, PROMPT, OUTPUT)})[0].tokens[0]

    assert greedy(SamplingParams()) == 3
    assert greedy(SamplingParams(frequency_penalty=2.0)) == 4  # 3 and 11 were sampled
    assert greedy(SamplingParams(repetition_penalty=5.0)) == 8  # 4 is in the prompt
    assert greedy(SamplingParams(logit_bias=((9, 5.0),))) == 9
    assert greedy(SamplingParams(bad_words=((5, 11, 3), (11, 11), (4, 11, 4)))) == 4
    assert greedy(SamplingParams(min_p=1.0, top_p=0.1)) == 3


def test_shaped_and_plain_rows_in_one_batch_equal_rows_alone() -> None:
    torch.manual_seed(0)
    kinds = [SamplingParams(seed=4), SamplingParams(temperature=0.0), *CASES.values()]
    kinds = [replace(kind, seed=seed, logprobs=2) for seed, kind in enumerate(kinds)]
    rows = [row(kind, len(OUTPUT)) for kind in kinds]
    shapers = {i: shaper(kind, PROMPT, OUTPUT) for i, kind in enumerate(kinds) if kind.shaped}
    logits = torch.randn(len(rows), 300)
    together = sample(logits.clone(), rows, None, shapers)
    for i, each in enumerate(rows):
        alone = sample(logits[i : i + 1].clone(), [each], None, {0: shapers[i]} if i in shapers else {})
        assert together[i] == alone[0]


def test_logprobs_are_of_the_logits_as_they_came() -> None:
    params = SamplingParams(temperature=0.0, logprobs=1, logit_bias=((9, 50.0),), presence_penalty=2.0)
    (output,) = sample(torch.tensor([LOGITS]), [row(params)], None, {0: shaper(params, PROMPT, OUTPUT)})
    exact = torch.log_softmax(torch.tensor(LOGITS), 0)
    assert output.tokens == (9,)
    assert output.logprobs[0].logprob == pytest.approx(float(exact[9]))
    assert output.logprobs[0].top == ((3, pytest.approx(float(exact[3]))),)


def test_bad_words_count_from_the_first_output_token() -> None:
    words = ((1,), (2, 3), (2, 2, 4), (5, 6, 7, 8))
    assert BadWords(words, ()).completions() == [1]
    assert sorted(BadWords(words, (2,)).completions()) == [1, 3]
    assert sorted(BadWords(words, (9, 2, 2)).completions()) == [1, 3, 4]
    assert sorted(BadWords(words, (5, 6, 7)).completions()) == [1, 8]
    assert BadWords(words, (6, 7)).completions() == [1]
    prompt_does_not_count = Shaper(SamplingParams(bad_words=words), (5, 6, 7), 0)
    assert prompt_does_not_count.banned() == [1]
    beyond = torch.zeros(1, 6)
    shape(beyond, {0: shaper(SamplingParams(bad_words=words), (0,), (5, 6, 7))})  # 8 is outside of this vocabulary
    assert beyond[0].tolist() == [0.0, -math.inf, 0.0, 0.0, 0.0, 0.0]


def test_everything_banned_still_gives_a_token() -> None:
    words = tuple((token,) for token in range(VOCABULARY))
    for params in (
        SamplingParams(temperature=0.0, bad_words=words),
        SamplingParams(seed=1, min_p=0.5, top_p=0.5, bad_words=words),
    ):
        (output,) = sample(torch.tensor([LOGITS]), [row(params)], None, {0: shaper(params, PROMPT, ())})
        assert 0 <= output.tokens[0] < VOCABULARY


def test_prompt_logprobs_are_those_of_the_targets() -> None:
    torch.manual_seed(1)
    logits = torch.randn(5, 40).to(torch.bfloat16)
    exact = torch.log_softmax(logits.float(), -1)
    for num_top in (0, 3, 100):
        entries = prompt_logprobs(logits, (7, 7, 0, 39, 2), num_top)
        assert [entry.token for entry in entries] == [7, 7, 0, 39, 2]
        for position, entry in enumerate(entries):
            assert entry.logprob == pytest.approx(float(exact[position, entry.token]))
            assert [token for token, _ in entry.top] == exact[position].topk(min(num_top, 40)).indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(exact[position].topk(min(num_top, 40)).values.tolist())
