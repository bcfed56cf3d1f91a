"""Where the time of a step goes: a model and its kernels timed from outside, whatever backend they come from.

The stopwatch itself costs about 0.3 us a call, and there are some hundred calls a step: profiled steps are slower than
measured ones. Must never be part of a measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from unittest import mock

from baton.engine import loader
from baton.engine.model.interface import CausalModel
from baton.kernels.batch import AttentionSpec, RowSpan
from baton.kernels.interface import Linear, PagedAttention
from baton.kernels.table import Kernels, no_stack
from torch import Tensor

FORWARD, ATTENTION_SETUP, ATTENTION, LINEAR, GATED = "forward", "attention's set-up", "attention", "linears", "linears with gates"


@dataclass(slots=True)
class ForwardTime:
    """One run of the model: when it began and ended (`time.perf_counter`), and seconds by kernel."""

    began: float = 0.0
    ended: float = 0.0
    setup: float = 0.0
    kernels: dict[str, float] = field(default_factory=dict)


class Stopwatch:
    """Collects `ForwardTime`s, in order."""

    def __init__(self) -> None:
        self.forwards: list[ForwardTime] = []
        self._current = ForwardTime()

    def reset(self) -> None:
        self.forwards.clear()

    def run(self, name: str, call: Callable[..., object], *arguments: object) -> object:
        """Call it, and put its time down to `name`."""
        began = time.perf_counter()
        result = call(*arguments)
        seconds = time.perf_counter() - began
        if name == ATTENTION_SETUP:  # comes before the forward that it belongs to
            self._current = ForwardTime(setup=seconds)
        elif name == FORWARD:
            self._current.began, self._current.ended = began, began + seconds
            self.forwards.append(self._current)
        else:
            self._current.kernels[name] = self._current.kernels.get(name, 0.0) + seconds
        return result


def load_stopped(folder: Path, dtype: str, max_model_len: int, kernels: str, threads: int, watch: Stopwatch) -> CausalModel:
    """`engine.loader.load_model` with a stopwatch around everything."""
    make = loader.make_kernels

    def make_stopped(name: str, threads: int = 1, deterministic: bool = False) -> Kernels:
        return _stopped(make(name, threads, deterministic), watch)

    with mock.patch.object(loader, "make_kernels", make_stopped):
        model = loader.load_model(folder, dtype, max_model_len=max_model_len, kernels=kernels, threads=threads)
    return _StoppedModel(model, watch)


def _stopped(kernels: Kernels, watch: Stopwatch) -> Kernels:
    """Every kernel of a forward under its own name, also those that a later table adds."""

    def attention(kv: Tensor, rows: Sequence[RowSpan]) -> PagedAttention:
        return _StoppedAttention(watch.run(ATTENTION_SETUP, kernels.attention, kv, rows), watch)

    def linear(weight: Tensor, bias: Tensor | None) -> Linear:
        return _StoppedLinear(kernels.linear(weight, bias), watch)

    def around(name: str, call: Callable[..., object]) -> Callable[..., object]:
        return lambda *arguments: watch.run(name, call, *arguments)

    others = {
        item.name: around(item.name, getattr(kernels, item.name))
        for item in fields(kernels)
        if item.name not in ("attention", "linear", "argmax", "draw", "stack") and callable(getattr(kernels, item.name))
    }
    return replace(kernels, attention=attention, linear=linear, stack=no_stack, **others)  # layers whose parts can be timed


class _Around:
    """Everything that is not timed is the inner object's."""

    def __init__(self, inner: object, watch: Stopwatch) -> None:
        self._inner = inner
        self._watch = watch

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


class _StoppedModel(_Around):
    def forward(self, *arguments: object) -> object:
        return self._watch.run(FORWARD, self._inner.forward, *arguments)


class _StoppedAttention(_Around):
    def run(self, layer: int, qkv: Tensor, spec: AttentionSpec, turn: tuple[Tensor, Tensor] | None) -> object:
        return self._watch.run(ATTENTION, self._inner.run, layer, qkv, spec, turn)


class _StoppedLinear(_Around):
    def __call__(self, x: Tensor) -> object:
        return self._watch.run(LINEAR, self._inner, x)

    def gated(self, activation: str, x: Tensor) -> object:
        return self._watch.run(GATED, self._inner.gated, activation, x)
