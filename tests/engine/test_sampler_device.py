"""Logits on a GPU are sampled with every mask and weight there too, and no answer from it before the tokens.

Checked with tensors of the device `meta`: it is not the host's, so mixing the two is refused as with a GPU, and it holds no
numbers, so whoever asks for one is refused too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from baton.core.request import Attempt, SamplingParams
from baton.core.step import StepRow
from baton.engine.sampler import prompt_logprobs, sample
from baton.engine.shaping import Shaper
from baton.kernels.batch import DrawSpec
from baton.kernels.table import KERNELS
from torch import Tensor

VOCABULARY = 50
SHAPED = SamplingParams(
    temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.5, logit_bias=((3, 1.0), (7, -2.0))
)


def on_device(logits: Tensor) -> Tensor:
    """Tokens of a kernel: real ones, so that the sampler can go on."""
    assert logits.device.type == "meta"
    return torch.arange(len(logits))


def drawn_on_device(logits: Tensor, specs: Sequence[DrawSpec]) -> Tensor:
    assert len(logits) == len(specs)
    return on_device(logits)


def row(params: SamplingParams) -> StepRow:
    return StepRow(Attempt("r", 1), 0, (1,), (0,), params, 0, True)


def test_rows_of_all_kinds_are_sampled_where_their_logits_are() -> None:
    kernels = replace(KERNELS["reference"], argmax=on_device, draw=drawn_on_device)
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=3, top_k=5, min_p=0.1),
        SHAPED,
        replace(SHAPED, temperature=1.0, bad_words=((4,), (9,))),
        SamplingParams(temperature=0.0, min_tokens=4, stop_token_ids=(2, 6)),
    ]
    shapers = {i: Shaper(kind, (1, 2, 3), 1) for i, kind in enumerate(kinds) if kind.shaped}
    masks = {0: np.arange(VOCABULARY) % 2 == 0}
    logits = torch.empty(len(kinds), VOCABULARY, dtype=torch.bfloat16, device="meta")
    outputs = sample(logits, [row(kind) for kind in kinds], masks, shapers, kernels)
    assert [output.tokens for output in outputs] == [(0,), (0,), (2,), (1,), (4,)]


def test_a_batch_that_is_drawn_whole_is_handed_over_whole() -> None:
    kernels = replace(KERNELS["reference"], argmax=None, draw=drawn_on_device)
    logits = torch.empty(3, VOCABULARY, device="meta")
    outputs = sample(logits, [row(SamplingParams(seed=i)) for i in range(3)], None, None, kernels)
    assert [output.tokens for output in outputs] == [(0,), (1,), (2,)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_answers_what_the_cpu_does() -> None:
    kinds = [SHAPED, SamplingParams(temperature=0.0, logprobs=3), replace(SHAPED, bad_words=((4,), (9,)), logprobs=0)]
    rows = [row(kind) for kind in kinds]
    logits = torch.randn(len(kinds), VOCABULARY)
    answers = []
    for device in ("cpu", "cuda"):
        shapers = {i: Shaper(kind, (1, 2, 3), 1) for i, kind in enumerate(kinds) if kind.shaped}
        there = logits.clone().to(device)
        targets = prompt_logprobs(there, (1, 2, 3), 2)
        answers.append((sample(there, rows, {0: np.arange(VOCABULARY) % 2 == 0}, shapers, KERNELS["reference"]), targets))
    (outputs, prompts), (expected_outputs, expected_prompts) = answers
    assert [output.tokens for output in outputs] == [output.tokens for output in expected_outputs]
    for got, expected in zip(
        (*outputs[1].logprobs, *outputs[2].logprobs, *prompts),
        (*expected_outputs[1].logprobs, *expected_outputs[2].logprobs, *expected_prompts),
        strict=True,
    ):
        assert (got.token, [token for token, _ in got.top]) == (expected.token, [token for token, _ in expected.top])
        assert got.logprob == pytest.approx(expected.logprob, abs=1e-4)
