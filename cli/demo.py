"""`baton demo`: a local cluster from its start to its end, with answers, a measured load and a report."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import httpx
import typer
from rich.console import Console
from rich.markup import escape

from ..bench.console import LiveProgress, print_summary
from ..bench.driver import run_load
from ..bench.grpc_target import GrpcTarget, ask_model
from ..bench.metrics import summarise
from ..bench.prompts import PromptSource
from ..bench.report import Fact, Settings, write_html
from ..bench.scrape import read_handoffs
from ..client.client import AsyncClient
from ..core.errors import InvalidRequest, Unavailable
from ..core.topology import Topology
from ..deploy.checks import check_topology
from ..deploy.cluster import running_cluster
from ..deploy.settings import TopologyFile, read_topology_file
from ..deploy.state import ClusterRecord, claim, log_folder
from ..simulator.workload.lengths import parse_length
from ..simulator.workload.synthetic import poisson_workload
from . import screen

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MAX_INPUT, MAX_OUTPUT = 512, 192
"""Tokens of the longest prompts and answers of the workload, where the model takes so many."""
ANSWER_TOKENS = 80
BASELINE_PATIENCE = 5.0
"""Seconds within which an idle cluster must hold every block it held before."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What is shown: `prompts` are answered, then `rate` requests/s arrive for `seconds`."""

    prompts: tuple[str, ...]
    seconds: float
    rate: float
    seed: int
    html: Path


@dataclass(frozen=True, slots=True)
class Faces:
    """Where the cluster is reached, and the free blocks of each worker before anything was asked of it."""

    grpc: str
    http: str
    client: AsyncClient
    baseline: Mapping[str, int]


def demo(
    topology: Annotated[Path, typer.Argument(help="The cluster to start.")] = EXAMPLES / "local.yaml",
    prompts: Annotated[Path, typer.Option(help="Questions to answer, one a line.")] = EXAMPLES / "demo_prompts.txt",
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of the replayed workload.")] = 30.0,
    rate: Annotated[float, typer.Option(min=0.01, help="Its requests per second.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the workload.")] = 0,
    html: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("out/demo.html"),
) -> None:
    """Start a cluster, let it answer, replay a workload on it, report, and end it without a trace.

    The exit status is 0 only if every request was answered and every block came back.
    """
    console = screen.out()
    with screen.exits_on_error():
        options = DemoOptions(_read_prompts(prompts), seconds, rate, seed, html)
        show = _show(console, _read_topology(topology).topology, options)
        try:
            well = asyncio.run(_until_signal(show))
        except asyncio.CancelledError:
            console.print("stopped; nothing is left running")
            raise typer.Exit(128 + signal.SIGINT) from None
    if not well:
        raise typer.Exit(screen.FAILED)


def _read_prompts(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except OSError as error:
        raise InvalidRequest(f"--prompts: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidRequest(f"--prompts: {path} is not text; needed: questions in UTF-8, one a line") from None


def _read_topology(path: Path) -> TopologyFile:
    """The cluster in the file on a local Ray, under a name and ports of its own, so that a running one is not in the way."""
    file = read_topology_file(path)
    router = replace(file.topology.router, grpc="127.0.0.1:0", http="127.0.0.1:0")
    topology = replace(file.topology, cluster=f"{file.topology.cluster}-demo", router=router, ray_address=None)
    check_topology(replace(file, topology=topology))
    return replace(file, topology=topology)


async def _until_signal(work: Coroutine[object, object, _T]) -> _T:
    """`work`, cancelled by SIGINT and SIGTERM, so that its clean-up runs then too."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _show(console: Console, topology: Topology, options: DemoOptions) -> bool:
    pools = ", ".join(f"{pool.replicas} {pool.role} worker{'s' * (pool.replicas > 1)}" for pool in topology.pools)
    name = topology.model.served_name
    console.print(f"[bold]Baton demo[/]: {pools} and a router, started by {topology.launcher}; model {name}", soft_wrap=True)
    record = ClusterRecord(topology.cluster, os.getpid(), topology.launcher, "starting", str(log_folder(topology.cluster)))
    began = time.monotonic()
    with claim(record) as held:
        async with running_cluster(topology) as cluster:
            held.write(replace(record, controller=cluster.controller))
            with console.status("starting") as line:
                status = await cluster.wait_ready(lambda now: line.update(f"starting: waiting for {escape(now.waiting_for)}"))
            held.write(replace(held.record, status="ready", grpc=status.grpc, http=status.http))
            took = time.monotonic() - began
            console.print(f"ready after {took:.0f} s: gRPC {status.grpc}, HTTP http://{status.http}", soft_wrap=True)
            async with AsyncClient(status.grpc) as client:
                baseline = await _known_blocks(client)
                for prompt in options.prompts:
                    await _answer(console, client, prompt)
                well = await _replay(console, topology, options, Faces(status.grpc, status.http, client, baseline))
            console.print("ending the cluster")
    return well


async def _answer(console: Console, client: AsyncClient, prompt: str) -> None:
    """Stream one answer to the terminal."""
    console.print(f"\n[bold cyan]> {escape(prompt)}[/]")
    question = [{"role": "user", "content": prompt}]
    async for chunk in client.stream(question, temperature=0.6, top_p=0.9, seed=1, max_tokens=ANSWER_TOKENS):
        console.print(chunk.text, end="", markup=False, soft_wrap=True)
    console.print()


async def _replay(console: Console, topology: Topology, options: DemoOptions, faces: Faces) -> bool:
    """Offer the workload, print the table and write the report; whether everything went as it should."""
    served = await ask_model(faces.grpc)
    input_length, output_length = workload_lengths(served.max_model_len)
    workload = poisson_workload(
        options.rate,
        parse_length(input_length, "input"),
        parse_length(output_length, "output"),
        duration=options.seconds,
        seed=options.seed,
    )
    shape = f"tokens in {input_length}, tokens out {output_length}"
    console.print(f"\n{len(workload)} requests in {options.seconds:g} s, {shape}", soft_wrap=True)
    target = GrpcTarget(faces.grpc, served.name, PromptSource(options.seed, served.vocab_size))
    try:
        with LiveProgress(console, len(workload)) as live:
            result = await run_load(target, workload, live.update)
    finally:
        await target.close()
    summary = summarise(result, topology.slo, served.num_workers)
    blocks, whole = await _blocks_fact(faces)
    facts: list[Fact] = [("handoffs", await _handoff_fact(faces.http)), ("blocks", blocks)]
    print_summary(console, summary, topology.slo, facts)
    settings: Settings = {
        "workload": f"Poisson, {options.rate:g} requests/s",
        "input length": input_length,
        "output length": output_length,
        "seed": options.seed,
        "launcher": topology.launcher,
    }
    write_html(options.html, result, summary, topology.slo, settings, title="Baton demo", facts=facts)
    console.print(f"report with plots: {options.html}", soft_wrap=True)
    return whole and not summary.num_failed


def workload_lengths(max_model_len: int) -> tuple[str, str]:
    """Of prompts and answers, such that the longest of both fit into the model together."""
    longest_input = max(1, min(MAX_INPUT, max_model_len * 5 // 8))
    longest_output = max(1, min(MAX_OUTPUT, max_model_len * 2 // 8))
    return (
        f"uniform:{max(1, longest_input // 8)},{longest_input}",
        f"uniform:{max(1, longest_output // 6)},{longest_output}",
    )


async def _handoff_fact(http: str) -> str:
    async with httpx.AsyncClient(trust_env=False) as client:
        try:
            response = await client.get(f"http://{http}/metrics")
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise Unavailable(f"http://{http}/metrics does not answer: {error or type(error).__name__}") from None
    return str(read_handoffs(response.text) or "none")


async def _blocks_fact(faces: Faces) -> tuple[str, bool]:
    """Whether every block and ticket came back once the cluster was idle, and the words for it."""
    began = time.monotonic()
    while True:
        load = await faces.client.load()
        missing = {
            worker.worker_id: faces.baseline[worker.worker_id] - worker.free_blocks
            for worker in load.workers
            if worker.free_blocks != faces.baseline.get(worker.worker_id, worker.free_blocks) or worker.tickets
        }
        took = time.monotonic() - began
        if not missing and not load.active_requests:
            free = ", ".join(f"{worker.worker_id} {worker.free_blocks}/{worker.total_blocks}" for worker in load.workers)
            return f"back at baseline after {took:.1f} s (free: {free})", True
        if took > BASELINE_PATIENCE:
            short = ", ".join(f"{name} lacks {count}" for name, count in missing.items()) or "requests are still active"
            return f"NOT back at baseline after {took:.1f} s: {short}", False
        await asyncio.sleep(0.1)


async def _known_blocks(client: AsyncClient) -> dict[str, int]:
    """Free blocks per worker, as soon as every worker has reported them."""
    while True:
        workers = (await client.load()).workers
        if workers and all(worker.free_blocks for worker in workers):
            return {worker.worker_id: worker.free_blocks for worker in workers}
        await asyncio.sleep(0.1)
