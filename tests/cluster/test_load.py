"""A cluster under load: thousands of aborts, an idle cluster's appetite, and the tape of a live run."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from baton.core.errors import BatonError
from baton.core.topology import Topology
from baton.deploy.router_process import make_lifecycle
from baton.router.tape import read_tape, replay
from baton.tests.cluster.live_cluster import PROMPT, LiveCluster, live, topology

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

NUM_ABORTS = 2000


@pytest.fixture(scope="module")
def taped(tmp_path_factory: pytest.TempPathFactory) -> Topology:
    asked = topology("load", tape=str(tmp_path_factory.mktemp("tape") / "router.tape"))
    return replace(asked, pools=tuple(replace(pool, step_delay=0.0) for pool in asked.pools))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(taped: Topology, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveCluster]:
    async with live(taped, tmp_path_factory.mktemp("logs")) as cluster:
        yield cluster


async def test_idle_processes_use_under_five_percent_of_a_core(cluster: LiveCluster) -> None:
    await cluster.client.generate(PROMPT, max_tokens=8)
    await cluster.baseline()
    members = [psutil.Process(member.registration.pid) for member in (await cluster.status()).members]
    members.append(psutil.Process())  # the controller runs in this process
    before = sum(sum(member.cpu_times()[:2]) for member in members)
    await asyncio.sleep(10.0)
    used = sum(sum(member.cpu_times()[:2]) for member in members) - before
    assert used / 10.0 < 0.05


async def test_two_thousand_aborts_leave_nothing_behind(cluster: LiveCluster) -> None:
    draw = random.Random(7)
    places = asyncio.Semaphore(48)

    async def one(index: int, patience: float, num_prompt: int) -> bool:
        prompt = [5 + (index * 31 + i * 7) % 3000 for i in range(num_prompt)]
        async with places:
            stream = cluster.client.stream(prompt, max_tokens=300, ignore_eos=True)
            try:
                async with asyncio.timeout(patience):
                    async for _ in stream:
                        pass
            except (TimeoutError, BatonError):
                return True
            finally:
                await stream.aclose()
        return False

    plans = [(i, draw.choice([0.0, 0.003, 0.01, 0.05, 0.2]) * draw.random() * 2, draw.randint(1, 200)) for i in range(NUM_ABORTS)]
    ended = await asyncio.gather(*(one(*plan) for plan in plans))
    assert sum(ended) > 0.95 * NUM_ABORTS
    await cluster.baseline(seconds=5.0)
    (completion,) = await cluster.client.generate(PROMPT, max_tokens=5, ignore_eos=True)
    assert completion.usage.completion_tokens == 5


async def test_the_tape_of_a_live_run_replays_to_the_same_actions(
    taped: Topology, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    tape = tmp_path / "router.tape"
    asked = replace(taped, cluster="taped", router=replace(taped.router, tape=str(tape)))
    async with live(asked, tmp_path_factory.mktemp("logs")) as cluster:
        running = asyncio.gather(
            *(cluster.client.generate(f"{i} {PROMPT}", max_tokens=250, ignore_eos=True, seed=i) for i in range(16))
        )
        await cluster.until_load(lambda load: load["decode-0"].running > 2, 10.0)
        await cluster.strike("decode-0")
        await running
        await cluster.ready()
    entries = list(read_tape(tape))
    assert sum(bool(actions) for _, actions in entries) > 50
    assert {"Arrived", "Granted", "Adopted", "Finished", "WorkerLost"} <= {type(event).__name__ for event, _ in entries}
    mismatch = replay(entries, make_lifecycle(asked))
    assert mismatch is None
