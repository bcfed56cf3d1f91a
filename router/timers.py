"""The lifecycle's timers on the event loop: at most one per `Timer`, and none outlives its request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..core.clock import Clock
from .events import Timer, TimerFired


class Timers:
    """Posts `TimerFired` when a timer's time has come. Create it inside a running event loop."""

    def __init__(self, clock: Clock, post: Callable[[TimerFired], None]) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._post = post
        self._handles: dict[Timer, asyncio.TimerHandle] = {}
        self._by_request: dict[str, set[Timer]] = {}

    def __len__(self) -> int:
        return len(self._handles)

    def set(self, timer: Timer, at: float) -> None:
        """Fire at time `at` of the clock; an equal timer is replaced."""
        old = self._handles.pop(timer, None)
        if old is not None:
            old.cancel()
        delay = max(0.0, at - self._clock.now())
        self._handles[timer] = self._loop.call_later(delay, self._fire, timer, at)
        self._by_request.setdefault(timer.request_id, set()).add(timer)

    def drop_request(self, request_id: str) -> None:
        """The request is over."""
        for timer in self._by_request.pop(request_id, ()):
            handle = self._handles.pop(timer, None)
            if handle is not None:
                handle.cancel()

    def close(self) -> None:
        for handle in self._handles.values():
            handle.cancel()
        self._handles.clear()
        self._by_request.clear()

    def _fire(self, timer: Timer, at: float) -> None:
        self._handles.pop(timer, None)
        timers = self._by_request.get(timer.request_id)
        if timers is not None:
            timers.discard(timer)
            if not timers:
                del self._by_request[timer.request_id]
        # The loop's clock is coarser than ours and may wake a little early: a timer never fires before its time.
        self._post(TimerFired(max(self._clock.now(), at), timer))
