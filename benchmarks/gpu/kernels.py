"""Attention over the paged cache on one GPU: right first, then how near to the hardware's limits.

    python benchmarks/gpu/kernels.py [--quick] [--search]
    python benchmarks/gpu/kernels.py --interpret    # no GPU: proves the script on tiny shapes, times nothing real

Every kernel is compared with torch in float32 before anything is timed; a wrong one ends the run. Decode is a share of what a
plain copy of the same run moves, counting the keys and values that are read; prefill a share of the rate of an 8192-cubed
product in bfloat16, counting the causal half only. Beside them stand torch's scaled_dot_product_attention over contiguous
keys and values, which has no block tables to follow, and FlexAttention, compiled. Times are medians of replayed CUDA graphs.
`--search` tries other tiles than `kernels/triton/launches.py` has and prints what each reaches. The last line is JSON,
figure -> number; without a GPU the script says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from baton.kernels.batch import AttentionSpec, RowSpan
from blocks_and_sampling import FULL, QUICK, TINY, Bench, Figures, require
from torch import Tensor
from torch.nn import functional

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Model:
    """How a model attends: H query heads over K KV heads of D. cache: type of the pool."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 16
    cache: torch.dtype = torch.bfloat16
    window: int | None = None
    softcap: float | None = None

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.head_dim**-0.5, self.window, self.softcap)

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.cache.itemsize


@dataclass(frozen=True)
class Loads:
    """What is timed. decode: name -> batch and context; prefill: name -> prefix and chunk."""

    model: Model
    checked: tuple[Model, ...]
    rows: tuple[tuple[int, int], ...]
    decode: dict[str, tuple[int, int]]
    prefill: dict[str, tuple[int, int]]
    layers: int
    product: int


MIXED = ((0, 300), (1000, 1), (4000, 1), (0, 1), (700, 129), (31, 1), (90, 2))
EIGHT_B = Model(32, 8, 128)  # Llama-3.1-8B, Qwen3-8B
CHECKED = (
    EIGHT_B,
    Model(32, 8, 128, 128),
    Model(32, 8, 64, 64),
    Model(32, 32, 80),
    Model(32, 32, 96, 32),
    Model(16, 8, 256, window=512, softcap=50.0),
    Model(28, 4, 128, window=600),
    Model(32, 8, 128, cache=FP8),
    Model(16, 8, 256, cache=FP8),
)
DECODE = {"b64_4k": (64, 4096), "b1_4k": (1, 4096), "b256_1k": (256, 1024), "b8_32k": (8, 32768)}
PREFILL = {"8k": (0, 8192), "2k_behind_30k": (30720, 2048)}
LARGE = Loads(EIGHT_B, CHECKED, MIXED, DECODE, PREFILL, 4, 8192)
FEW = Loads(EIGHT_B, CHECKED, MIXED, {"b64_4k": (64, 4096), "b1_4k": (1, 4096)}, {"8k": (0, 8192)}, 2, 8192)
SMALL = Model(4, 2, 32)
INTERPRETED = Loads(SMALL, (SMALL, Model(4, 2, 32, cache=FP8)), ((0, 20), (140, 1)), {"b2": (2, 140)}, {"20": (3, 20)}, 1, 16)


@dataclass(frozen=True)
class Step:
    """Rows over a pool kv[N, L, 2, K, S, D] in which their blocks lie scattered, and the new qkv [T, H + 2K, D]."""

    model: Model
    rows: Sequence[RowSpan]
    kv: Tensor
    scales: Tensor | None
    qkv: Tensor

    @classmethod
    def made(cls, model: Model, shapes: Sequence[tuple[int, int]], layers: int, device: str) -> Step:
        counts = [-(-(start + n) // model.block_size) for start, n in shapes]
        blocks = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).split(counts)
        rows, offset = [], 0
        for (start, n), table in zip(shapes, blocks, strict=True):
            rows.append(RowSpan(offset, n, start, tuple(table.tolist())))
            offset += n
        shape = (sum(counts), layers, 2, model.kv_heads, model.block_size, model.head_dim)
        kv = torch.empty(shape, dtype=model.cache, device=device)
        for block in kv:  # one at a time: a pool may have gigabytes
            block.copy_(torch.randn(block.shape, device=device) * (1 if model.cache == torch.bfloat16 else 30))
        scales = torch.full((layers, 2, model.kv_heads), 1 / 30, device=device) if model.cache == FP8 else None
        heads = model.heads + 2 * model.kv_heads
        return cls(model, rows, kv, scales, torch.randn((offset, heads, model.head_dim), device=device).bfloat16())

    def expected(self, row: RowSpan, layer: int) -> Tensor:
        """The row's outputs [n, H * D] by torch, in float32, from what the pool holds after the step."""
        model = self.model
        at = torch.arange(row.end, device=self.kv.device)
        table = torch.tensor(row.block_table, device=self.kv.device)
        kept = self.kv[:, layer][table].float().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : row.end]  # [2, K, C, D]
        if self.scales is not None:
            kept = kept * self.scales[layer, :, :, None, None]
        keys, values = kept.repeat_interleave(model.heads // model.kv_heads, 1)  # [H, C, D]
        query = self.qkv[row.offset : row.offset + row.num_tokens, : model.heads].float().transpose(0, 1)  # [H, n, D]
        scores = query @ keys.transpose(1, 2) * model.spec.scale
        if model.softcap is not None:
            scores = model.softcap * torch.tanh(scores / model.softcap)
        distance = at[row.start :, None] - at
        hidden = (distance < 0) | (distance >= (model.window or row.end))
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1).flatten(1)


def check(bench: Bench, loads: Loads) -> None:
    """Every model of the list, decode rows and chunks together."""
    from baton.kernels.triton.attention import attention_of_rows

    for model in loads.checked:
        step = Step.made(model, loads.rows, 2, bench.device)
        got = attention_of_rows(step.kv, step.rows, step.scales).run(1, step.qkv, model.spec, None)
        for row in step.rows:
            part = got[row.offset : row.offset + row.num_tokens].float()
            require(f"{model}, {row.num_tokens} tokens behind {row.start}", part, step.expected(row, 1), 0.02)
        print(f"right: {model}", flush=True)


def decode(bench: Bench, loads: Loads, copy_bytes_s: float) -> Figures:
    """Shares of copy bandwidth and microseconds a layer; `step` with the store of the new keys and values."""
    from baton.kernels.triton.attention import TritonAttention, device_aim
    from baton.kernels.triton.decode_attention import decode_attention
    from baton.kernels.triton.step_tensors import upload

    figures: Figures = {}
    for cache, suffix in ((torch.bfloat16, ""), (FP8, "_fp8")):
        model = Model(loads.model.heads, loads.model.kv_heads, loads.model.head_dim, loads.model.block_size, cache)
        for name, (batch, context) in loads.decode.items():
            made = Step.made(model, [(context - 1, 1)] * batch, loads.layers, bench.device)
            tensors = upload(made.rows, model.block_size, device_aim(made.kv), made.kv.device)
            attention = TritonAttention(made.kv, tensors, made.scales)
            out = torch.empty((batch, model.heads * model.head_dim), dtype=torch.bfloat16, device=bench.device)
            scales = [None if made.scales is None else made.scales[layer] for layer in range(loads.layers)]

            def attend_all(made: Step = made, tensors=tensors, out: Tensor = out, scales=scales) -> None:
                for layer in range(loads.layers):  # in turn, so that little is found in a cache
                    decode_attention(made.qkv, made.kv.select(1, layer), scales[layer], tensors, made.model.spec, out)

            def step_all(made: Step = made, attention: TritonAttention = attention) -> None:
                for layer in range(loads.layers):
                    attention.run(layer, made.qkv, made.model.spec, None)

            seconds = bench.seconds(attend_all) / loads.layers
            figures[f"decode_{name}{suffix}_us"] = seconds * 1e6
            figures[f"decode_{name}{suffix}_step_us"] = bench.seconds(step_all) / loads.layers * 1e6
            figures[f"decode_{name}{suffix}_share"] = batch * context * model.token_bytes / seconds / copy_bytes_s
            del made, tensors, attention, attend_all, step_all
    for name, (batch, context) in loads.decode.items():
        for peer, seconds in _peers(bench, loads.model, batch, 1, context).items():
            figures[f"decode_{name}_{peer}_us"] = seconds * 1e6
    return figures


def prefill(bench: Bench, loads: Loads, product_rate: float) -> Figures:
    """Shares of the measured product rate and microseconds a layer; of storing new keys and values, microseconds."""
    from baton.kernels.triton.attention import TritonAttention, device_aim
    from baton.kernels.triton.kv_write import turn_and_store
    from baton.kernels.triton.prefill_attention import prefill_attention
    from baton.kernels.triton.step_tensors import upload

    figures: Figures = {}
    model = loads.model
    for name, (prefix, chunk) in loads.prefill.items():
        made = Step.made(model, [(prefix, chunk)], 1, bench.device)
        tensors = upload(made.rows, model.block_size, device_aim(made.kv), made.kv.device)
        out = torch.empty((chunk, model.heads * model.head_dim), dtype=torch.bfloat16, device=bench.device)
        pool, angles = made.kv.select(1, 0), torch.rand((chunk, model.head_dim // 2), device=bench.device).bfloat16()
        TritonAttention(made.kv, tensors).run(0, made.qkv, model.spec, (angles, angles))
        seconds = bench.seconds(prefill_attention, made.qkv, pool, None, tensors, model.spec, out)
        seen = chunk * (prefix + (chunk + 1) / 2)  # pairs of a query and a key
        figures[f"prefill_{name}_us"] = seconds * 1e6
        figures[f"prefill_{name}_share"] = 4 * model.heads * model.head_dim * seen / seconds / product_rate
        stored = bench.seconds(turn_and_store, made.qkv, pool, None, tensors.slots, (angles, angles))
        figures[f"store_{name}_us"] = stored * 1e6
        del made, tensors, pool
        if prefix == 0:
            for peer, taken in _peers(bench, model, 1, chunk, chunk).items():
                figures[f"prefill_{name}_{peer}_us"] = taken * 1e6
                figures[f"prefill_{name}_{peer}_share"] = 4 * model.heads * model.head_dim * seen / taken / product_rate
    return figures


def _peers(bench: Bench, model: Model, batch: int, num_queries: int, context: int) -> Figures:
    """Seconds of torch's own, on contiguous keys and values [B, K, C, D]: causal when there are as many queries as keys."""
    if bench.device == "cpu":
        return {}
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query = torch.randn((batch, model.heads, num_queries, model.head_dim), device=bench.device).bfloat16()
    keys, values = torch.randn((2, batch, model.kv_heads, context, model.head_dim), device=bench.device).bfloat16()
    causal = num_queries > 1
    attend = partial(functional.scaled_dot_product_attention, query, keys, values, is_causal=causal, enable_gqa=True)
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, num_queries, context, device=bench.device)
    flex = partial(torch.compile(flex_attention), query, keys, values, block_mask=mask, enable_gqa=True)
    found: Figures = {}
    ways: dict[str, Callable[[], object]] = {"sdpa": attend, "flex": flex}
    for name, way in ways.items():
        try:
            found[name] = bench.seconds(way)
        except Exception as error:  # a peer that cannot run here is reported, and no reason to end
            print(f"{name} does not run here: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def search(bench: Bench, loads: Loads, copy_bytes_s: float, product_rate: float) -> Figures:
    """What other tiles reach on the first decode and prefill load; the best of them belongs into `launches`."""
    from baton.kernels.triton import launches
    from baton.kernels.triton.launches import Launch

    figures: Figures = {}
    one = Loads(loads.model, (), (), dict([*loads.decode.items()][:1]), dict([*loads.prefill.items()][:1]), loads.layers, 0)
    tries = {
        "decode": [(16, tile, warps, stages) for tile in (32, 64, 128) for warps in (2, 4, 8) for stages in (3, 5, 7)],
        "prefill": [(128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 5), (128, 32, 4, 3), (64, 64, 4, 3), (64, 64, 4, 5)],
    }
    for part, measure, limit in (("decode", decode, copy_bytes_s), ("prefill", prefill, product_rate)):
        for numbers in tries[part]:
            table = {loads.model.head_dim: Launch(*numbers)}
            names = ["_DECODE"] if part == "decode" else ["_HOPPER_PREFILL", "_SMALLER_PREFILL"]
            try:
                with (
                    mock.patch.multiple(launches, **dict.fromkeys(names, table)),
                    mock.patch(f"{__name__}._peers", return_value={}),
                ):
                    made = measure(bench, one, limit)
            except Exception as error:  # more shared memory than there is, say
                print(f"{part} {numbers}: {str(error).splitlines()[0]}")
                continue
            for name, value in made.items():
                if name.endswith("_share"):
                    figures[f"search_{name}_{'x'.join(map(str, numbers))}"] = value
                    print(f"{part} {numbers} {name} {value:.3f}", flush=True)
    return figures


def product_rate(bench: Bench, size: int) -> float:
    """Operations in a second of a square product in bfloat16."""
    left, right = torch.randn((2, size, size), device=bench.device).bfloat16()
    return 2 * size**3 / bench.seconds(torch.mm, left, right)


def figures_of(bench: Bench, loads: Loads, searching: bool) -> Figures:
    """All figures, printed as they come."""
    check(bench, loads)
    copied, product = bench.copy_bytes_s(), product_rate(bench, loads.product)
    figures = {"copy_gb_s": copied / 1e9, "product_tflop_s": product / 1e12}
    figures |= decode(bench, loads, copied) | prefill(bench, loads, product)
    for name, value in figures.items():
        print(f"{name:40} {value:12.4g}", flush=True)
    return figures | search(bench, loads, copied, product) if searching else figures


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer loads and repeats")
    parser.add_argument("--search", action="store_true", help="try other tiles too")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes in Triton's interpreter; the figures mean nothing")
    options = parser.parse_args()
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        from baton.kernels.triton.interpreter import mend

        mend()
    elif not torch.cuda.is_available():
        print("no CUDA device is here: nothing to measure. --interpret proves the script without one.", file=sys.stderr)
        sys.exit(2)
    torch.manual_seed(0)
    bench = Bench("cpu", TINY) if options.interpret else Bench("cuda", QUICK if options.quick else FULL)
    print("interpreted: no figure below is a measurement" if options.interpret else torch.cuda.get_device_name())
    figures = figures_of(bench, INTERPRETED if options.interpret else FEW if options.quick else LARGE, options.search)
    if options.interpret:
        figures = {"interpreted_figures": len(figures)}
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


if __name__ == "__main__":
    main()
