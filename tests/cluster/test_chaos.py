"""Random kills, freezes and aborts under a steady load: nobody who stays notices anything but a pause.

`BATON_CHAOS=SECONDS` and `BATON_CHAOS_SEED=NUMBER` make it last longer or differ; the default is short.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from baton.core.topology import PoolSpec
from baton.core.view import Role
from baton.deploy.router_process import make_lifecycle
from baton.router.tape import read_tape
from baton.tests.cluster.live_cluster import LiveCluster, live, topology
from baton.tests.cluster.solo import Solo

pytestmark = [pytest.mark.cluster]

SECONDS = float(os.environ.get("BATON_CHAOS", "12"))
SEED = int(os.environ.get("BATON_CHAOS_SEED", "1"))
NUM_CLIENTS = 10
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


class Load:
    """Clients that ask one request after the other. `gaps`: the pauses between the chunks they saw."""

    def __init__(self, cluster: LiveCluster, solo: Solo, until: float) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.gaps: list[float] = []
        self._cluster = cluster
        self._solo = solo
        self._until = until

    async def client(self, number: int) -> None:
        draw = random.Random(SEED * 1000 + number)
        while time.monotonic() < self._until:
            index, length, max_tokens = draw.randrange(40), draw.choice([5, 30, 90, 200]), draw.randint(5, 60)
            prompt = [5 + (index * 31 + i * 7 + i * i) % 3000 for i in range(length)]
            sampling = {"temperature": 0.9, "top_p": 0.95, "seed": index} if index % 2 else {"temperature": 0.0}
            leave_after = draw.randrange(max_tokens) if draw.random() < 0.2 else None
            await self._request(prompt, max_tokens, sampling, leave_after)

    async def _request(self, prompt: list[int], max_tokens: int, sampling: dict[str, float], leave_after: int | None) -> None:
        tokens: list[int] = []
        last = time.monotonic()
        stream = self._cluster.client.stream(prompt, max_tokens=max_tokens, ignore_eos=True, **sampling)
        try:
            async for chunk in stream:
                now = time.monotonic()
                self.gaps.append(round(now - last, 2))
                last = now
                tokens += chunk.token_ids
                if leave_after is not None and len(tokens) >= leave_after:
                    self.outcomes["aborted"] += 1
                    break
                if chunk.stages is not None:
                    self.outcomes[f"{chunk.stages.attempts} attempts"] += 1
        except Exception as error:  # whatever it is, it is wrong
            self.wrong.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.2)
        finally:
            await stream.aclose()
        expected = self._solo.tokens(prompt, max_tokens, **sampling)
        if tuple(tokens) != expected[: len(tokens)] or (leave_after is None and len(tokens) != max_tokens):
            self.wrong.append(f"{len(tokens)} of {max_tokens} tokens, or other ones than an undisturbed run's")


async def strike_at_random(cluster: LiveCluster, until: float) -> Counter[str]:
    """Kill and freeze workers, one at a time or one of each pool at once."""
    draw = random.Random(SEED)
    blows: Counter[str] = Counter()
    wakes = []
    while time.monotonic() < until:
        await asyncio.sleep(draw.uniform(0.5, 3.0))
        for member in draw.choice([WORKERS[:1], WORKERS[1:2], WORKERS[2:3], WORKERS[3:], WORKERS[::2], WORKERS[1::2]]):
            with contextlib.suppress(AssertionError, ProcessLookupError):
                how = draw.choice(["kill", "freeze", "short freeze"])
                pid = await cluster.strike(member, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
                blows[f"{how} {member}"] += 1
                if how != "kill":
                    after = draw.uniform(2.5, 6.0) if how == "freeze" else draw.uniform(0.1, 1.5)
                    wakes.append(asyncio.create_task(wake(pid, after)))
    await asyncio.gather(*wakes)
    return blows


async def wake(pid: int, after: float) -> None:
    await asyncio.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def num_pools_mapped(pid: int) -> int:
    """Pools that the process maps: its own, and those of the decode workers it is connected to."""
    return sum("memfd:" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())


async def test_chaos(tmp_path: Path) -> None:
    small = {"kv_memory_bytes": 4 << 20, "block_size": 16, "max_num_seqs": 32, "replicas": 2}
    pools = (
        PoolSpec(Role.PREFILL, max_step_tokens=64, step_delay=0.005, **small),  # type: ignore[arg-type]
        PoolSpec(Role.DECODE, step_delay=0.01, **small),  # type: ignore[arg-type]
    )
    asked = topology("chaos", pools=pools, tape=str(tmp_path / "tape"))
    asked = replace(asked, model=replace(asked.model, max_model_len=512))
    solo = Solo()
    async with live(asked, tmp_path) as cluster:
        until = time.monotonic() + SECONDS
        load = Load(cluster, solo, until)
        clients = asyncio.gather(*(load.client(number) for number in range(NUM_CLIENTS)))
        blows = await strike_at_random(cluster, until)
        await asyncio.wait_for(clients, 60)
        print(dict(blows), dict(load.outcomes), "longest pauses:", sorted(load.gaps, reverse=True)[:9])
        assert not load.wrong
        await cluster.ready()
        await cluster.baseline(members=4)
        members = {m.registration.worker.worker_id: psutil.Process(m.registration.pid) for m in (await cluster.status()).members}
        assert not [
            child for process in members.values() for child in process.children() if child.status() == psutil.STATUS_ZOMBIE
        ]
        maps = {name: num_pools_mapped(process.pid) for name, process in members.items()}
        assert all(count <= (3 if name.startswith("prefill") else 1) for name, count in maps.items()), maps
    zombies = [c for c in psutil.Process().children(recursive=True) if c.status() == psutil.STATUS_ZOMBIE]
    assert not zombies
    lifecycle = make_lifecycle(asked)
    for event, actions in read_tape(tmp_path / "tape"):
        assert lifecycle.handle(event) == actions
    lifecycle.check()
    assert lifecycle.num_active == 0
    solo.close()
