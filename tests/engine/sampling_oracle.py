"""Sampling in plain Python, one token at a time: what the sampler's tests compare with. Slow and obviously right."""

from __future__ import annotations

import math
from collections.abc import Sequence

from baton.core.request import SamplingParams

# 99.9 % quantiles of the chi-square distribution with 1, 2, 3, ... degrees of freedom.
QUANTILES = (10.8, 13.8, 16.3, 18.5, 20.5, 22.5, 24.3, 26.1, 27.9, 29.6, 31.3, 32.9, 34.5, 36.1, 37.7, 39.3, 40.8, 42.3)


def shaped(logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> list[float]:
    """Logits after bias, penalties and bans, in the order of vLLM."""
    values = list(logits)
    for token, bias in params.logit_bias:
        values[token] += bias
    for token in set(prompt) | set(output):
        values[token] *= 1 / params.repetition_penalty if values[token] > 0 else params.repetition_penalty
    for token in set(output):
        values[token] -= params.frequency_penalty * list(output).count(token) + params.presence_penalty
    for word in params.bad_words:
        if list(word[:-1]) == list(output)[len(output) - len(word) + 1 :] and len(word) <= len(output) + 1:
            values[word[-1]] = -math.inf
    if len(output) < params.min_tokens:
        for token in params.stop_token_ids:
            values[token] = -math.inf
    return values


def probabilities(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """Exact probabilities after temperature, min-p, top-k and top-p, each over what the one before it left."""
    kept = _softmax([value / params.temperature for value in logits])
    kept = [p if p >= params.min_p * max(kept) else 0.0 for p in kept]
    if 0 < params.top_k < len(kept):
        least = sorted(kept, reverse=True)[params.top_k - 1]
        kept = [p if p >= least else 0.0 for p in kept]
    if params.top_p < 1.0:
        total, mass, least = sum(kept), 0.0, 0.0
        for p in sorted(kept, reverse=True):
            if mass < params.top_p * total:
                least = p
            mass += p
        kept = [p if p >= least else 0.0 for p in kept]
    return [p / sum(kept) for p in kept]


def assert_distributed(counts: Sequence[int], exact: Sequence[float]) -> None:
    """Chi-square at 99.9 %: `counts` are draws of a distribution with these probabilities."""
    num_draws = sum(counts)
    assert all(count == 0 for count, p in zip(counts, exact, strict=True) if p == 0.0), (counts, exact)
    expected = [(count, p * num_draws) for count, p in zip(counts, exact, strict=True) if p > 0.0]
    if len(expected) == 1:
        return
    distance = sum((count - wanted) ** 2 / wanted for count, wanted in expected)
    freedom = len(expected) - 1
    # Beyond the table by Wilson and Hilferty (1931), which is exact enough there.
    far = freedom * (1 - 2 / (9 * freedom) + 3.0902 * math.sqrt(2 / (9 * freedom))) ** 3
    assert distance < (QUANTILES[freedom - 1] if freedom <= len(QUANTILES) else far), (counts, exact)


def _softmax(values: Sequence[float]) -> list[float]:
    best = max(values)
    weights = [math.exp(value - best) for value in values]
    return [weight / sum(weights) for weight in weights]
