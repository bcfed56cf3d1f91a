"""Processes are started, found again, ended and proven dead."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from baton.core.errors import InternalError
from baton.deploy.launcher import MemberSpec, log_tail
from baton.deploy.process import WatchedProcess, is_alive, kill_and_confirm, start_ticks
from baton.deploy.subprocess_launcher import SubprocessLauncher

SLEEP = "import sys, time; print(sys.argv[1], file=sys.stderr, flush=True); time.sleep(60)"


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemberSpec:
    (tmp_path / "sleepy.py").write_text(SLEEP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return MemberSpec("decode-0", "test", "decode", "sleepy", "{}", str(tmp_path / "logs" / "decode-0.log"))


@pytest.fixture
async def launcher(tmp_path: Path):
    launcher = SubprocessLauncher(tmp_path / "ledger.json")
    yield launcher
    await launcher.close()


async def test_a_stopped_process_is_killed_and_its_death_confirmed(launcher, spec):
    handle = await launcher.start(spec)
    os.kill(handle.pid, signal.SIGSTOP)
    assert await launcher.kill(handle)
    with pytest.raises(ProcessLookupError):
        os.kill(handle.pid, 0)  # reaped, too
    end = await handle.exited()
    assert (end.reason, end.confirmed) == ("ended by SIGKILL", True)


async def test_an_exit_is_heard_of_with_its_status(launcher, spec, tmp_path):
    (tmp_path / "sleepy.py").write_text("import sys; print('no model', file=sys.stderr); sys.exit(4)")
    handle = await launcher.start(spec)
    first, second = await asyncio.gather(handle.exited(), handle.exited())
    assert first == second
    assert (first.reason, first.confirmed) == ("ended with exit status 4", True)
    assert log_tail(spec) == "no model"


async def test_terminate_asks(launcher, spec):
    handle = await launcher.start(spec)
    await launcher.terminate(handle)
    assert (await handle.exited()).reason == "ended by SIGTERM"
    await launcher.terminate(handle)  # harmless


async def test_members_are_sessions_of_their_own(launcher, spec):
    handle = await launcher.start(spec)
    assert os.getsid(handle.pid) == handle.pid  # Ctrl-C in the terminal is ours to handle
    assert await launcher.kill(handle)


async def test_another_launcher_attaches_to_what_is_left(launcher, spec, tmp_path):
    handle = await launcher.start(spec)
    later = SubprocessLauncher(tmp_path / "ledger.json")
    found = await later.attach(spec)
    assert found is not None
    assert found.pid == handle.pid
    assert await later.kill(found)
    await handle.exited()
    assert await later.attach(spec) is None
    assert await SubprocessLauncher(tmp_path / "none.json").attach(spec) is None
    await later.close()


async def test_a_reused_pid_is_not_taken_for_the_member(spec, tmp_path):
    (tmp_path / "ledger.json").write_text(f'{{"decode-0": [{os.getpid()}, 1]}}')
    launcher = SubprocessLauncher(tmp_path / "ledger.json")
    assert await launcher.attach(spec) is None
    assert await launcher.end_orphans() == []
    assert kill_and_confirm(os.getpid(), 1, 1.0)  # that process is gone, and we are not it


async def test_orphans_are_ended(launcher, spec, tmp_path):
    handle = await launcher.start(spec)
    started = start_ticks(handle.pid)
    assert await SubprocessLauncher(tmp_path / "ledger.json").end_orphans() == ["decode-0"]
    await handle.exited()
    assert not is_alive(handle.pid, started)
    assert not (tmp_path / "ledger.json").exists()


async def test_a_foreign_handle_is_a_bug(launcher):
    with pytest.raises(InternalError, match="did not start"):
        await launcher.kill(object())  # type: ignore[arg-type]


async def test_a_watch_needs_a_living_process():
    with pytest.raises(ProcessLookupError):
        WatchedProcess(2**22 - 1)
    with pytest.raises(ProcessLookupError, match="another one"):
        WatchedProcess(os.getpid(), started=1)
