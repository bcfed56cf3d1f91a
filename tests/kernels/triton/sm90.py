"""Compiles kernels for an H100 or H200 down to machine code on a machine that has none: Triton brings the assembler.

The tests' own process interprets kernels, so this compiles in another: run as a program, it reads cases as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration.

    module     below baton.kernels.triton
    arguments  Triton's type of each argument in order, "*bf16", "i32" or "fp32"; a number, a truth or a type named
               "tl.bfloat16" is a constant. A pointer, and an integer that ends in ":16", is a multiple of 16.
    """

    module: str
    kernel: str
    arguments: Sequence[str | int | bool | float | None]
    warps: int = 4
    stages: int = 3

    def __str__(self) -> str:
        return f"{self.module}.{self.kernel}({', '.join(map(str, self.arguments))})"


@dataclass(frozen=True)
class Compiled:
    """ptx: what the assembler was given; shared_bytes: of one program; error: why there is no machine code, else empty."""

    ptx: str = ""
    shared_bytes: int = 0
    error: str = field(default="")


def compile_cases(cases: Sequence[Case]) -> list[Compiled]:
    """All of them in one other process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", str(Path(__file__))],
        input=json.dumps([asdict(case) for case in cases]),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Compiled(**entry) for entry in json.loads(done.stdout)]


def _compile(case: Case) -> Compiled:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"baton.kernels.triton.{case.module}"), case.kernel)
    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for place, (name, argument) in enumerate(zip(kernel.arg_names, case.arguments, strict=True)):
        if isinstance(argument, str) and argument.startswith(("*", "i", "u", "fp")):
            signature[name] = argument.removesuffix(":16")
            if argument.startswith("*") or argument.endswith(":16"):
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            is_type = isinstance(argument, str) and argument.startswith("tl.")
            constants[name] = getattr(tl, str(argument)[3:]) if is_type else argument
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except Exception as error:  # whatever the compiler says is the test's message
        return Compiled(error=f"{type(error).__name__}: {error}")
    return Compiled(made.asm["ptx"], made.metadata.shared)


if __name__ == "__main__":
    json.dump([asdict(_compile(Case(**entry))) for entry in json.load(sys.stdin)], sys.stdout)
