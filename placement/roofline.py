"""Step times where nothing was measured: a model's arithmetic and bytes against a device's peaks, with fitted efficiencies.

A layer is priced kernel by kernel, one after the other: every product takes the longer of its FLOPs and its bytes, then
attention, two all-reduces when tensors are split, and what is neither. A pipeline stage is its layers and an even share of the
head, plus handing its activations on. A prior: whatever `baton profile` measured wins over it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from ..core.shape import StepShape
from ..simulator.cost import series
from .efficiency import Efficiency, efficiency_of
from .hardware import Accelerator
from .model_shape import Linear, ModelShape, bytes_of

ACTIVATION_BYTES = 2  # activations stay in 16 bits whatever the weights are
MEMORY_SHARE, MEMORY_RESERVE = 0.9, 2e9  # of a device's memory: what is used at all, and of that the bytes left for activations


@dataclass(frozen=True, slots=True)
class RooflineCost:
    """A `StepCost`. Make it with `roofline_cost`; the fields are what a step's time is computed from, per rank.

    layers           of the fullest stage
    linears          products of one layer; `expert_linears` those of one expert, empty when no MLP is routed
    experts, chosen  of a routed MLP
    head             the product that makes logits
    flops            reached FLOP/s of products; `bandwidth` reached bytes/s of streaming weights
    weight_bytes     of one weight
    pair_seconds     attention of one pair, one layer; context_seconds: reading the KV of one token, one layer
    token_seconds    per token and layer: all-reduces and activations
    layer_seconds    per layer, whatever the batch
    stage_seconds, stage_token_seconds   handing activations to the next stage
    step_seconds, row_seconds   host work
    """

    layers: int
    linears: tuple[Linear, ...]
    expert_linears: tuple[Linear, ...]
    experts: int
    chosen: int
    head: Linear
    flops: float
    bandwidth: float
    weight_bytes: float
    pair_seconds: float
    context_seconds: float
    token_seconds: float
    layer_seconds: float
    stage_seconds: float
    stage_token_seconds: float
    step_seconds: float
    row_seconds: float
    stages: int = 1
    _products: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)  # by tokens: asked for often

    def seconds(self, shape: StepShape) -> float:
        attention = max(self.pair_seconds * shape.prefill_pairs, self.context_seconds * shape.prefill_context)
        attention += self.context_seconds * shape.decode_context
        rows = shape.prefill_rows + shape.decode_rows
        return self._base(shape.num_tokens, rows, shape.sampled) + self.layers * attention

    def decode_seconds(self, rows: int, context: int, steps: int) -> float:
        """Nothing but attention grows from step to step, by the KV of `rows` tokens."""
        grown = self.layers * self.context_seconds * series(rows, context, steps)
        return steps * self._base(rows, rows, rows) + grown

    def _base(self, tokens: int, rows: int, sampled: int) -> float:
        """A step without its attention."""
        products = self._products.get(tokens)
        if products is None:
            products = self._products[tokens] = self._all_products(tokens)
        layer = products + self.layer_seconds + self.token_seconds * tokens
        last = self._product(self.head, sampled) / self.stages if sampled else 0.0
        host = self.step_seconds + self.row_seconds * rows
        return self.layers * layer + last + host / self.stages + self.stage_seconds + self.stage_token_seconds * tokens

    def _all_products(self, tokens: int) -> float:
        """Those of a layer."""
        products = sum(self._product(linear, tokens) for linear in self.linears)
        if self.experts:
            # Tokens fall on experts at random: so many of them are hit, and each hit one is streamed.
            hit = self.experts * (1 - (1 - self.chosen / self.experts) ** tokens)
            each = tokens * self.chosen / hit if hit else 0.0
            products += hit * sum(self._product(linear, each) for linear in self.expert_linears)
        return products

    def _product(self, linear: Linear, tokens: float) -> float:
        """[tokens, inputs] times [inputs, outputs]: the longer of its FLOPs and its bytes."""
        weights = linear.inputs * linear.outputs
        moved = weights * self.weight_bytes + tokens * (linear.inputs + linear.outputs) * ACTIVATION_BYTES
        return max(2 * tokens * weights / self.flops, moved / self.bandwidth)


def roofline_cost(
    shape: ModelShape,
    device: Accelerator,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    dtype: str = "bfloat16",
    kv_dtype: str = "bfloat16",
    efficiency: Efficiency | None = None,
) -> RooflineCost:
    """The cost of `shape` on `device`, split so. `dtype` is that of the weights.

    Raises InvalidRequest when the model cannot be split so, or for an unknown dtype.
    """
    shape.check_parallel(tensor_parallel, pipeline_parallel)
    reached = efficiency or efficiency_of(device.family)
    bandwidth = device.bandwidth * reached.gemm_bytes
    narrow = device.flops(dtype) > device.flops_16
    kv_bytes = 2 * shape.rank_kv_heads(tensor_parallel) * shape.head_dim * bytes_of(kv_dtype)  # one token, one layer
    pair_flops = shape.flops_per_pair / shape.num_layers / tensor_parallel
    hidden_bytes = shape.hidden_size * ACTIVATION_BYTES
    reduce_seconds, reduce_token = _all_reduce(device, reached, tensor_parallel, hidden_bytes)
    linears, routed = shape.linears(tensor_parallel), shape.num_experts > 0
    stage_seconds, stage_token = _handing_on(device, reached, tensor_parallel, pipeline_parallel, hidden_bytes)
    kernels = len(linears) * reached.gemm_launch + reached.attention_launch
    return RooflineCost(
        layers=-(-shape.num_layers // pipeline_parallel),
        linears=linears[:2] if routed else linears,
        expert_linears=linears[2:] if routed else (),
        experts=shape.num_experts,
        chosen=shape.experts_per_token,
        head=Linear(shape.hidden_size, -(-shape.vocab_size // tensor_parallel)),
        flops=device.flops(dtype) * (reached.gemm_flops_8 if narrow else reached.gemm_flops),
        bandwidth=bandwidth,
        weight_bytes=bytes_of(dtype),
        pair_seconds=pair_flops / (device.flops("bfloat16") * reached.attention_flops),
        context_seconds=kv_bytes / (device.bandwidth * reached.attention_bytes),
        token_seconds=reduce_token + reached.layer_passes * hidden_bytes / bandwidth,
        layer_seconds=reached.layer + kernels + reduce_seconds,
        stage_seconds=stage_seconds,
        stage_token_seconds=stage_token,
        step_seconds=reached.step,
        row_seconds=reached.row,
        stages=pipeline_parallel,
    )


def kv_capacity(
    shape: ModelShape,
    device: Accelerator,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    dtype: str = "bfloat16",
    kv_dtype: str = "bfloat16",
    share: float = MEMORY_SHARE,
    reserve_bytes: float = MEMORY_RESERVE,
) -> int:
    """Tokens whose KV fits beside the weights; 0 when the weights leave no room.

    share          of a device's memory that is used at all
    reserve_bytes  of it for activations, graphs and communication
    """
    weights = shape.rank_weight_bytes(tensor_parallel, pipeline_parallel, dtype)
    room = device.memory_bytes * share - reserve_bytes - weights
    return max(0, int(room / shape.rank_kv_bytes_per_token(tensor_parallel, pipeline_parallel, kv_dtype)))


def device_for_kv(shape: ModelShape, device: Accelerator, kv_bytes: float, dtype: str) -> Accelerator:
    """The device with just the memory that leaves `kv_bytes` beside the weights: the inverse of `kv_capacity`."""
    needed = shape.rank_weight_bytes(1, 1, dtype) + kv_bytes + MEMORY_RESERVE
    return replace(device, memory_bytes=math.ceil(needed / MEMORY_SHARE))


def _all_reduce(device: Accelerator, reached: Efficiency, ranks: int, hidden_bytes: int) -> tuple[float, float]:
    """Seconds per layer, and per layer and token, of two all-reduces: each moves 2 (n - 1) / n of the bytes through a link."""
    if ranks == 1:
        return 0.0, 0.0
    link = device.link if ranks <= device.devices_per_node else device.network
    moved = 2 * (ranks - 1) / ranks * hidden_bytes
    return 2 * (reached.reduce_launch + reached.reduce_rank * ranks), 2 * moved / (link * reached.reduce_bytes)


def _handing_on(device: Accelerator, reached: Efficiency, ranks: int, stages: int, hidden_bytes: int) -> tuple[float, float]:
    """Seconds per step, and per token, of sending a stage's activations to the next one."""
    if stages == 1:
        return 0.0, 0.0
    link = device.link if ranks * stages <= device.devices_per_node else device.network
    return reached.reduce_launch, hidden_bytes / (link * reached.reduce_bytes)
