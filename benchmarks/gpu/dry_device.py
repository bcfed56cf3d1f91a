"""Compile Triton kernels for a GPU that need not be there, exactly as serving code would launch them.

Launching code runs as it is, on tensors of the CPU. Triton asks its driver what device there is: `DryDevice` answers in the
driver's place, takes the machine code of every kernel and launches nothing. So the code that is looked at is compiled for
the very arguments (types, alignments, constants) of a real step.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SHARED_BYTES = {90: 232_448, 80: 166_912, 89: 101_376}  # that one block of threads may have, by compute capability
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as it would be loaded.

    registers     of a thread
    stack_bytes   of a thread, in local memory: what did not fit into registers
    shared_bytes  of a block of threads
    instructions  how often the machine code has which kind of matrix product or copy
    """

    name: str
    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: dict[str, int]


KINDS = {
    "wgmma": r"\b[HQI]GMMA\b",
    "mma": r"\b[HQI]MMA\b",
    "cp.async": r"\bLDGSTS\b",
    "load": r"\bLDG\b",
    "local": r"\b(?:LDL|STL)\b",
    "exp2": r"\bMUFU\.EX2\b",
}


class DryDevice:
    """What Triton needs of a driver. `made` has every kernel that was to be loaded, in order."""

    def __init__(self, capability: int = 90) -> None:
        self.made: list[Compiled] = []
        self._capability = capability
        self._num_warps = 0  # of the kernel that is being loaded
        self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=self._properties)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps what it has compiled by device

    def get_current_stream(self, _device: int) -> int:
        return 0

    def launcher_cls(self, _source: object, metadata: SimpleNamespace) -> object:
        self._num_warps = metadata.num_warps
        return lambda *_arguments, **_options: None

    def _properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self._capability], "multiprocessor_count": 132, "warpSize": 32}

    def _load(self, name: str, code: bytes, shared: int, _device: int) -> tuple[object, object, int, int, int]:
        self.made.append(examine(name, code, shared, self._num_warps))
        return object(), object(), self.made[-1].registers, self.made[-1].stack_bytes, 1024


def examine(name: str, code: bytes, shared: int, num_warps: int) -> Compiled:
    """What stands in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump does not say what {name} uses: {usage!r}")
    counts = {kind: len(re.findall(pattern, listing)) for kind, pattern in KINDS.items()}
    return Compiled(name, num_warps, int(found[1]), int(found[2]), shared, counts)


@contextmanager
def dry_device(capability: int = 90) -> Iterator[DryDevice]:
    """Kernels that are launched inside are compiled for this capability and collected."""
    device = DryDevice(capability)
    before = driver._active
    driver.set_active(device)
    try:
        yield device
    finally:
        driver._active = before


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout
