"""What the executor needs from a model, whatever its family."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...kernels.table import Kernels, PagedAttention
from ..model_config import ModelConfig
from ..parallel import ParallelContext


class CausalModel(Protocol):
    """A loaded model. It keeps no state between steps: the KV cache is outside."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def parallel(self) -> ParallelContext: ...

    @property
    def kernels(self) -> Kernels: ...

    @property
    def max_model_len(self) -> int:
        """Positions the model can be fed."""
        ...

    def forward(self, tokens: Tensor, positions: Tensor, attention: PagedAttention, sampled: Tensor) -> Tensor:
        """Run one step over packed tokens.

        tokens and positions int64 [T]; sampled int64 [R] are the packed tokens after which a token is to be
        sampled, ascending. Returns logits [R, V] in the model's type.
        """
        ...
