"""What the serving benchmarks share: models with random weights, clusters around them, and requests one at a time."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from baton.bench.driver import Exchange
from baton.bench.grpc_target import GrpcTarget
from baton.core.slo import Slo
from baton.core.topology import KvTransferSpec, ModelSpec, PoolSpec, RouterSpec, Topology
from baton.core.view import Role
from baton.deploy.cluster import ClusterStatus, running_cluster
from baton.engine.random_model import make_model
from baton.simulator.workload.planned import PlannedRequest

SLO = Slo(ttft=1.0, tpot=0.05, attainment=0.9)


def random_model(size: str = "110M") -> Path:
    """A Llama of the benchmarks (bf16, random weights; "110M" or "16M"), made once per machine."""
    folder = Path(tempfile.gettempdir()) / f"baton-benchmark-models-{os.getuid()}" / f"llama-{size.lower()}"
    if not (folder / "done").exists():
        make_model(folder, size, seed=1)
        (folder / "done").touch()
    return folder


def one_prefill_one_decode(transport: str = "auto", model: Path | None = None) -> Topology:
    """1P1D on two cores: one thread each, blocks of 32 tokens."""
    pool = {"kv_memory_bytes": 512 << 20, "block_size": 32, "threads": 1, "max_num_seqs": 64, "max_step_tokens": 2048}
    pools = (PoolSpec(Role.PREFILL, **pool), PoolSpec(Role.DECODE, **pool))  # type: ignore[arg-type]
    return _topology(pools, model, transport)


def one_mixed(model: Path | None = None) -> Topology:
    """One worker that does both phases on two threads, chunks of prompts beside decode rows."""
    pool = PoolSpec(Role.MIXED, kv_memory_bytes=1 << 30, block_size=32, threads=2, max_num_seqs=64, max_step_tokens=256)
    return _topology((pool,), model)


def _topology(pools: tuple[PoolSpec, ...], model: Path | None, transport: str = "auto") -> Topology:
    return Topology(
        cluster="benchmark",
        model=ModelSpec(str(model or random_model()), max_model_len=2048),
        pools=pools,
        slo=SLO,
        kv_transfer=KvTransferSpec(transport),
        router=RouterSpec(grpc="127.0.0.1:0", http="127.0.0.1:0"),
        launcher="subprocess",
    )


@asynccontextmanager
async def serving(topology: Topology) -> AsyncIterator[ClusterStatus]:
    """The topology up and ready; its state and logs live in a temporary folder that goes with it."""
    with tempfile.TemporaryDirectory(prefix="baton-benchmark-") as scratch:
        os.environ["XDG_STATE_HOME"] = scratch
        async with running_cluster(topology, Path(scratch) / "logs") as cluster:
            yield await cluster.wait_ready()


async def lone_prefill(target: GrpcTarget, input_tokens: int, repeats: int) -> list[float]:
    """TTFT in seconds of requests that have the cluster to themselves, one after the other."""
    seconds = []
    for index in range(repeats):
        prepared = target.prepare(PlannedRequest(1_000_000 + index, 0.0, input_tokens, 2))
        exchange = Exchange()
        began = time.monotonic()
        await target.exchange(prepared, exchange)
        seconds.append(exchange.chunk_times[0] - began)
    return seconds


def median_ms(seconds: Sequence[float]) -> float:
    return round(1000 * statistics.median(seconds), 2)
