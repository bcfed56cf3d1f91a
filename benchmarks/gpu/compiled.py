"""What the compiler makes of the attention kernels: registers, spills, shared memory, and with which instructions they work.

    python benchmarks/gpu/compiled.py [--quick] [--capability 90]

Needs Triton and no GPU. Prints a table, then one line of JSON. A kernel that spills costs its step several times the price:
`stack` must be 0 for the types and head sizes that models have (float32 is there to be right, not fast).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from unittest import mock

import torch
from baton.kernels.batch import AttentionSpec, RowSpan
from baton.kernels.triton import launches
from baton.kernels.triton.attention import attention_of_rows
from dry_device import Compiled, dry_device

LAYERS, KV_HEADS = 2, 8
ROWS = ((0, 300), (900, 1))  # start and tokens: a chunk, and a decode row whose context is split


@dataclass(frozen=True, slots=True)
class Use:
    """How a model attends. cache: type of the pool, None for the model's own."""

    head_dim: int
    group: int = 4
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype | None = None
    window: int | None = None
    softcap: float | None = None

    def __str__(self) -> str:
        parts = [f"D{self.head_dim} G{self.group} S{self.block_size} {str(self.dtype)[6:]}"]
        parts += [f"cache {str(self.cache)[6:]}"] if self.cache is not None else []
        parts += [f"window {self.window}"] if self.window is not None else []
        return " ".join(parts + ([f"softcap {self.softcap}"] if self.softcap is not None else []))


FP8 = torch.float8_e4m3fn
QUICK = (Use(64), Use(128), Use(128, cache=FP8), Use(256, window=1024, softcap=50.0))
ALL = (
    *QUICK,
    Use(80, 1),
    Use(96, 1),
    Use(256),
    Use(128, 7),
    Use(128, 16),
    Use(128, block_size=128),
    Use(128, dtype=torch.float16),
    Use(64, cache=FP8),
    Use(256, cache=FP8),
    Use(128, window=4096),
    Use(64, 8, window=128),
    Use(128, dtype=torch.float32),
)


def compile_use(use: Use, capability: int) -> list[Compiled]:
    """The kernels of a mixed step, launched by the code that serves."""
    rows, offset = [], 0
    for start, num_tokens in ROWS:
        rows.append(RowSpan(offset, num_tokens, start, tuple(range(-(-(start + num_tokens) // use.block_size)))))
        offset += num_tokens
    num_blocks = max(len(row.block_table) for row in rows)
    kv = torch.empty((num_blocks, LAYERS, 2, KV_HEADS, use.block_size, use.head_dim), dtype=use.cache or use.dtype)
    scales = None if use.cache is None else torch.ones((LAYERS, 2, KV_HEADS))
    qkv = torch.empty((offset, (use.group + 2) * KV_HEADS, use.head_dim), dtype=use.dtype)
    angles = torch.empty((offset, use.head_dim // 2), dtype=use.dtype)
    spec = AttentionSpec(use.head_dim**-0.5, use.window, use.softcap)
    major_minor = capability // 10, capability % 10
    with dry_device(capability) as device, mock.patch.object(launches, "capability", return_value=major_minor):
        attention_of_rows(kv, rows, scales).run(1, qkv, spec, (angles, angles))
    return device.made


def main(arguments: Sequence[str]) -> int:
    """Print the table and the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the most usual models only")
    parser.add_argument("--capability", type=int, default=90, choices=(80, 89, 90), help="of the device to compile for")
    options = parser.parse_args(arguments)
    rows = []
    print(f"{'use':44} {'kernel':16} warps registers stack shared  instructions")
    for use in QUICK if options.quick else ALL:
        for made in compile_use(use, options.capability):
            kinds = ", ".join(f"{count} {kind}" for kind, count in made.instructions.items() if count)
            sizes = f"{made.num_warps:5} {made.registers:9} {made.stack_bytes:5} {made.shared_bytes:6}"
            print(f"{use!s:44} {made.name:16} {sizes}  {kinds}")
            rows.append({"use": str(use), **asdict(made)})
    print(json.dumps({"capability": options.capability, "kernels": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
