"""`baton plan --from-live` against a real cluster: what it saw is what was sent, and the answer can be deployed."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from baton.core.topology import PoolSpec, Topology
from baton.core.view import Role
from baton.deploy.observe import observe
from baton.deploy.settings import load_topology
from baton.deploy.state import ClusterRecord, claim
from baton.placement.observed import workload_of
from baton.tests.cluster.live_cluster import LiveCluster, live, topology

pytestmark = [pytest.mark.cluster]

NUM_REQUESTS, GAP, PROMPT, OUTPUT = 130, 0.06, 40, 12


def slow(name: str) -> Topology:
    """Steps of 10 ms and more: the machine's own noise is small beside them."""
    pool = PoolSpec(Role.PREFILL, kv_memory_bytes=24 << 20, block_size=16, max_num_seqs=32, step_delay=0.01)
    asked = topology(name, pools=(pool, replace(pool, role=Role.DECODE)))
    return replace(asked, model=replace(asked.model, max_model_len=512))


async def offer(cluster: LiveCluster) -> None:
    async def one(index: int) -> None:
        await asyncio.sleep(index * GAP)
        prompt = [5 + (index * 31 + i * 7 + i * i) % 3000 for i in range(PROMPT)]
        await cluster.client.generate(prompt, max_tokens=OUTPUT, ignore_eos=True, temperature=0.0)

    await asyncio.gather(*map(one, range(NUM_REQUESTS)))


async def plan(*arguments: str) -> tuple[int, str]:
    """The verb in a process of its own: exit code and all it printed, with single spaces."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "baton.cli.main", "plan", "--quick", "--workers", "1", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "160"},
    )
    output, _ = await process.communicate()
    return process.returncode or 0, " ".join(output.decode().split())


async def test_a_running_cluster_is_planned_again(tmp_path: Path) -> None:
    asked = slow("replanned")
    async with live(asked, tmp_path / "logs") as cluster:
        controller = cluster.running.controller
        record = ClusterRecord(asked.cluster, os.getpid(), "subprocess", "ready", "", controller, cluster.grpc, cluster.http)
        with claim(record):
            code, output = await plan("--from-live", asked.cluster)
            assert (code, "ended 0 requests well; at least 100 are needed" in output) == (1, True), output
            await offer(cluster)
            seen = await observe(controller)
            assert seen.topology == asked
            workload = workload_of(seen.requests, asked.slo)
            assert workload.num_requests == NUM_REQUESTS
            assert set(workload.demand.mix) == {(PROMPT, OUTPUT)}
            assert workload.rate == pytest.approx(1 / GAP, rel=0.25)
            by_role = {worker.role: worker.steps for worker in seen.workers}
            assert all(step.shape.decode_rows == 0 for step in by_role[Role.PREFILL])
            assert all(step.shape.prefill_rows == 0 for step in by_role[Role.DECODE])
            assert all(0.01 <= step.seconds <= step.period for steps in by_role.values() for step in steps)

            code, output = await plan("--from-live", asked.cluster, "--min-gain", "50", "--out", str(tmp_path / "kept"))
            assert code == 0, output
            assert f"served {NUM_REQUESTS} requests" in output
            assert "keep what runs" in output
            assert not (tmp_path / "kept").exists()

            code, output = await plan("--from-live", asked.cluster, "--min-gain", "0", "--out", str(tmp_path / "new"))
            assert code == (3 if "change to" in output else 0), output
            if code:
                deployed = load_topology(tmp_path / "new" / "topology.yaml")
                assert replace(deployed, pools=()) == replace(asked, pools=())
                found = re.search(r"change to (.*?): expected goodput ([\d.]+) -> ([\d.]+)", output)
                assert found is not None
                assert float(found[3]) > float(found[2]) > 0
            else:
                assert "keep what runs" in output
