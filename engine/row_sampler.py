"""Sampling with everything that a row may ask for: log probabilities, penalties, bans, grammars. For one thread.

Keeps what an attempt's logits depend on besides the logits, from its first row that samples until it is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..core.errors import InternalError
from ..core.request import Attempt
from ..core.step import RowOutput, StepRow
from ..kernels.table import Kernels
from .grammar import Constraints, Grammars
from .sampler import prompt_logprobs, sample
from .shaping import Shaper

MAX_SHAPERS = 1 << 12  # attempts that are remembered: a bound for owners that never call `forget`


class RowSampler:
    """grammars are the model's; without them a sequence that asks for one fails."""

    def __init__(self, kernels: Kernels, grammars: Grammars | None) -> None:
        self._kernels = kernels
        self._shapers: dict[Attempt, Shaper] = {}  # of the attempts whose logits depend on their tokens, oldest first
        self._constraints = Constraints(grammars)

    def sample(self, logits: Tensor, rows: Sequence[StepRow], last: Mapping[Attempt, int]) -> list[RowOutput]:
        """logits [R, V], one for each of `rows`, may be overwritten. `last` has the token sampled last for an attempt."""
        shapers = {i: self._shaper(row) for i, row in enumerate(rows) if row.needs is not None and row.sampling.shaped}
        made = sample(logits, rows, self._constraints.masks(rows, last), shapers, self._kernels)
        for i, shaper in shapers.items():
            shaper.append(made[i].tokens[-1])
        return made

    def take(self, rows: Sequence[StepRow], made: Sequence[RowOutput]) -> list[RowOutput]:
        """What was made, as `sample` returned it, with an error for each row whose grammar cannot go on."""
        return self._constraints.take(rows, made)

    def forget(self, attempt: Attempt) -> None:
        self._shapers.pop(attempt, None)
        self._constraints.forget(attempt)

    def clear(self) -> None:
        self._shapers.clear()

    def _shaper(self, row: StepRow) -> Shaper:
        """Made from the history that the row brings, or by an earlier row."""
        history = None if row.needs is None else row.needs.history
        if history is not None:
            self._shapers.pop(row.attempt, None)
            self._shapers[row.attempt] = Shaper(row.sampling, history, row.output_index)
            if len(self._shapers) > MAX_SHAPERS:
                del self._shapers[next(iter(self._shapers))]
        shaper = self._shapers.get(row.attempt)
        if shaper is None:
            raise InternalError(f"row of {row.attempt} is sampled by its tokens, but no row has brought them here")
        return shaper


def with_prompts(rows: Sequence[StepRow], outputs: Sequence[RowOutput], logits: Tensor) -> tuple[RowOutput, ...]:
    """Add what is asked of the prompts: logits [N, V] hold, row by row, those of the targets and then the one sampled from."""
    answers, at = [], 0
    for row, output in zip(rows, outputs, strict=True):
        targets = () if row.needs is None else row.needs.targets
        if targets:
            of_prompt = prompt_logprobs(logits[at : at + len(targets)], targets, row.sampling.prompt_logprobs or 0)
            output = replace(output, prompt_logprobs=of_prompt)
        answers.append(output)
        at += len(targets) + row.sample
    return tuple(answers)
