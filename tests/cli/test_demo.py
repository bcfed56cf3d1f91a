"""`baton demo` around a scripted cluster: what it shows, writes, and returns. The real one runs in `make demo`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import pytest
import typer
from baton.cli.demo import demo, workload_lengths
from baton.core.topology import Topology
from baton.deploy.cluster import ClusterStatus
from baton.observability.metrics import Metrics
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as rpc
from typer.testing import CliRunner, Result

MODEL = Path(__file__).parents[2] / "examples" / "model" / "pydoc-llama"
TOPOLOGY = """
cluster: small
model: {path: MODEL, name: tiny}
slo: {ttft: 30, tpot: 30, attainment: 0.5}
pools: {prefill: {}, decode: {}}
"""


@dataclass
class FakeCluster(rpc.InferenceServicer):
    """Answers every request with its planned number of tokens; loses `leak` blocks with the first one."""

    leak: int = 0
    shed: bool = False
    controller: str = "127.0.0.1:1"
    grpc: str = ""
    http: str = ""
    topology: Topology | None = None
    ended: bool = False
    free: int = 100
    prompts: list[str] = field(default_factory=list)

    async def wait_ready(self, on_change: Callable[[ClusterStatus], None]) -> ClusterStatus:
        on_change(ClusterStatus((), waiting_for="prefill-0"))
        return ClusterStatus((), self.grpc, self.http)

    async def Generate(  # noqa: N802 (the name in the protocol)
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.free = 100 - self.leak
        if request.HasField("chat"):
            self.prompts.append(request.chat.messages[0].content)
            yield pb.GenerateResponse(token_ids=[1, 2], text="forty [bold]two")
            yield pb.GenerateResponse(finish_reason="stop")
            return
        if self.shed:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        assert max(request.tokens.ids) < 300
        for _ in range(request.sampling.max_tokens):
            yield pb.GenerateResponse(token_ids=[5])
        yield pb.GenerateResponse(finish_reason="length", usage=pb.Usage(prompt_tokens=len(request.tokens.ids)))

    async def GetModel(self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext) -> pb.GetModelResponse:  # noqa: N802
        return pb.GetModelResponse(name="tiny", max_model_len=1024, vocab_size=300)

    async def GetLoad(self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext) -> pb.GetLoadResponse:  # noqa: N802
        worker = pb.WorkerInfo(worker_id="decode-0", role="decode", free_blocks=self.free, total_blocks=100)
        return pb.GetLoadResponse(workers=[worker])


async def serve_metrics(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    metrics = Metrics()
    metrics.handoff("shm", 2_000_000, 0.0002, 0.0015)
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + metrics.render())
    await writer.drain()
    writer.close()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeCluster:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    fake = FakeCluster()

    @contextlib.asynccontextmanager
    async def running(topology: Topology) -> AsyncIterator[FakeCluster]:
        fake.topology = topology
        server = grpc.aio.server()
        rpc.add_InferenceServicer_to_server(fake, server)
        fake.grpc = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        metrics = await asyncio.start_server(serve_metrics, "127.0.0.1", 0)
        fake.http = f"127.0.0.1:{metrics.sockets[0].getsockname()[1]}"
        try:
            yield fake
        finally:
            metrics.close()
            await server.stop(0)
            fake.ended = True

    monkeypatch.setattr("baton.cli.demo.running_cluster", running)
    monkeypatch.setattr("baton.cli.demo.BASELINE_PATIENCE", 0.3)
    return fake


@pytest.fixture
def ran(tmp_path: Path) -> Callable[[], Result]:
    app = typer.Typer()
    app.command()(demo)
    topology, prompts = tmp_path / "t.yaml", tmp_path / "prompts.txt"
    topology.write_text(TOPOLOGY.replace("MODEL", str(MODEL)))
    prompts.write_text("What is\n\nthe answer?\n")

    def run() -> Result:
        options = ("--prompts", str(prompts), "--seconds", "0.5", "--rate", "40", "--html", str(tmp_path / "out" / "demo.html"))
        return CliRunner().invoke(app, [str(topology), *options], env={"COLUMNS": "160", "TERM": "dumb"})

    return run


def test_the_whole_show(cluster: FakeCluster, ran: Callable[[], Result], tmp_path: Path) -> None:
    result = ran()
    assert result.exit_code == 0, result.output
    assert cluster.prompts == ["What is", "the answer?"]
    shown = (
        "1 prefill worker, 1 decode worker",
        "> the answer?",
        "forty [bold]two",
        "TTFT",
        "TPOT",
        "p99",
        "attainment",
        "goodput",
    )
    counted = (
        "1 over shm",
        "2.00 MB each, pushed and acknowledged in 0.2 ms (10.00 GB/s)",
        "back at baseline",
        "decode-0 100/100",
        "0 failed",
    )
    for part in shown + counted:
        assert part in result.output, part
    assert "back at baseline" in (tmp_path / "out" / "demo.html").read_text()
    assert cluster.ended
    assert list((tmp_path / "state").rglob("*.json")) == [], "no record of the cluster is left"


def test_it_stays_out_of_the_way_of_a_running_cluster(cluster: FakeCluster, ran: Callable[[], Result]) -> None:
    ran()
    assert cluster.topology is not None
    assert cluster.topology.cluster == "small-demo"
    assert cluster.topology.router.grpc == cluster.topology.router.http == "127.0.0.1:0"


def test_a_lost_block_is_a_failure(cluster: FakeCluster, ran: Callable[[], Result]) -> None:
    cluster.leak = 3
    result = ran()
    assert result.exit_code == 1
    assert "NOT back at baseline" in result.output
    assert "decode-0 lacks 3" in result.output
    assert cluster.ended


def test_failed_requests_are_a_failure(cluster: FakeCluster, ran: Callable[[], Result]) -> None:
    cluster.shed = True
    result = ran()
    assert result.exit_code == 1
    assert "grpc RESOURCE_EXHAUSTED" in result.output


def test_a_topology_that_cannot_be_read(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(demo)
    result = CliRunner().invoke(app, [str(tmp_path / "none.yaml")])
    assert result.exit_code == 2
    assert "none.yaml" in result.output


@pytest.mark.parametrize("max_model_len", [8, 100, 512, 704, 1024, 131072])
def test_the_workload_fits_the_model(max_model_len: int) -> None:
    lengths = [length.removeprefix("uniform:").split(",") for length in workload_lengths(max_model_len)]
    assert all(1 <= int(low) <= int(high) for low, high in lengths)
    assert sum(int(high) for _, high in lengths) <= max_model_len
    if max_model_len >= 1024:
        assert workload_lengths(max_model_len) == ("uniform:64,512", "uniform:32,192")
