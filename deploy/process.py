"""One process of this host, watched through a pidfd: no polling, no mistaking a reused pid for the process.

Works for children and strangers alike, so that a controller that starts again can watch what its predecessor left.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
from pathlib import Path


def start_ticks(pid: int) -> int:
    """When `pid` started, in clock ticks since boot: with the pid, the name of one process of this host.

    Raises ProcessLookupError when there is no such process, or when it has ended and only waits to be reaped.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    fields = stat[stat.rindex(")") + 2 :].split()  # the command name may hold anything, so start after it
    if fields[0] in "ZX":
        raise ProcessLookupError(f"process {pid} has ended")
    return int(fields[19])


def is_alive(pid: int, started: int) -> bool:
    """Whether the process that started at `started` (see `start_ticks`) still runs."""
    try:
        return start_ticks(pid) == started
    except ProcessLookupError:
        return False


class WatchedProcess:
    """A process that was alive when the watch began.

    Raises ProcessLookupError when `pid` does not exist, or is not the process that started at `started`.
    """

    def __init__(self, pid: int, started: int | None = None) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)
        try:
            self.started = start_ticks(pid)
            if started is not None and started != self.started:
                raise ProcessLookupError(f"process {pid} is another one now")
        except ProcessLookupError:
            self.close()
            raise

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens when the process is gone."""
        if self._fd < 0:
            return
        try:
            signal.pidfd_send_signal(self._fd, number)
        except ProcessLookupError:
            return

    def wait(self, timeout: float) -> bool:
        """Block until the process is gone (dead, perhaps not yet reaped); False after `timeout` seconds."""
        if self._fd < 0:
            return True
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    async def gone(self) -> None:
        """Wait until the process is gone. To be awaited by one task, which closes the watch afterwards."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def _ended() -> None:
            loop.remove_reader(self._fd)
            if not ended.done():
                ended.set_result(None)

        loop.add_reader(self._fd, _ended)
        try:
            await ended
        finally:
            if self._fd >= 0:
                loop.remove_reader(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def kill_and_confirm(pid: int, started: int | None, timeout: float) -> bool:
    """SIGKILL the process and block until it is gone. True as well when it was gone before."""
    try:
        process = WatchedProcess(pid, started)
    except ProcessLookupError:
        return True
    try:
        process.signal(signal.SIGKILL)
        return process.wait(timeout)
    finally:
        process.close()
