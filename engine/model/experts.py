"""An MLP of many experts, of which a router chooses a few for each token (Shazeer 2017; Mixtral, Qwen 3 MoE).

A grouped product: tokens are sorted by expert, each expert that has tokens runs once over all of its own, and
what the experts made of a token is summed in the order of its choices. So the sum does not depend on which other
tokens are in the batch, as far as the linears' rows do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import InternalError
from ...kernels.interface import Linear
from ..experts_config import ExpertsConfig
from ..layers import Map, Weights
from ..parallel import ParallelContext
from .config import ModelConfig
from .decoder import GatedMLPLoader, MLPLoader, Shapes, layer_name, linear_shapes


@dataclass(frozen=True, slots=True)
class Expert:
    """This rank's share of one expert."""

    gate_up: Linear  # E -> 2F, gate first
    down: Linear  # F -> E, a part of the sum over the ranks


@dataclass(frozen=True, slots=True)
class RoutedMLP:
    """The MLP half of a routed layer. Every rank routes alike, since every rank has the whole router."""

    router: Linear  # E -> number of experts
    experts: tuple[Expert, ...]
    activation: str
    num_chosen: int
    normalized: bool
    parallel: ParallelContext

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, E] -> [T, E]."""
        weights, chosen = self.route(x)  # [T, k] each
        made = self._run(x, chosen).view(x.shape[0], self.num_chosen, x.shape[1])  # [T, k, E]
        # Products and sums one by one: elementwise steps round alike in any batch, a fused reduction need not.
        total = made[:, 0] * weights[:, :1]  # float32 [T, E]
        for place in range(1, self.num_chosen):
            total += made[:, place] * weights[:, place, None]
        return self.parallel.all_reduce(total.to(x.dtype))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, E] -> the weights (float32) and the experts of each token [T, k], likeliest first."""
        probabilities = torch.softmax(self.router(x).float(), dim=-1)  # [T, experts]
        weights, chosen = torch.topk(probabilities, self.num_chosen, dim=-1)
        if self.normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, chosen

    def _run(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What each chosen expert makes of its token [T * k, E], before weighting."""
        flat = chosen.flatten()
        order = torch.argsort(flat, stable=True)  # places of `flat`, by expert
        ends = torch.bincount(flat, minlength=len(self.experts)).cumsum(0).tolist()
        gathered = x[order // self.num_chosen]  # [T * k, E]
        out = torch.empty_like(gathered)
        begin = 0
        for expert, end in zip(self.experts, ends, strict=True):
            if end > begin:
                out.index_copy_(0, order[begin:end], expert.down(expert.gate_up.gated(self.activation, gathered[begin:end])))
            begin = end
        return out


@dataclass(frozen=True, slots=True)
class RoutedMLPLoader:
    """See `RoutedMLP`. Checkpoints name things in two ways: the block of a layer, and the projections of an expert."""

    block: str
    gate: str
    up: str
    down: str
    dense: MLPLoader = GatedMLPLoader()

    def shapes(self, config: ModelConfig, layer: int) -> Shapes:
        experts = _experts_of(config)
        if layer in experts.dense_layers:
            return self.dense.shapes(config, layer)
        name, hidden, inner = f"{layer_name(layer)}.{self.block}", config.hidden_size, experts.inner_size
        shapes: Shapes = {f"{name}.gate": (experts.num_experts, hidden)}
        for index in range(experts.num_experts):
            expert = f"{name}.experts.{index}"
            shapes |= {f"{expert}.{self.gate}": (inner, hidden), f"{expert}.{self.up}": (inner, hidden)}
            shapes[f"{expert}.{self.down}"] = (hidden, inner)
        return linear_shapes(shapes, bias=False)

    def load(self, config: ModelConfig, weights: Weights, layer: int) -> Map:
        experts = _experts_of(config)
        if layer in experts.dense_layers:
            return self.dense.load(config, weights, layer)
        name = f"{layer_name(layer)}.{self.block}"
        return RoutedMLP(
            router=weights.linear(f"{name}.gate", experts.num_experts, config.hidden_size),
            experts=tuple(
                self._expert(config, weights, f"{name}.experts.{index}", experts.inner_size)
                for index in range(experts.num_experts)
            ),
            activation=config.activation,
            num_chosen=experts.num_chosen,
            normalized=experts.normalized,
            parallel=weights.parallel,
        )

    def _expert(self, config: ModelConfig, weights: Weights, name: str, inner_size: int) -> Expert:
        inner = weights.parallel.share(inner_size, "columns of each expert")
        gate_up = weights.column([(f"{name}.{self.gate}", inner), (f"{name}.{self.up}", inner)], config.hidden_size, bias=False)
        return Expert(gate_up.linear, weights.row(f"{name}.{self.down}", inner, config.hidden_size, bias=False).linear)


def _experts_of(config: ModelConfig) -> ExpertsConfig:
    if config.experts is None:
        raise InternalError(f"the config of family {config.family!r} has no experts; its reader must set them")
    return config.experts
