"""Where a rank stands among the ranks of its worker. Every sharded layer takes a `ParallelContext`.

A worker of one rank has the default context, whose collectives do nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed
from torch import Tensor

from ..core.errors import ModelError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """rank and size count the tensor-parallel ranks, pipeline_rank and pipeline_size the stages.

    group  the process group of the tensor-parallel ranks; None at size 1
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    pipeline_rank: int = 0
    pipeline_size: int = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over the tensor-parallel ranks, in place; `x` itself at size 1."""
        if self.size > 1:
            torch.distributed.all_reduce(x, group=self.group)
        return x

    def share(self, total: int, what: str) -> range:
        """This rank's contiguous share of `total` equal things. Raises ModelError when they don't divide evenly."""
        if total % self.size:
            raise ModelError(f"{total} {what} cannot be split over {self.size} tensor-parallel ranks; use a divisor of {total}")
        each = total // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def stage(self, num_layers: int) -> range:
        """The layers of this pipeline stage; earlier stages take one more when they don't divide evenly."""
        if num_layers < self.pipeline_size:
            raise ModelError(f"{num_layers} layers cannot fill {self.pipeline_size} pipeline stages")
        each, rest = divmod(num_layers, self.pipeline_size)
        first = self.pipeline_rank * each + min(self.pipeline_rank, rest)
        return range(first, first + each + (self.pipeline_rank < rest))
