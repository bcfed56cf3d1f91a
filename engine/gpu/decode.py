"""Decode steps as recorded graphs, one per bucket of batch size: a step is one copy in, one replay, one copy out.

A graph runs over memory that stays where it is; a step smaller than its bucket is filled up with rows that read and store
nothing. Everything that changes between steps, sampling parameters too, comes with the copy (`inputs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ...core.errors import InternalError
from ...core.kv import KVLayout
from ...core.step import StepRow
from ...kernels.batch import RowSpan
from ...kernels.device import Device, Graph, HostGraph, Stream
from ...kernels.draw_words import pack
from ...kernels.triton.step_tensors import StepSizes, StepTensors, decode_sizes, part_aim, write_rows
from ..model.interface import CausalModel
from .inputs import Sizes, StepInputs, device_specs


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, 8, ... and `max_num_seqs`."""
    powers = [1 << power for power in range(max_num_seqs.bit_length()) if 1 << power < max_num_seqs]
    return (*powers, max_num_seqs)


@dataclass(slots=True)
class Bucket:
    """A bucket's memory on the device, uint8 [sizes.num_bytes]. `logits` [size, V] are those of its last run."""

    size: int
    sizes: Sizes
    step: StepSizes
    memory: Tensor
    graphs: dict[bool, Graph] = field(default_factory=dict)  # by whether some row is drawn
    logits: Tensor | None = None


class DecodeGraphs:
    """The graphs of one model over one pool.

    last  int64 [slots + 1], where sampled tokens are kept; the last place takes what padding rows sample
    Models that ask the host in their middle (routed experts) are run step by step instead of being recorded.
    """

    def __init__(
        self, model: CausalModel, kv: Tensor, layout: KVLayout, device: Device, stream: Stream, last: Tensor, max_num_seqs: int
    ) -> None:
        if model.kernels.step is None:
            raise InternalError(
                "decode graphs need kernels that take everything from tensors; use the kernels made for the device"
            )
        self._model, self._kernels = model, model.kernels.step
        self._kv, self._layout = kv, layout
        self._device, self._stream = device, stream
        self._last = last
        self._aim = part_aim(layout.num_kv_heads, device.num_processors)
        self._chosen = torch.zeros(max_num_seqs, dtype=torch.int64, device=device.torch_device)
        self._every = torch.arange(max_num_seqs, device=device.torch_device)
        self._buckets = {size: self._make(size) for size in bucket_sizes(max_num_seqs)}

    @property
    def max_rows(self) -> int:
        return max(self._buckets)

    def record(self) -> None:
        """Record every graph, the largest first: the smaller ones then find room in its memory. The stream must be idle."""
        for size, bucket in sorted(self._buckets.items(), reverse=True):
            padding = self.pack((), (), (), (), drawn=True, size=size)
            self._stream.launch(partial(_copy, bucket.memory, padding.memory))
            recordable = self._model.config.experts is None  # routed experts ask the host in the middle of a layer
            for drawn in (False, True):
                work = partial(self._work, bucket, drawn)
                bucket.graphs[drawn] = self._device.capture(self._stream, work) if recordable else HostGraph(work)

    def pack(
        self,
        rows: Sequence[StepRow],
        tokens: Sequence[int],
        slots: Sequence[int],
        spans: Sequence[RowSpan],
        drawn: bool,
        size: int | None = None,
    ) -> PackedDecode:
        """On the host: the bytes of a decode step of rows that feed one token each, for the bucket `size` or the smallest.

        drawn  whether some row is drawn from its logits' distribution
        """
        count = len(rows)
        bucket = self._buckets[size] if size is not None else next(b for s, b in self._buckets.items() if s >= count)
        memory = self._device.pinned(bucket.sizes.num_bytes)
        host = StepInputs.over(memory, bucket.sizes)
        host.tokens[count:], host.positions[count:], host.slots[count:] = 0, 0, len(self._last) - 1
        host.write(tokens, [span.start for span in spans], (), (), slots)
        if drawn:
            pack(device_specs(rows), host.draws)
        write_rows(StepTensors.over(host.words, bucket.step), spans, self._layout.block_size, self._aim)
        return PackedDecode(bucket, memory, count, drawn)

    def run(self, packed: PackedDecode) -> tuple[Tensor, Tensor]:
        """On the stream: chosen tokens int64 [R] and logits [R, V] of a step's rows, valid until the next decode step runs."""
        bucket = packed.bucket
        bucket.memory.copy_(packed.memory, non_blocking=True)
        if packed.drawn not in bucket.graphs:
            raise InternalError("a decode step came before the graphs were recorded; warm up first")
        bucket.graphs[packed.drawn].replay()
        assert bucket.logits is not None  # every run leaves some
        return self._chosen[: packed.num_rows], bucket.logits[: packed.num_rows]

    def _make(self, size: int) -> Bucket:
        step = decode_sizes(size, self._layout.num_blocks_for(self._model.max_model_len), self._layout.block_size, self._aim)
        sizes = Sizes(num_tokens=size, num_places=0, num_rows=size, num_words=step.num_words)
        memory = torch.zeros(sizes.num_bytes, dtype=torch.uint8, device=self._device.torch_device)
        return Bucket(size, sizes, step, memory)

    def _work(self, bucket: Bucket, drawn: bool) -> None:
        """What is recorded. Takes nothing from the host."""
        with torch.inference_mode():
            inputs = StepInputs.over(bucket.memory, bucket.sizes)
            attention = self._kernels.attention(self._kv, StepTensors.over(inputs.words, bucket.step))
            every = self._every[: bucket.size]
            logits = self._model.forward(inputs.fed(self._last), inputs.positions, attention, every)  # [bucket, V]
            chosen = self._kernels.sample(logits, inputs.draws) if drawn else self._model.kernels.argmax(logits)
            self._chosen[: bucket.size].copy_(chosen)
            self._last.index_copy_(0, inputs.slots, chosen)
            bucket.logits = logits


@dataclass(frozen=True, slots=True)
class PackedDecode:
    """A decode step on the host, ready to be copied: memory uint8, of which the first `num_rows` rows are the step's."""

    bucket: Bucket
    memory: Tensor
    num_rows: int
    drawn: bool


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)
