"""What a search asks the simulator, as data that crosses processes: functions of a module, frozen questions and answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from .goodput import Goodput, GoodputOptions, Trial, find_goodput
from .trial import Case, Observation, observe, try_rate


@dataclass(frozen=True, slots=True)
class Question:
    """Find the goodput of `case`, from `guess` and not above `most`; but when `must_reach` is given, first try that rate and
    go on only if it is reached. `near`: the guess is a goodput of the same case with another seed."""

    case: Case
    guess: float
    most: float
    options: GoodputOptions
    must_reach: float | None = None
    near: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """goodput is None when `tried` failed."""

    goodput: Goodput | None
    tried: Trial | None
    num_simulations: int


def answer(question: Question) -> Answer:
    """Simulate as often as it takes."""
    tried = None
    if question.must_reach is not None:
        tried = try_rate(question.case, min(question.must_reach, question.most), question.options.seeds[0])
        if not tried.met:
            return Answer(None, tried, 1)
    simulate_once = partial(try_rate, question.case)
    options, near = question.options, question.near
    goodput = find_goodput(simulate_once, question.guess, question.most, options, near=near, reached=tried)
    return Answer(goodput, tried, len(goodput.trials))


@dataclass(frozen=True, slots=True)
class Look:
    """Simulate `case` at one rate until all counted requests have ended, and see what everybody did meanwhile."""

    case: Case
    rate: float
    seed: int


def look(question: Look) -> Observation:
    """What happens there."""
    return observe(question.case, question.rate, question.seed)


@dataclass(frozen=True, slots=True)
class Attempt:
    """Simulate `case` at one rate: until all counted requests have ended, or until the verdict is certain."""

    case: Case
    rate: float
    seed: int
    complete: bool = True


def attempt(question: Attempt) -> Trial:
    """How many met the objectives."""
    return try_rate(question.case, question.rate, question.seed, complete=question.complete)
