"""What the executor needs from a model, whatever its family, and what the loader needs to make one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...kernels.interface import PagedAttention
from ...kernels.table import Kernels
from ..layers import Weights
from ..parallel import ParallelContext
from .config import ModelConfig


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


class ModelLoader(Protocol):
    """How the weights of a family become a model."""

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint of this model holds."""
        ...

    def load(self, config: ModelConfig, weights: Weights, max_model_len: int) -> CausalModel:
        """Read this rank's share. The checkpoint is known to hold `shapes`; raises ModelError when ranks cannot share it."""
        ...
