"""Time as a dependency: the service reads a wall clock, the simulator a virtual one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol


class Clock(Protocol):
    """Seconds since an arbitrary origin, never running backwards."""

    def now(self) -> float: ...


class MonotonicClock:
    """The operating system's monotonic clock. Comparable between processes of one host, not across hosts."""

    def now(self) -> float:
        return time.monotonic()


@dataclass(slots=True)
class VirtualClock:
    """A clock that moves only when it is told to."""

    seconds: float = 0.0

    def now(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds` (>= 0)."""
        if seconds < 0:
            raise ValueError(f"time cannot run backwards: advance by {seconds} s")
        self.seconds += seconds
