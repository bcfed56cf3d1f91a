"""How many tokens a request has: single distributions, pairs of prompt and answer, and those fitted to a trace.

A distribution draws from the generator that it is given and keeps none of its own. Must never draw less than 1 token.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Protocol

from ...core.errors import InvalidRequest
from .planned import PlannedRequest

LENGTH_FORMS = "a number, uniform:LOW,HIGH, exponential:MEAN or lognormal:MEAN,CV"

_FIT_SHARES = (0.0, 0.01, *(share / 20 for share in range(1, 20)), 0.99, 0.999, 1.0)


class LengthDistribution(Protocol):
    """A number of tokens."""

    def draw(self, random: Random) -> int: ...


class RequestLengths(Protocol):
    """The tokens of a prompt and of its answer."""

    def draw(self, inputs: Random, outputs: Random) -> tuple[int, int]:
        """Prompts and answers have generators of their own: another kind of answer leaves all prompts as they were."""
        ...


@dataclass(frozen=True, slots=True)
class Length:
    """A number of tokens: fixed (`low == high`), uniform over both ends, exponential or lognormal with mean `high`.

    cv  standard deviation over mean; of the lognormal alone
    """

    kind: str
    low: int
    high: int
    cv: float = 0.0

    def draw(self, random: Random) -> int:
        """At least 1."""
        match self.kind:
            case "fixed":
                return self.high
            case "uniform":
                return random.randint(self.low, self.high)
            case "lognormal":
                return max(self.low, round(random.lognormvariate(*_lognormal(self.high, self.cv))))
        return max(self.low, round(random.expovariate(1 / self.high)))

    def __str__(self) -> str:
        values = {"fixed": f"{self.high}", "uniform": f"{self.low},{self.high}", "lognormal": f"{self.high},{self.cv:g}"}
        return ("" if self.kind == "fixed" else f"{self.kind}:") + values.get(self.kind, f"{self.high}")


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution given by its quantiles, with straight lines between them over the logarithm of the length.

    knots  (share, tokens) from share 0 to share 1, neither ever falling, tokens >= 1
    """

    knots: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        shares, tokens = [share for share, _ in self.knots], [count for _, count in self.knots]
        if shares[:1] != [0.0] or shares[-1:] != [1.0] or shares != sorted(shares) or tokens != sorted(tokens) or tokens[0] < 1:
            raise InvalidRequest(f"quantiles {self.knots}: shares must rise from 0 to 1 and tokens, at least 1, with them")

    def draw(self, random: Random) -> int:
        share = random.random()
        above = max(bisect_right(self.knots, share, key=lambda knot: knot[0]), 1)
        (low_share, low), (high_share, high) = self.knots[above - 1], self.knots[above]
        return max(1, round(low * math.exp(math.log(high / low) * (share - low_share) / (high_share - low_share))))

    def share_below(self, tokens: float) -> float:
        """The share of lengths that are at most `tokens`."""
        above = bisect_right(self.knots, tokens, key=lambda knot: knot[1])
        if above in (0, len(self.knots)):
            return 0.0 if above == 0 else 1.0
        (low_share, low), (high_share, high) = self.knots[above - 1], self.knots[above]
        return low_share + (high_share - low_share) * math.log(tokens / low) / math.log(high / low)

    @property
    def mean(self) -> float:
        """Before rounding to whole tokens."""
        parts = []
        for (low_share, low), (high_share, high) in pairwise(self.knots):
            average = low if high == low else (high - low) / math.log(high / low)
            parts.append((high_share - low_share) * average)
        return math.fsum(parts)


@dataclass(frozen=True, slots=True)
class IndependentLengths:
    """A prompt's length says nothing about its answer's. Where both together pass `max_total`, the model's limit, the prompt
    is cut down, and an answer that is longer than the limit too."""

    input: LengthDistribution
    output: LengthDistribution
    max_total: int | None = None

    def draw(self, inputs: Random, outputs: Random) -> tuple[int, int]:
        prompt, answer = self.input.draw(inputs), self.output.draw(outputs)
        if self.max_total is not None and prompt + answer > self.max_total:
            answer = min(answer, self.max_total - 1)
            prompt = min(prompt, self.max_total - answer)
        return prompt, answer


@dataclass(frozen=True, slots=True)
class EmpiricalLengths:
    """The pairs of a trace, drawn anew in any order: what prompts and answers have to do with each other is kept."""

    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, requests: Iterable[PlannedRequest]) -> EmpiricalLengths:
        """Of a trace. Raises InvalidRequest when it is empty."""
        pairs = tuple((request.input_tokens, request.output_tokens) for request in requests)
        if not pairs:
            raise InvalidRequest("lengths cannot be taken from an empty workload; give at least one request", "trace")
        return cls(pairs)

    def draw(self, inputs: Random, outputs: Random) -> tuple[int, int]:
        return self.pairs[int(inputs.random() * len(self.pairs))]

    def fit(self) -> FittedLengths:
        """Smooth distributions with the same marginals, and what is lost by them."""
        inputs, outputs = [pair[0] for pair in self.pairs], [pair[1] for pair in self.pairs]
        return FittedLengths(fit_lengths(inputs), fit_lengths(outputs), _rank_correlation(inputs, outputs))


@dataclass(frozen=True, slots=True)
class LengthFit:
    """One marginal: two forms and how far each is from the data.

    quantile_error, lognormal_error   largest distance between the form's distribution function and the data's (Kolmogorov
                                      and Smirnov): 0.05 means that no share of requests is off by more than 5 points
    """

    count: int
    mean: float
    cv: float
    quantiles: Quantiles
    quantile_error: float
    lognormal: Length
    lognormal_error: float


@dataclass(frozen=True, slots=True)
class FittedLengths:
    """Quantiles of both marginals, drawn independently; `correlation` is the rank correlation (Spearman) that this ignores."""

    input: LengthFit
    output: LengthFit
    correlation: float

    def draw(self, inputs: Random, outputs: Random) -> tuple[int, int]:
        return self.input.quantiles.draw(inputs), self.output.quantiles.draw(outputs)


def parse_length(text: str, name: str) -> Length:
    """`512`, `uniform:64,512`, `exponential:256` or `lognormal:256,0.8`; `name` is the option, for the error."""
    kind, _, values = text.partition(":") if ":" in text else ("fixed", "", text)
    first, _, spread = values.partition(",")
    cv = 0.0
    try:
        if kind == "lognormal":
            values, cv = first, float(spread)
        numbers = [int(value) for value in values.split(",")]
    except ValueError:
        numbers = []
    expected = {"fixed": 1, "uniform": 2, "exponential": 1, "lognormal": 1}.get(kind)
    usable = expected == len(numbers) and min(numbers) >= 1 and numbers[0] <= numbers[-1]
    if not usable or (kind == "lognormal" and not 0 < cv < math.inf):
        raise InvalidRequest(
            f"{name}: {text!r} is no length; allowed is {LENGTH_FORMS}, whole numbers of tokens >= 1 and a CV above 0", name
        )
    return Length(kind, 1 if kind in ("exponential", "lognormal") else numbers[0], numbers[-1], cv)


def fit_lengths(lengths: Sequence[int]) -> LengthFit:
    """Both forms fitted to `lengths`: quantiles at every 5% and the tails, and the lognormal with the same mean and CV.

    Raises InvalidRequest for no data and for lengths below 1.
    """
    ordered = sorted(lengths)
    if not ordered or ordered[0] < 1:
        raise InvalidRequest(f"{len(ordered)} lengths from {ordered[:1]} cannot be fitted; give some, each at least 1 token")
    mean = math.fsum(ordered) / len(ordered)
    cv = math.sqrt(math.fsum((length - mean) ** 2 for length in ordered) / len(ordered)) / mean
    knots = tuple((share, float(ordered[round(share * (len(ordered) - 1))])) for share in _FIT_SHARES)
    quantiles = Quantiles(knots)
    lognormal = Length("lognormal", 1, round(mean), cv) if cv > 0 else Length("fixed", round(mean), round(mean))
    return LengthFit(
        len(ordered),
        mean,
        cv,
        quantiles,
        max(abs(quantiles.share_below(length + 0.5) - share) for length, share in _steps(ordered)),
        lognormal,
        max(abs(_share_below(lognormal, length + 0.5) - share) for length, share in _steps(ordered)),
    )


def _steps(ordered: Sequence[int]) -> Iterable[tuple[int, float]]:
    """Every distinct length and the share of the data up to it."""
    place = 0
    while place < len(ordered):
        length = ordered[place]
        place = bisect_right(ordered, length, lo=place)
        yield length, place / len(ordered)


def _lognormal(mean: float, cv: float) -> tuple[float, float]:
    """mu and sigma of the lognormal with this mean and CV."""
    variance = math.log1p(cv * cv)
    return math.log(mean) - variance / 2, math.sqrt(variance)


def _share_below(length: Length, tokens: float) -> float:
    if length.kind == "fixed":
        return float(tokens >= length.high)
    mu, sigma = _lognormal(length.high, length.cv)
    return 0.5 * (1 + math.erf((math.log(tokens) - mu) / (sigma * math.sqrt(2))))


def _rank_correlation(first: Sequence[int], second: Sequence[int]) -> float:
    """Spearman's, ties sharing their mean rank; 0 where one of the two never varies."""
    one, other = _ranks(first), _ranks(second)
    middle = (len(one) - 1) / 2
    products = math.fsum((a - middle) * (b - middle) for a, b in zip(one, other, strict=True))
    spread = math.fsum((a - middle) ** 2 for a in one) * math.fsum((b - middle) ** 2 for b in other)
    return products / math.sqrt(spread) if spread else 0.0


def _ranks(values: Sequence[int]) -> list[float]:
    ordered = sorted(values)
    return [(bisect_left(ordered, value) + bisect_right(ordered, value) - 1) / 2 for value in values]
