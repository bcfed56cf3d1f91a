"""Members as plain processes of this host, each a session of its own, for machines and tests without Ray.

A member outlives a controller that dies (it ends itself after its orphan grace); the ledger on disk lets the next
controller find it again.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from ..core.errors import InternalError, Unavailable
from .launcher import Exit, MemberHandle, MemberSpec
from .process import WatchedProcess, is_alive, kill_and_confirm

_KILL_PATIENCE = 10.0  # seconds that the kernel may take to end a process; only uninterruptible I/O comes near


class SubprocessHandle:
    """One running member."""

    def __init__(self, member_id: str, process: WatchedProcess, child: subprocess.Popen[bytes] | None) -> None:
        self.member_id = member_id
        self.process = process
        self._child = child
        self._exit = asyncio.ensure_future(self._watch())

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ended(self) -> bool:
        return self._exit.done()

    async def exited(self) -> Exit:
        return await asyncio.shield(self._exit)

    def let_go(self) -> None:
        """Stop watching; the process goes on."""
        self._exit.cancel()

    async def _watch(self) -> Exit:
        try:
            await self.process.gone()
        finally:
            self.process.close()
        if self._child is None:
            return Exit("ended", confirmed=True)
        status = self._child.wait()  # returns at once: the process is gone and only waits to be reaped
        if status < 0:
            return Exit(f"ended by {signal.Signals(-status).name}", confirmed=True)
        return Exit(f"ended with exit status {status}", confirmed=True)


class SubprocessLauncher:
    """Starts `python -m MODULE CONFIG` per member. `ledger` is a file that lists what runs."""

    def __init__(self, ledger: Path) -> None:
        self._ledger = ledger
        self._handles: dict[str, SubprocessHandle] = {}

    async def start(self, spec: MemberSpec) -> SubprocessHandle:
        Path(spec.log_path).parent.mkdir(parents=True, exist_ok=True)
        with open(spec.log_path, "ab") as log:  # noqa: ASYNC230 (nothing is written to it here)
            try:
                # -P keeps the working directory off the import path: its folders may be called like real packages.
                child = subprocess.Popen(  # noqa: ASYNC220 (a vfork: it does not block)
                    [sys.executable, "-P", "-m", spec.module, spec.config_json],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                raise Unavailable(f"cannot start {spec.member_id}: {error}") from error
        try:
            process = WatchedProcess(child.pid)
        except ProcessLookupError:
            raise Unavailable(f"{spec.member_id} ended at once with exit status {child.wait()}") from None
        return self._keep(SubprocessHandle(spec.member_id, process, child))

    async def attach(self, spec: MemberSpec) -> SubprocessHandle | None:
        entry = self._read_ledger().get(spec.member_id)
        if entry is None:
            return None
        try:
            process = WatchedProcess(*entry)
        except ProcessLookupError:
            return None
        return self._keep(SubprocessHandle(spec.member_id, process, None))

    async def terminate(self, handle: MemberHandle) -> None:
        self._own(handle).process.signal(signal.SIGTERM)

    async def kill(self, handle: MemberHandle) -> bool:
        own = self._own(handle)
        own.process.signal(signal.SIGKILL)
        try:
            return (await asyncio.wait_for(own.exited(), _KILL_PATIENCE)).confirmed
        except TimeoutError:
            return False

    async def end_orphans(self) -> list[str]:
        """End what a launcher that died without a word left running; returns the ids of those members."""
        orphans = {
            name: asyncio.to_thread(kill_and_confirm, pid, started, _KILL_PATIENCE)
            for name, (pid, started) in self._read_ledger().items()
            if is_alive(pid, started)
        }
        await asyncio.gather(*orphans.values())
        self._ledger.unlink(missing_ok=True)
        return list(orphans)

    async def close(self) -> None:
        for handle in self._handles.values():
            if not handle.ended:
                handle.let_go()
        if all(handle.ended for handle in self._handles.values()):
            self._ledger.unlink(missing_ok=True)

    def _keep(self, handle: SubprocessHandle) -> SubprocessHandle:
        self._handles[handle.member_id] = handle
        alive = {name: (h.pid, h.process.started) for name, h in self._handles.items() if not h.ended}
        self._ledger.parent.mkdir(parents=True, exist_ok=True)
        draft = self._ledger.with_suffix(".draft")
        draft.write_text(json.dumps(self._read_ledger() | alive))
        os.replace(draft, self._ledger)
        return handle

    def _read_ledger(self) -> dict[str, tuple[int, int]]:
        """Member id to pid and start time. A ledger that is missing or damaged lists nothing."""
        try:
            entries = json.loads(self._ledger.read_text())
            return {str(name): (int(pid), int(started)) for name, (pid, started) in entries.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _own(self, handle: MemberHandle) -> SubprocessHandle:
        if not isinstance(handle, SubprocessHandle):
            raise InternalError(f"this launcher did not start {handle!r}")
        return handle
