"""The safetensors files of a model folder, one or many with an index.

Names and shapes of everything that will be read are checked against the files' headers first, so that a
damaged or foreign folder is refused before any work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class TensorSlice(Protocol):
    """A tensor of a file, not yet read."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: slice | tuple[slice, slice]) -> Tensor: ...


class Checkpoint:
    """Reads tensors by name. Files are mapped, so only what is read costs memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = _locate(folder)
        self._open = {file: _open(file) for file in sorted(set(self._files.values()))}
        self._names = {file: frozenset(opened.keys()) for file, opened in self._open.items()}

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ModelError, listing all that is wrong, unless every tensor is there with its shape."""
        problems = []
        for name, shape in shapes.items():
            if not self.holds(name):
                packed = f"{name.removesuffix('.weight')}.qweight"
                hint = (
                    f" ({packed} is there: config.json must describe it under quantization_config)" if self.holds(packed) else ""
                )
                problems.append(f"{self.place(name)}: tensor {name} is missing; it must have shape {list(shape)}{hint}")
            elif (found := tuple(self.part(name).get_shape())) != shape:
                problems.append(f"{self.place(name)}: tensor {name} has shape {list(found)}; config.json asks for {list(shape)}")
        refuse(problems)

    def read_into(self, out: Tensor, name: str, share: range | None = None, axis: int = 0) -> None:
        """Copy tensor `name` into `out`, on any device, converted to its type; only indices `share` of `axis` when given."""
        part = self.part(name)
        if share is None:
            tensor = part[:]
        elif axis == 0:
            tensor = part[share.start : share.stop]
        else:
            tensor = part[:, share.start : share.stop]
        out.copy_(tensor)

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A whole tensor."""
        out = torch.empty(shape, dtype=dtype)
        self.read_into(out, name)
        return out

    def holds(self, name: str) -> bool:
        return name in self._files and name in self._names[self._files[name]]

    def place(self, name: str) -> Path:
        """The file that holds a tensor, or else the folder: where a message should point."""
        return self._files.get(name, self._folder)

    def part(self, name: str) -> TensorSlice:
        """A tensor that is there, to read pieces of."""
        return self._open[self._files[name]].get_slice(name)


def refuse(problems: Sequence[str]) -> None:
    """Raise ModelError that lists what is wrong, if anything is."""
    if problems:
        more = f"\n... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ModelError("\n".join(problems[:8]) + more)


def _locate(folder: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    index = folder / INDEX
    if not index.exists():
        file = folder / SINGLE
        if not file.exists():
            raise ModelError(f"{folder} holds neither {SINGLE} nor {INDEX}; weights must be in safetensors format")
        return dict.fromkeys(_open(file).keys(), file)
    try:
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        located = {name: folder / file for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: cannot be read ({error}); it must map tensor names to files under 'weight_map'") from error
    if missing := sorted({file.name for file in located.values() if not file.exists()}):
        raise ModelError(f"{index} names files that are not in {folder}: {', '.join(missing)}")
    return located


class _SafeFile(Protocol):
    """The typed face of `safe_open`."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> TensorSlice: ...


def _open(file: Path) -> _SafeFile:
    try:
        opened: _SafeFile = safe_open(file, framework="pt")
        return opened
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a readable safetensors file ({error}); fetch or copy it again") from error
