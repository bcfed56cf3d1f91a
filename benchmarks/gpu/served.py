"""Baton served on one GPU through the subprocess launcher: a prefill and a decode process that share it, or one mixed worker.

    python benchmarks/gpu/served.py 1p1d|mixed [--model llama-3.1-8b] [--quick]
    python benchmarks/gpu/served.py mixed --device cpu     # no GPU: proves the script on a tiny model, times nothing real

1,000 tokens in, 200 out, over gRPC from this process. `tok_s_closed` is the rate with 128 requests at a time. Then Poisson
arrivals at shares of that capacity: `attainment_R` is the share of all requests with TTFT <= 0.5 s and TPOT <= 30 ms at R
percent of it, `goodput` the highest rate (requests per second) of those with at least 0.9. The last line is JSON. Without a GPU
the script says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the loads and clusters of the other benchmarks

from baton.bench.grpc_target import GrpcTarget, ask_model
from baton.bench.prompts import PromptSource
from baton.core.slo import Slo
from baton.core.topology import ModelSpec, PoolSpec, RouterSpec, Topology
from baton.core.view import Role
from clusters import serving
from loads import Lengths, closed, poisson, warm
from models import KINDS, write_model

SLO = Slo(ttft=0.5, tpot=0.03, attainment=0.9)
SHARES = (50, 70, 85)  # percent of the capacity


@dataclass(frozen=True)
class Sizes:
    """The load."""

    lengths: Lengths
    at_a_time: int
    requests: int


FULL, QUICK, TINY = Sizes(Lengths(1000, 200), 128, 384), Sizes(Lengths(1000, 200), 64, 96), Sizes(Lengths(20, 5), 3, 6)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=("1p1d", "mixed"))
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(KINDS))
    parser.add_argument("--folder", type=Path, help="keep the model's files here, for the next run too")
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu proves the script", file=sys.stderr)
        return 2
    name = "tiny" if on_cpu else options.model
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)) / name
        if not (folder / "done").exists():
            device, dtype = (torch.device("cpu"), torch.float32) if on_cpu else (torch.device("cuda"), torch.bfloat16)
            write_model(KINDS[name], folder, device, dtype)
            (folder / "done").touch()
        sizes = TINY if on_cpu else QUICK if options.quick else FULL
        figures = asyncio.run(measure(topology(options.system, folder, on_cpu), sizes))
    device_name = "CPU" if on_cpu else torch.cuda.get_device_name()
    print(json.dumps({"device": device_name, "model": name, "system": options.system} | figures))
    return 0


def topology(system: str, folder: Path, on_cpu: bool) -> Topology:
    """What runs. Prefill gets less of the GPU's memory than decode: its KV leaves at once."""

    def pool(role: Role, share: float, seats: int, step_tokens: int) -> PoolSpec:
        if on_cpu:
            return PoolSpec(role, block_size=16, kv_memory_bytes=4 << 20, max_num_seqs=8, max_step_tokens=64)
        return PoolSpec(
            role, accelerator="cuda", gpu_memory_fraction=share, kv_memory_bytes=0, block_size=16, max_num_seqs=seats,
            max_step_tokens=step_tokens,
        )  # fmt: skip

    split = (pool(Role.PREFILL, 0.35, 64, 8192), pool(Role.DECODE, 0.6, 256, 2048))
    return Topology(
        cluster="gpu-benchmark",
        model=ModelSpec(str(folder), dtype="float32" if on_cpu else "bfloat16", max_model_len=128 if on_cpu else 4096),
        pools=split if system == "1p1d" else (pool(Role.MIXED, 0.95, 256, 2048),),
        slo=SLO,
        router=RouterSpec(grpc="127.0.0.1:0", http="127.0.0.1:0"),
        launcher="subprocess",
    )


async def measure(wanted: Topology, sizes: Sizes) -> dict[str, float]:
    async with serving(wanted) as cluster:
        model = await ask_model(cluster.grpc)

        def target(seed: int) -> GrpcTarget:
            return GrpcTarget(cluster.grpc, model.name, PromptSource(seed, model.vocab_size))

        first = target(0)
        await warm(first, sizes.lengths)
        measured = await closed(first, sizes.at_a_time, sizes.requests, sizes.lengths, 1, SLO)
        await first.close()
        capacity = measured.summary.request_rate
        figures = {
            "req_s_closed": round(capacity, 3),
            "tok_s_closed": round(measured.summary.output_token_rate, 1),
            "goodput": 0.0,
        }
        complaints = list(measured.complaints)
        for share in SHARES:
            each = target(share)
            measured = await poisson(each, capacity * share / 100, sizes.requests // 2, sizes.lengths, share, SLO)
            await each.close()
            complaints += measured.complaints
            summary = measured.summary
            figures[f"attainment_{share}"] = round(summary.attainment, 3)
            if summary.ttft is not None and summary.tpot is not None:
                figures[f"ttft_ms_p50_{share}"] = round(1e3 * summary.ttft.p50, 1)
                figures[f"tpot_ms_p50_{share}"] = round(1e3 * summary.tpot.p50, 2)
            if summary.attainment >= SLO.attainment:
                figures["goodput"] = round(capacity * share / 100, 3)
        for complaint in complaints:
            print(f"not to be quoted: {complaint}", file=sys.stderr)
    return figures


if __name__ == "__main__":
    sys.exit(main())
