"""What a step brings to the device, packed into one run of bytes so that one copy takes all of it.

A token that the host does not know yet (of a pending row) is written as -1 - slot: the device takes it from where it keeps
the last tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.step import StepRow
from ...kernels.batch import DrawSpec
from ...kernels.draw_words import NUM_FIELDS
from ..sampler import draw_spec

ALIGNMENT = 16  # bytes: kernels are compiled for pointers at multiples of it


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a step's bytes depend on.

    num_tokens  T, fed
    num_places  N, tokens whose logits are wanted
    num_rows    R, rows that sample
    num_words   int32 words behind the rest, for whatever the attention is told
    """

    num_tokens: int
    num_places: int
    num_rows: int
    num_words: int = 0

    @property
    def sections(self) -> tuple[tuple[torch.dtype, int], ...]:
        indices = (2 * self.num_tokens, self.num_places, 2 * self.num_rows)
        words = (NUM_FIELDS * self.num_rows, self.num_words)
        return (*((torch.int64, size) for size in indices), *((torch.int32, size) for size in words))

    @property
    def num_bytes(self) -> int:
        return sum(_aligned(kind.itemsize * size) for kind, size in self.sections)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Views of a step's bytes, at either end of the copy.

    tokens, positions  int64 [T]
    places             int64 [N], packed tokens whose logits are wanted, ascending
    sampled            int64 [R], which of these each row samples from
    slots              int64 [R], where each row's token is kept
    draws              int32 [NUM_FIELDS, R], how each row is drawn (`kernels.draw_words`)
    words              int32 [num_words]
    """

    tokens: Tensor
    positions: Tensor
    places: Tensor
    sampled: Tensor
    slots: Tensor
    draws: Tensor
    words: Tensor

    @classmethod
    def over(cls, memory: Tensor, sizes: Sizes) -> StepInputs:
        """Views of uint8 [sizes.num_bytes]."""
        views, at = [], 0
        for kind, size in sizes.sections:
            views.append(memory[at : at + kind.itemsize * size].view(kind))
            at += _aligned(kind.itemsize * size)
        fed, places, rows, draws, words = views
        tokens, positions = fed.view(2, sizes.num_tokens)
        sampled, slots = rows.view(2, sizes.num_rows)
        return cls(tokens, positions, places, sampled, slots, draws.view(NUM_FIELDS, sizes.num_rows), words)

    def write(
        self, tokens: Sequence[int], positions: Sequence[int], places: Sequence[int], sampled: Sequence[int], slots: Sequence[int]
    ) -> None:
        """On the host: which tokens are fed and which rows sample. What is missing to the sizes is left as it is."""
        for view, values in zip(
            (self.tokens, self.positions, self.places, self.sampled, self.slots),
            (tokens, positions, places, sampled, slots),
            strict=True,
        ):
            view.numpy()[: len(values)] = values

    def fed(self, last: Tensor) -> Tensor:
        """On the device: the tokens [T], pending ones taken from `last`, int64 [slots]."""
        kept = last.index_select(0, (-1 - self.tokens).clamp_(min=0))
        return torch.where(self.tokens < 0, kept, self.tokens)


def device_specs(rows: Sequence[StepRow]) -> list[DrawSpec]:
    """How the device samples the rows. Those that take long are left to the host, and greedy until then."""
    return [
        replace(spec, temperature=0.0) if takes_long(row) else spec for row, spec in zip(rows, map(draw_spec, rows), strict=True)
    ]


def takes_long(row: StepRow) -> bool:
    """Whether the row's sampling needs the host: log probabilities, a grammar, or logits changed by its own tokens."""
    params = row.sampling
    return (
        params.logprobs is not None
        or params.grammar is not None
        or params.shaped
        or (row.output_index < params.min_tokens and bool(params.stop_token_ids))
    )


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
