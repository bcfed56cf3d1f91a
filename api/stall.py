"""Ends a stream whose client reads nothing, with one timer for all its writes.

`asyncio.timeout` around every write would cost as much as everything else that this side does for it.
"""

from __future__ import annotations

import asyncio
from types import TracebackType


class StallGuard:
    """Around everything that one task writes: `async with StallGuard(limit) as guard`, and `begin`, `end` around each write.

    A write that takes more than `limit` seconds (up to twice as many) is cancelled, and the block raises TimeoutError.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._writing_for = -1  # looks at the clock since the write began; negative while nothing is written
        self._stalled = False
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None

    async def __aenter__(self) -> StallGuard:
        self._task = asyncio.current_task()
        self._arm()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._stalled and self._task is not None and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise TimeoutError(f"nothing was read for {self._limit:g} s") from error

    def begin(self) -> None:
        """A write begins."""
        self._writing_for = 0

    def end(self) -> None:
        """The write has ended."""
        self._writing_for = -1

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._limit, self._look)

    def _look(self) -> None:
        if self._writing_for > 0 and self._task is not None:
            self._stalled = True
            self._task.cancel()
            return
        if self._writing_for == 0:
            self._writing_for = 1
        self._arm()
