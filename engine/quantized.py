"""Checkpoints whose linears are packed integers: GPTQ and AWQ folders, turned back into numbers as they are read.

A packed linear x of I inputs and O outputs is stored as x.qweight, x.qzeros and x.scales (and x.g_idx) in place
of x.weight. Each group of inputs has one scale and one zero-point per output: weight = (level - zero) * scale.
Levels of 4 or 8 bits are fields of 32-bit words, lowest bits first:

  GPTQ  qweight [I / n, O]: the n = 32 / bits fields of a word are consecutive inputs
  AWQ   qweight [I, O / n]: the fields of a word are outputs, in the order 0 2 4 6 1 3 5 7
  both  qzeros [G, O / n], fields as outputs (in AWQ's order for AWQ); scales [G, O]; G groups
  GPTQ  g_idx [I]: the group of each input, there when inputs are not grouped in order

The layouts are those of AutoGPTQ and GPTQModel, and of AutoAWQ's "gemm" version. Numbers are computed in float32,
where they are exact for float16 scales, and rounded once. Never holds more than one slab of a tensor beside `out`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import ModelError
from .checkpoint import Checkpoint, refuse
from .quantization_config import QuantizationConfig

SLAB = 1 << 17  # weights unpacked at once, so that the steps of the work find them in the core's cache
SLAB_INPUTS = 32  # at least: whole words are unpacked, and a cache line or more of each row is written
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of each output in its word: the inverse of the order of the fields
FLOATS = ("F16", "BF16", "F32")


def open_checkpoint(folder: Path, quantization: QuantizationConfig | None) -> Checkpoint:
    """The weights of a model folder, packed or not."""
    return Checkpoint(folder) if quantization is None else QuantizedCheckpoint(folder, quantization)


class QuantizedCheckpoint(Checkpoint):
    """Satisfies the reads of a plain checkpoint: `x.weight` is read from x's packed tensors where those are stored."""

    def __init__(self, folder: Path, quantization: QuantizationConfig) -> None:
        super().__init__(folder)
        self._config = folder / "config.json"
        self._quantization = quantization
        self._per_word = 32 // quantization.bits
        places = AWQ_PLACES if quantization.method == "awq" else tuple(range(self._per_word))
        self._shifts = torch.tensor(places, dtype=torch.int32) * quantization.bits

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """As for a plain checkpoint; of packed tensors, types and grouping are checked too."""
        stored: dict[str, tuple[int, ...]] = {}
        problems = []
        for name, shape in shapes.items():
            module = self._packed(name)
            if module is None or len(shape) != 2:
                stored[name] = shape
                continue
            outputs, inputs = shape
            problems += self._misfits(module, outputs, inputs)
            if not problems:
                stored |= self._packed_shapes(module, outputs, inputs)
        refuse(problems)
        super().require(stored)
        refuse([wrong for name in stored if (wrong := self._wrong_type(name))])

    def read_into(self, out: Tensor, name: str, share: range | None = None, axis: int = 0) -> None:
        """As for a plain checkpoint. Raises ModelError for a group index that points nowhere."""
        module = self._packed(name)
        if module is None:
            super().read_into(out, name, share, axis)
            return
        num_groups, num_outputs = self.part(f"{module}.scales").get_shape()
        outputs = share if share is not None and axis == 0 else range(num_outputs)
        inputs = share if share is not None and axis == 1 else range(out.shape[1])
        columns = slice(outputs.start, outputs.stop)
        scales = self.part(f"{module}.scales")[:, columns].float()  # [G, outputs]
        zeros = self._zeros(module, outputs).float()  # [G, outputs]
        group_of = self._groups(module, inputs, num_groups)  # [inputs]
        for slab in _slabs(inputs, max(1, SLAB // len(outputs) // SLAB_INPUTS) * SLAB_INPUTS):
            begin, end = slab.start - inputs.start, slab.stop - inputs.start
            groups = group_of[begin:end]
            levels = self._levels(module, slab, outputs).float()  # [slab, outputs]
            levels.sub_(zeros[groups]).mul_(scales[groups])
            out[:, begin:end] = levels.t()

    def _packed(self, name: str) -> str | None:
        """The module whose packed tensors stand for tensor `name`; None when it is stored as it is, or not at all."""
        module = name.removesuffix(".weight")
        if module == name or self.holds(name):
            return None
        return module if any(self.holds(f"{module}.{part}") for part in ("qweight", "qzeros", "scales")) else None

    def _misfits(self, module: str, outputs: int, inputs: int) -> list[str]:
        size, per_word = self._quantization.group_size, self._per_word
        problems = []
        if size is not None and inputs % size:
            key = f"{self._config}: quantization_config.group_size is {size}"
            problems.append(f"{key}; it must divide the {inputs} inputs of {module}")
        packed = {"outputs": outputs} if self._quantization.method == "awq" else {"inputs": inputs, "outputs": outputs}
        for what, number in packed.items():
            if number % per_word:
                key = f"{self._config}: quantization_config.bits is {self._quantization.bits}"
                problems.append(
                    f"{key}; {module} with {number} {what} cannot be packed so: they must be a multiple of {per_word}"
                )
        return problems

    def _packed_shapes(self, module: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        words = outputs // self._per_word
        num_groups = inputs // (self._quantization.group_size or inputs)
        awq = self._quantization.method == "awq"
        shapes: dict[str, tuple[int, ...]] = {
            f"{module}.qweight": (inputs, words) if awq else (inputs // self._per_word, outputs),
            f"{module}.qzeros": (num_groups, words),
            f"{module}.scales": (num_groups, outputs),
        }
        if self.holds(f"{module}.g_idx") or (self._quantization.ordered and num_groups > 1):
            shapes[f"{module}.g_idx"] = (inputs,)
        return shapes

    def _wrong_type(self, name: str) -> str:
        """What is wrong with the type of a stored tensor; empty when nothing is."""
        kind = name.rpartition(".")[2]
        wanted = FLOATS if kind == "scales" else ("I32",) if kind in ("qweight", "qzeros", "g_idx") else ()
        found = self.part(name).get_dtype()
        if not wanted or found in wanted:
            return ""
        return f"{self.place(name)}: tensor {name} has type {found}; it must be {' or '.join(wanted)}"

    def _zeros(self, module: str, outputs: range) -> Tensor:
        """Zero-points int32 [G, outputs]."""
        words, offset = self._output_words(f"{module}.qzeros", slice(None), outputs)
        bits, mask = self._quantization.bits, (1 << self._quantization.bits) - 1
        if self._quantization.zero_points == "minus_one_words":
            words = (words.long() + sum(1 << shift for shift in range(0, 32, bits))) & 0xFFFFFFFF
        zeros = self._unpack_outputs(words)[:, offset : offset + len(outputs)]
        if self._quantization.zero_points == "minus_one":
            zeros = (zeros + 1) & mask
        return zeros

    def _groups(self, module: str, inputs: range, num_groups: int) -> Tensor:
        """The group of each input, int64 [inputs]."""
        name = f"{module}.g_idx"
        if num_groups == 1:
            return torch.zeros(len(inputs), dtype=torch.int64)
        if self.holds(name):
            index = self.part(name)[:].long()  # of all inputs
            if int(index.min()) < 0 or int(index.max()) >= num_groups:
                raise ModelError(
                    f"{self.place(name)}: tensor {name} names groups outside 0 to {num_groups - 1}, which is all there are"
                )
            if index.any():  # some writers leave it zero when inputs are grouped in order
                return index[inputs.start : inputs.stop]
        size = self._quantization.group_size
        return torch.arange(inputs.start, inputs.stop) // (size or 1)

    def _levels(self, module: str, inputs: range, outputs: range) -> Tensor:
        """Levels int32 [inputs, outputs]."""
        name = f"{module}.qweight"
        if self._quantization.method == "awq":
            words, offset = self._output_words(name, slice(inputs.start, inputs.stop), outputs)
            return self._unpack_outputs(words)[:, offset : offset + len(outputs)]
        rows, offset = _words(inputs, self._per_word)
        words = self.part(name)[rows, slice(outputs.start, outputs.stop)]  # [words, outputs]
        mask = (1 << self._quantization.bits) - 1
        levels = (words[:, None, :] >> self._shifts[None, :, None]).bitwise_and_(mask)  # [words, fields, outputs]
        return levels.flatten(0, 1)[offset : offset + len(inputs)]

    def _output_words(self, name: str, rows: slice, outputs: range) -> tuple[Tensor, int]:
        """The words that hold a range of outputs, and where in the first of them the range starts."""
        columns, offset = _words(outputs, self._per_word)
        return self.part(name)[rows, columns], offset

    def _unpack_outputs(self, words: Tensor) -> Tensor:
        """[rows, words] -> [rows, words * fields]."""
        mask = (1 << self._quantization.bits) - 1
        return (words[:, :, None] >> self._shifts).bitwise_and_(mask).flatten(1)


def _words(items: range, per_word: int) -> tuple[slice, int]:
    """The words that hold a range of packed items, and the place of its first item in the first word."""
    first = items.start // per_word
    return slice(first, -(-items.stop // per_word)), items.start - first * per_word


def _slabs(items: range, size: int) -> Iterator[range]:
    for begin in range(items.start, items.stop, size):
        yield range(begin, min(items.stop, begin + size))
