"""What the arithmetic and the memory of this machine allow, measured with torch alone in the run that they are held against.

Linears   every linear layer of a model with weights of its own, run in the model's order: nothing but the products
Reading   one read of memory far larger than the caches

Nothing here may use the engine or its kernels: a bound that shares code with what it bounds says nothing.
"""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from baton.engine.model_config import ModelConfig
from torch import Tensor
from torch.nn import functional

READ_BYTES = 256 << 20  # eight times a large L3


@dataclass(frozen=True, slots=True)
class Timed:
    """The fastest of several methods: its median seconds and its name."""

    seconds: float
    method: str


def fastest(methods: Mapping[str, Callable[[], object]], repeats: int) -> Timed:
    """Time all methods in turn, each once unmeasured; the one with the least median counts."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for call in methods.values():
        call()
    for _ in range(repeats):
        for name, call in methods.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return min((Timed(statistics.median(values), name) for name, values in seconds.items()), key=lambda timed: timed.seconds)


class Reading:
    """The read bandwidth of memory: reductions of one large array, in huge pages where the kernel gives them."""

    def __init__(self) -> None:
        pages = mmap.mmap(-1, READ_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        array = torch.frombuffer(pages, dtype=torch.float32).fill_(1.0)
        self._methods = {"sum": array.sum, "largest": array.amax, "sum of 8-byte integers": array.view(torch.int64).sum}

    def measure(self, repeats: int) -> Timed:
        """Seconds to read `READ_BYTES`."""
        return fastest(self._methods, repeats)


@dataclass(frozen=True, slots=True)
class _Weight:
    """One linear [outputs, inputs] in every form that torch has a product for."""

    plain: Tensor
    packed: Tensor | None  # in the order that oneDNN likes best; None where this torch cannot


class Linears:
    """All linear layers of a model, bfloat16, projections that share an input joined as in the engine."""

    def __init__(self, config: ModelConfig) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv, rest = (heads + 2 * keys, hidden), [(hidden, heads), (2 * inner, hidden), (hidden, inner)]
        self._layers = [[_weight(*shape) for shape in (qkv, *rest)] for _ in range(config.num_layers)]
        self._head = _weight(config.vocab_size, hidden)
        per_layer = sum(outputs * inputs for outputs, inputs in (qkv, *rest))
        self._layer_weights = config.num_layers * per_layer
        self._rest_weights = per_layer - qkv[0] * qkv[1]
        self._head_weights = config.vocab_size * hidden
        self._methods = ["linear"] + ["packed"] * (self._head.packed is not None)

    @property
    def num_bytes(self) -> int:
        """Of the weights, each once."""
        return 2 * (self._layer_weights + self._head_weights)

    def prefill_flop(self, num_tokens: int) -> int:
        """Operations of `measure_prefill`."""
        once = self._rest_weights + self._head_weights
        return 2 * (num_tokens * (self._layer_weights - self._rest_weights) + once)

    def decode_flop(self, batch: int) -> int:
        return 2 * batch * (self._layer_weights + self._head_weights)

    def measure_prefill(self, num_tokens: int, repeats: int) -> Timed:
        """One prompt that is sampled from once: behind the last layer's keys and values only its last token is left."""
        return self._measure(num_tokens, 1, repeats)

    def measure_decode(self, batch: int, repeats: int) -> Timed:
        return self._measure(batch, batch, repeats)

    def _measure(self, num_tokens: int, num_sampled: int, repeats: int) -> Timed:
        inputs = {
            (count, weight.plain.shape[1]): torch.randn(count, weight.plain.shape[1]).bfloat16()
            for count in (num_tokens, num_sampled)
            for weight in (*self._layers[0], self._head)
        }
        order = list(self._order(num_tokens, num_sampled))

        def run(method: str) -> None:
            for weight, count in order:
                _PRODUCTS[method](inputs[count, weight.plain.shape[1]], weight)

        with torch.inference_mode():
            return fastest({method: lambda method=method: run(method) for method in self._methods}, repeats)

    def _order(self, num_tokens: int, num_sampled: int) -> Iterator[tuple[_Weight, int]]:
        for layer in self._layers[:-1]:
            yield from ((weight, num_tokens) for weight in layer)
        qkv, *rest = self._layers[-1]
        yield qkv, num_tokens
        yield from ((weight, num_sampled) for weight in (*rest, self._head))


_PRODUCTS: Mapping[str, Callable[[Tensor, _Weight], Tensor]] = {
    "linear": lambda x, weight: functional.linear(x, weight.plain),
    "packed": lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight.packed, None, "none", [], ""),
}


def _weight(outputs: int, inputs: int) -> _Weight:
    plain = torch.randn(inputs).bfloat16().repeat(outputs, 1)  # rows may be equal: nobody looks at the products
    packed = None
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        with torch.inference_mode():
            packed = torch.ops.mkldnn._reorder_linear_weight(plain, None)
    return _Weight(plain, packed)
