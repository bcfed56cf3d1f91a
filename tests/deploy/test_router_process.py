"""The router's process: configuration errors, ports, shutdown, orphans."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from dataclasses import replace

import httpx
import pytest
from baton.core.errors import TopologyError, Unavailable
from baton.core.topology import RouterConfig, RouterSpec
from baton.core.view import Role
from baton.deploy.router_process import run, serve_router
from baton.tests.router.fake_cluster import running_cluster
from baton.tests.router.router_process import router_config
from pydantic import TypeAdapter


def as_json(config: RouterConfig) -> str:
    return TypeAdapter(RouterConfig).dump_json(config).decode()


async def test_taken_ports_and_unknown_policies_are_named() -> None:
    async with running_cluster(Role.MIXED) as cluster:
        config = router_config(cluster)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            for fields, words in (
                ({"http": address}, "router.http"),
                ({"grpc": address}, "router.grpc"),
                ({"http": "nonsense"}, "not host:port"),
                ({"routing": "psychic"}, "least_loaded"),
                ({"admission": "psychic"}, "queue_length"),
            ):
                spec: RouterSpec = replace(config.topology.router, **fields)
                broken = replace(config, topology=replace(config.topology, router=spec))
                with pytest.raises(TopologyError, match=words):
                    await serve_router(broken)


def test_run_reports_problems_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("{}") == 1
    lines = capfd.readouterr().err.splitlines()
    assert json.loads(lines[-1])["level"] == "error"


async def test_orphan_ends_itself() -> None:
    async with running_cluster() as cluster:
        config = replace(router_config(cluster), orphan_grace=0.2)
        await cluster.controller.stop()
        with pytest.raises(Unavailable, match="no controller"):
            await serve_router(config)


async def test_process_serves_and_ends_cleanly_on_sigterm() -> None:
    """A real process: it registers, answers, drains and leaves with status 0."""
    async with running_cluster(Role.MIXED) as cluster:
        config = router_config(cluster)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "baton.deploy.router_process", as_json(config)),
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"GRPC_VERBOSITY": "ERROR"},
        )
        try:
            await cluster.controller.registration.wait()
            registration = cluster.controller.registered[0]
            assert registration.role == "router"
            async with httpx.AsyncClient(base_url=f"http://{registration.http_address}", timeout=30) as http:
                answer = await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 3})
                assert answer.status_code == 200
                cluster.workers["m0"].open.clear()
                cut_off = asyncio.create_task(http.post("/v1/completions", json={"prompt": "a"}))
                await cluster.workers["m0"].until_received("submit", 3)
                process.send_signal(signal.SIGTERM)
                assert (await cut_off).status_code == 503
                assert process.stderr is not None
                lines = [json.loads(line) for line in (await process.stderr.read()).splitlines()]
            assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        requests = [line for line in lines if line["logger"] == "baton.request"]
        assert [line["outcome"] for line in requests] == ["ok", "unavailable"]
        assert requests[0]["output_tokens"] == 3
        assert requests[0]["ttft"] > 0
