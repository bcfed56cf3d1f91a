"""The router process under load: its threads yield to each other less often, and again when the load is over."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
from baton.deploy import load_mode

PROGRAM = """
import asyncio, os, threading, time
from baton.deploy import load_mode

load_mode.INTERVAL = 0.02

def policies():
    return {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}

async def until(policy, work):
    while policies() != {policy}:
        work()
        await asyncio.sleep(0)

async def main():
    stop = threading.Event()
    threading.Thread(target=stop.wait).start()
    following = asyncio.create_task(load_mode.follow_load())
    busy_until = lambda: sum(range(10_000))
    async with asyncio.timeout(20):
        await until(os.SCHED_BATCH, busy_until)
        print("busy", flush=True)
        while policies() != {os.SCHED_OTHER}:
            await asyncio.sleep(0.02)
        print("relaxed", flush=True)
    following.cancel()
    stop.set()

asyncio.run(main())
"""

linux = pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="Linux only")


@linux
async def test_threads_follow_the_load() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert out.split() == [b"busy", b"relaxed"]
    assert process.returncode == 0


@linux
async def test_where_it_is_forbidden_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    monkeypatch.setattr(load_mode, "INTERVAL", 0.0)
    monkeypatch.setattr(load_mode, "BUSY", -1.0)
    async with asyncio.timeout(20):
        await load_mode.follow_load()


@linux
async def test_policy_of_the_operator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: os.SCHED_BATCH)
    monkeypatch.setattr(Path, "iterdir", lambda _: pytest.fail("it looked at the threads"))
    async with asyncio.timeout(20):
        await load_mode.follow_load()
