"""The examples are what they say: topologies that can be read, prompts, a client that runs."""

from __future__ import annotations

import asyncio
import re
import runpy
import sys
from pathlib import Path

import pytest
from baton.core.view import Role
from baton.deploy.settings import load_topology, parse_topology
from baton.tests.router.router_process import running_router

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(("file", "roles"), [("local.yaml", {Role.PREFILL, Role.DECODE}), ("mixed.yaml", {Role.MIXED})])
def test_topologies_serve_the_model_that_ships(file: str, roles: set[Role]) -> None:
    topology = load_topology(EXAMPLES / file)
    assert topology.cluster == Path(file).stem  # `baton status local`, as the README has it
    assert {pool.role for pool in topology.pools} == roles
    assert Path(topology.model.path) == EXAMPLES / "model" / "pydoc-llama"
    assert topology.model.served_name == "pydoc-llama"


def test_both_topologies_can_run_side_by_side() -> None:
    routers = [load_topology(EXAMPLES / file).router for file in ("local.yaml", "mixed.yaml")]
    assert len({address for router in routers for address in (router.grpc, router.http)}) == 4


def test_the_topology_of_the_readme_can_be_read() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        parse_topology(block, "README.md", ROOT)


async def test_the_grpc_client_prints_an_answer_its_times_and_the_workers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_router(text="It joins strings.") as router:
        monkeypatch.setattr(sys, "argv", ["grpc_client.py", router.grpc])
        await asyncio.to_thread(runpy.run_path, str(EXAMPLES / "grpc_client.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "It joins strings." in printed
    assert "handed over in" in printed
    assert all(f"{worker_id}:" in printed for worker_id in router.cluster.workers)
