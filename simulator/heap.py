"""Virtual time: what is to happen when, in order of (time, insertion). Must never look at a real clock."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from ..core.errors import InternalError


class EventHeap:
    """Calls that wait for their time. The order is the same in every run: equal times go first come, first served."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, at: float, call: Callable[..., None], *arguments: object) -> None:
        """Call `call(*arguments)` at time `at`, which may not be over. A call for `inf` is never made, and not kept."""
        if at < self.now:
            raise InternalError(f"time cannot run backwards: {call} for {at} s at {self.now} s")
        if at == math.inf:
            return
        self._num_pushed += 1
        heapq.heappush(self._heap, (at, self._num_pushed, call, arguments))

    def run(self) -> None:
        """Make all calls, those that come up meanwhile too."""
        heap, pop = self._heap, heapq.heappop
        while heap:
            self.now, _, call, arguments = pop(heap)
            self.num_events += 1
            call(*arguments)
