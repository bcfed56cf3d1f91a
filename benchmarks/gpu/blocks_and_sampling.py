"""Block moves, norms, gates, sampling and 8-bit linears on one GPU: right first, then how fast.

    python benchmarks/gpu/blocks_and_sampling.py [--quick]
    python benchmarks/gpu/blocks_and_sampling.py --interpret    # no GPU: proves the script on tiny shapes, times nothing real

Every kernel is compared with `kernels/reference.py` before it is timed; a wrong one ends the run. Bandwidths are shares of what
a plain copy of the same run reaches, counting each byte read or written once; times are medians of replayed CUDA
graphs, so what the host adds to a launch is not in them. Logits fit in the L2 cache, as they do when a step has just made
them. The last line is JSON, figure -> number; without a GPU the script says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from baton.kernels.batch import DrawSpec

Figures = dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """What is run. `pool` is kv[N, L, 2, K, S, D]; `rows` are batches that are sampled, `tokens` those of norms and gates."""

    copied_bytes: int
    pool: tuple[int, int, int, int, int, int]
    tokens: tuple[int, ...]
    hidden: int
    inner: int
    rows: tuple[int, ...]
    vocabulary: int
    linear_tokens: tuple[int, ...]
    repeats: int


# Llama-3.1-8B: 32 layers, 8 KV heads of 128, so 2 MiB a block of 16 tokens.
FULL = Sizes(1 << 30, (2048, 32, 2, 8, 16, 128), (64, 8192), 4096, 14336, (1, 64, 256), 128256, (1, 64, 256), 30)
QUICK = Sizes(1 << 28, (512, 32, 2, 8, 16, 128), (64, 4096), 4096, 14336, (64,), 128256, (64,), 10)
TINY = Sizes(1 << 12, (6, 2, 2, 2, 16, 16), (3,), 64, 96, (2,), 5000, (3,), 1)


@dataclass(frozen=True)
class Bench:
    """Times calls on one device, or runs them once where kernels are interpreted."""

    device: str
    sizes: Sizes

    def seconds(self, call: Callable[..., object], *arguments: object) -> float:
        """Of one call; on a GPU the median of replays of a graph of ten."""
        if self.device == "cpu":
            began = time.perf_counter()
            call(*arguments)
            return time.perf_counter() - began
        for _ in range(3):
            call(*arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                call(*arguments)
        graph.replay()
        taken = []
        for _ in range(self.sizes.repeats):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            taken.append(began.elapsed_time(ended) / 1e4)
        return statistics.median(taken)

    def copy_bytes_s(self) -> float:
        """Bytes read and written in a second by a plain copy."""
        source = torch.ones(self.sizes.copied_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * self.sizes.copied_bytes / self.seconds(target.copy_, source)


def moves(bench: Bench, copy_bytes_s: float) -> Figures:
    """Half of a pool's blocks, scattered, into staging and back: whole, of one layer, of half of the heads, and in 8 bits."""
    from baton.kernels import reference
    from baton.kernels.triton.blocks import PoolCut

    shape = bench.sizes.pool
    kv = torch.randn(shape, dtype=torch.bfloat16, device=bench.device)
    scales = torch.full((shape[1], 2, shape[3]), 0.02, device=bench.device)
    ids = torch.randperm(shape[0], generator=torch.Generator().manual_seed(0))[: shape[0] // 2].tolist()
    whole, half = range(shape[1]), range(shape[3] // 2)
    figures: Figures = {}
    for name, layers, heads, dtype in (
        ("whole", whole, range(shape[3]), torch.bfloat16),
        ("layer", whole[:1], range(shape[3]), torch.bfloat16),
        ("half_heads", whole, half, torch.bfloat16),
        ("fp8", whole, range(shape[3]), torch.float8_e4m3fn),
    ):
        cut = PoolCut(kv, layers, heads, scales)
        index = cut.index(ids)
        staged = torch.empty(cut.staged_shape(len(ids)), dtype=dtype, device=bench.device)
        cut.gather(index, staged)
        few = min(4, len(ids))
        expected = reference.gather_blocks(kv, ids[:few], layers, heads, dtype, scales)
        require(f"gather {name}", staged[:few].float(), expected.float(), 0.0 if dtype == torch.bfloat16 else 0.13)
        moved = staged.numel() * (staged.element_size() + kv.element_size())
        figures[f"gather_{name}_share"] = moved / bench.seconds(cut.gather, index, staged) / copy_bytes_s
        staged.zero_()
        cut.scatter(index, staged)
        require(
            f"scatter {name}",
            kv[ids[:few]][:, layers.start : layers.stop, :, heads.start : heads.stop],
            0 * staged[:few].to(kv.dtype),
            0.0,
        )
        figures[f"scatter_{name}_share"] = moved / bench.seconds(cut.scatter, index, staged) / copy_bytes_s
        kv.normal_()
    return figures


def elementwise(bench: Bench, copy_bytes_s: float) -> Figures:
    """Norms and gates: shares of copy bandwidth where there are many tokens, microseconds where there are few."""
    from baton.kernels import reference
    from baton.kernels.triton.gates import gated
    from baton.kernels.triton.norms import add_rms_norm

    figures: Figures = {}
    hidden, inner = bench.sizes.hidden, bench.sizes.inner
    weight = torch.randn(hidden, dtype=torch.bfloat16, device=bench.device)
    for tokens in bench.sizes.tokens:
        x, delta = torch.randn(2, tokens, hidden, dtype=torch.bfloat16, device=bench.device)
        total, normed = add_rms_norm(x, delta, weight, 1e-5)
        expected_total, expected_normed = reference.add_rms_norm(x, delta, weight, 1e-5)
        require("sum", total, expected_total, 0.0)
        require("norm", normed, expected_normed, 0.02)
        seconds = bench.seconds(add_rms_norm, x, delta, weight, 1e-5)
        figures[f"norm_{tokens}_share"] = 4 * x.numel() * x.element_size() / seconds / copy_bytes_s
        figures[f"norm_{tokens}_us"] = seconds * 1e6
        gate_up = torch.randn(tokens, 2 * inner, dtype=torch.bfloat16, device=bench.device)
        require("gate", gated("silu", gate_up), reference.silu_mul(gate_up), 0.02)
        seconds = bench.seconds(gated, "silu", gate_up)
        figures[f"gate_{tokens}_share"] = 3 * tokens * inner * gate_up.element_size() / seconds / copy_bytes_s
        figures[f"gate_{tokens}_us"] = seconds * 1e6
    return figures


def sampling(bench: Bench, copy_bytes_s: float) -> Figures:
    """Microseconds for the tokens of a batch. `peaked` logits are as trained models have them, `flat` as random weights."""
    from baton.kernels import cpu
    from baton.kernels.batch import DrawSpec
    from baton.kernels.draw_words import pack
    from baton.kernels.triton.sampling import argmax, sample

    figures: Figures = {}
    kinds = {"greedy": (0.0, 0, 1.0), "plain": (1.0, 0, 1.0), "top_p": (1.0, 0, 0.95), "top_k_top_p": (0.6, 20, 0.95)}
    for count in bench.sizes.rows:
        for shape, spread in (("peaked", 4.0), ("flat", 0.5)):
            logits = (spread * torch.randn(count, bench.sizes.vocabulary, device=bench.device)).bfloat16()
            for kind, (temperature, top_k, top_p) in kinds.items():
                specs = [DrawSpec(temperature, top_k, top_p, 0.0, row, 0, row) for row in range(count)]
                parameters = pack(specs).to(bench.device)
                require_tokens(kind, sample(logits, parameters), logits, specs, cpu.draw)
                figures[f"sample_{shape}_{kind}_{count}_us"] = bench.seconds(sample, logits, parameters) * 1e6
            figures[f"argmax_{shape}_{count}_us"] = bench.seconds(argmax, logits) * 1e6
            figures[f"torch_sort_{shape}_{count}_us"] = bench.seconds(torch.sort, logits) * 1e6
        figures[f"read_logits_{count}_us"] = 2e6 * count * bench.sizes.vocabulary / copy_bytes_s
    return figures


def linears(bench: Bench, copy_bytes_s: float) -> Figures:
    """The first linear of an 8B layer, [6144, 4096], in 8 bits, beside torch's in bfloat16; shares are of reading its weights.

    Eight layers take turns, so that no weight is found in a cache.
    """
    from baton.kernels.triton.fp8 import Fp8Linear

    outputs, inputs = (6144, 4096) if bench.device == "cuda" else (64, 48)
    weights = torch.randn(8, outputs, inputs, dtype=torch.bfloat16, device=bench.device)
    plain = [functools.partial(functional.linear, weight=weight) for weight in weights]
    ways: dict[str, Sequence[Callable[[Tensor], Tensor]]] = {
        "fp8_widened": [Fp8Linear(weight, None, multiplied_in_8_bits=False) for weight in weights],
        "fp8_scaled": [Fp8Linear(weight, None) for weight in weights],
        "bf16": plain,
    }
    figures: Figures = {}
    for way, layers in ways.items():
        for tokens in bench.sizes.linear_tokens:
            x = torch.randn(tokens, inputs, dtype=torch.bfloat16, device=bench.device)
            exact = functional.linear(x.float(), weights[0].float())
            error = float((layers[0](x).float() - exact).norm() / exact.norm())
            if error > 0.06:
                sys.exit(f"a linear of {way} is {error:.1%} from the exact one at {tokens} tokens")
            seconds = bench.seconds(_run_all, layers, x) / len(layers)
            figures[f"{way}_{tokens}_us"] = seconds * 1e6
            read = weights[0].numel() * (2 if way == "bf16" else 1)
            figures[f"{way}_{tokens}_share"] = read / seconds / copy_bytes_s
    return figures


def _run_all(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def require(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """End the run when they differ by more than this share (and, near zero, by more than it)."""
    try:
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    except AssertionError as error:
        sys.exit(f"{name} is wrong: {error}")


def require_tokens(
    kind: str,
    got: Tensor,
    logits: Tensor,
    specs: Sequence[DrawSpec],
    draw: Callable[[Tensor, Sequence[DrawSpec]], Tensor],
) -> None:
    """End the run when the tokens are not the CPU's. The border of top-p may move by a token: one row in 64 may differ."""
    wide = logits[:64].float().cpu()
    expected = wide.argmax(-1) if kind == "greedy" else draw(wide, specs[:64])
    wrong = int((got[:64].cpu() != expected).sum())
    if wrong > (0 if kind in ("greedy", "plain") else 1):
        sys.exit(f"sampling {kind}: {wrong} of {len(expected)} tokens are not those of the CPU")


PARTS = {"moves": moves, "elementwise": elementwise, "sampling": sampling, "linears": linears}


def figures_of(bench: Bench, parts: Sequence[str] = tuple(PARTS)) -> Figures:
    """All figures, printed as they come."""
    copy_bytes_s = bench.copy_bytes_s()
    figures = {"copy_gb_s": copy_bytes_s / 1e9}
    for part in parts:
        made = PARTS[part](bench, copy_bytes_s)
        for name, value in made.items():
            print(f"{name:40} {value:12.4g}", flush=True)
        figures |= made
    return figures


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--quick", action="store_true", help="smaller pools and fewer repeats")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes in Triton's interpreter; the figures mean nothing")
    options = parser.parse_args()
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; these are: {', '.join(PARTS)}")
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
    figures = figures_of(bench, options.parts or tuple(PARTS))
    if options.interpret:
        figures = {"interpreted_figures": len(figures)}
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


if __name__ == "__main__":
    main()
