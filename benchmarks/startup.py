"""How long `baton up` takes to the first token, and what a worker's memory holds beside the model and its KV.

    .venv/bin/python benchmarks/startup.py [--quick] [--launchers subprocess ray] [--model DIR]

startup_s                  from the start of the `baton up` process to the first token of a request of 16 tokens, sent when the
                           command says that it is ready; 1p1d, the model's file in the page cache. Of the slower launcher;
                           startup_subprocess_s and startup_ray_s are each one's median
worker_extra_mb            after a load of 512-token requests, the largest worker's PSS without its KV pool, less the bytes
                           of the model's files; worker_extra_rss_mb the same of RSS, in which pages that several processes
                           share count in full for each

Memory is read from /proc/PID/smaps, where KV pools are mappings of their own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from baton.bench.driver import Exchange
from baton.core.errors import BatonError, Unavailable
from baton.deploy.cluster import cluster_status
from baton.simulator.workload.planned import PlannedRequest
from clusters import SLO
from loads import Lengths, closed, fresh_seed
from memory import Usage, parse_smaps
from systems import Endpoint, model_folder, vocab_size

CLUSTER = "startup"
PATIENCE = 300.0  # seconds for a start, and for an end
TOPOLOGY = """
cluster: {cluster}
model: {{path: {model}, max_model_len: 2048, name: {cluster}}}
pools:
  prefill: {{threads: 1, block_size: 32, max_num_seqs: 64, max_step_tokens: 2048, kv_memory: 512MiB}}
  decode: {{threads: 1, block_size: 32, max_num_seqs: 64, max_step_tokens: 2048, kv_memory: 512MiB}}
router: {{grpc: "127.0.0.1:0", http: "127.0.0.1:0"}}
launcher: {launcher}
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One start: seconds to the first token, and each worker's memory after the load."""

    seconds: float
    workers: tuple[tuple[str, Usage], ...]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one start of each launcher, 8 requests")
    parser.add_argument("--launchers", nargs="+", choices=("subprocess", "ray"), default=["subprocess", "ray"])
    parser.add_argument("--starts", type=int, help="of each launcher (default: 3, quick 1)")
    parser.add_argument("--model", type=Path, help="model folder (default: the 110M Llama with random weights)")
    arguments = parser.parse_args()
    launchers = [name for name in arguments.launchers if name != "ray" or importlib.util.find_spec("ray")]
    for name in set(arguments.launchers) - set(launchers):
        print(f"{name} is not installed: not measured")
    if not launchers:
        parser.error("no launcher is left to measure")
    model, vocabulary = model_folder(arguments), vocab_size(arguments)
    model_bytes = sum(len(file.read_bytes()) for file in model.glob("*.safetensors"))  # and into the page cache
    num_requests = 8 if arguments.quick else 64
    runs: dict[str, list[Run]] = {name: [] for name in launchers}
    for _ in range(arguments.starts or (1 if arguments.quick else 3)):
        for name in launchers:
            run = await _run(name, model, vocabulary, num_requests)
            runs[name].append(run)
            print(f"{name}: first token after {run.seconds:.1f} s", flush=True)
            for member, usage in run.workers:
                shown = f"PSS {usage.pss / 1e6:.0f} MB, RSS {usage.rss / 1e6:.0f} MB"
                print(f"  {member}: {shown}; the model is {model_bytes / 1e6:.0f} MB, KV of {usage.kv / 1e6:.0f} MB not counted")
    medians = {f"startup_{name}_s": round(statistics.median(run.seconds for run in made), 2) for name, made in runs.items()}
    usages = [usage for made in runs.values() for run in made for _, usage in run.workers]
    print(
        json.dumps(
            {
                "startup_s": max(medians.values()),
                **medians,
                "worker_extra_mb": round((max(usage.pss for usage in usages) - model_bytes) / 1e6, 1),
                "worker_extra_rss_mb": round((max(usage.rss for usage in usages) - model_bytes) / 1e6, 1),
            }
        )
    )


async def _run(launcher: str, model: Path, vocabulary: int, num_requests: int) -> Run:
    began = time.monotonic()
    async with _up(launcher, model) as (endpoint, state):
        seed = fresh_seed(None)
        target = endpoint.target(seed, vocabulary)
        exchange = Exchange()
        await target.exchange(target.prepare(PlannedRequest(0, 0.0, 16, 2)), exchange)
        seconds = exchange.chunk_times[0] - began  # both are readings of time.monotonic
        load = await closed(endpoint.target(seed + 1, vocabulary), 32, num_requests, Lengths(512, 32), seed + 1, SLO)
        if load.summary.num_failed:
            raise Unavailable(f"the load failed: {load.complaints[0]}")
        record = json.loads((state / "baton" / f"{CLUSTER}.json").read_text(encoding="utf-8"))
        status = await cluster_status(record["controller"])
        workers = [member.registration for member in status.members if member.registration.role != "router"]
        return Run(seconds, tuple((worker.worker.worker_id, _usage(worker.pid)) for worker in workers))


@asynccontextmanager
async def _up(launcher: str, model: Path) -> AsyncIterator[tuple[Endpoint, Path]]:
    """`baton up` in a process of its own, and its state folder. Raises Unavailable when it does not come up."""
    with tempfile.TemporaryDirectory(prefix="baton-benchmark-") as scratch:
        file = Path(scratch) / "topology.yaml"
        file.write_text(TOPOLOGY.format(cluster=CLUSTER, model=model, launcher=launcher), encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "baton.cli.main", "up", str(file)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | {"XDG_STATE_HOME": scratch},
        )
        try:
            async with asyncio.timeout(PATIENCE):
                url = await _served_at(process)
            yield Endpoint(url, CLUSTER), Path(scratch)
        finally:
            await _end(process)


async def _served_at(process: asyncio.subprocess.Process) -> str:
    """The URL that the command prints when the cluster is ready."""
    assert process.stdout is not None
    said: deque[str] = deque(maxlen=12)
    async for line in process.stdout:
        said.append(line.decode())
        words = line.decode().split()
        if words[:1] == ["HTTP"]:
            return words[1].removesuffix("/v1")
    raise Unavailable(f"`baton up` ended with status {await process.wait()} before it was ready:\n{''.join(said)}")


async def _end(process: asyncio.subprocess.Process) -> None:
    """As Ctrl-C does; by force when that does not help, and then it says so."""
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        async with asyncio.timeout(PATIENCE):
            await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise Unavailable(f"`baton up` did not end within {PATIENCE:g} s of SIGINT and was killed") from None


def _usage(pid: int) -> Usage:
    return parse_smaps(Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except BatonError as error:
        raise SystemExit(str(error)) from error
