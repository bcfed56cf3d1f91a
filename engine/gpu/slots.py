"""Which place in the device's memory belongs to an attempt: the one where the token that it sampled last is kept.

Pure bookkeeping. A place may go to another attempt as soon as its owner is forgotten: whatever still runs on the device was
launched before whatever uses it next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from ...core.request import Attempt


class Slots:
    """`num_slots` places. When none is free, the attempt that was used longest ago loses its own."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._owned: OrderedDict[Attempt, int] = OrderedDict()  # used longest ago first

    def of(self, attempt: Attempt) -> int | None:
        """The attempt's place, None when it has none."""
        return self._owned.get(attempt)

    def take(self, attempts: Sequence[Attempt]) -> list[int]:
        """The place of each, a new one for those that have none. No more attempts at once than there are places."""
        for attempt in attempts:
            if attempt in self._owned:
                self._owned.move_to_end(attempt)
        for attempt in attempts:
            if attempt not in self._owned:
                self._owned[attempt] = self._free.pop() if self._free else self._owned.popitem(last=False)[1]
        return [self._owned[attempt] for attempt in attempts]

    def forget(self, attempt: Attempt) -> None:
        """Give the attempt's place back, if it has one."""
        slot = self._owned.pop(attempt, None)
        if slot is not None:
            self._free.append(slot)
