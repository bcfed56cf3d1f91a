"""Which attempts ended lately at one end of a handoff: a message that was under way meanwhile must not begin them again."""

from __future__ import annotations

from collections import OrderedDict

from ..core.request import Attempt

NUM_REMEMBERED = 4096
LEASES_REMEMBERED = 20  # no message is under way for so long: both ends give up an attempt that is not renewed after one


class Ended:
    """Remembers attempts for `LEASES_REMEMBERED` leases, and the latest `NUM_REMEMBERED` at most. `now` is set by the owner."""

    def __init__(self, lease: float) -> None:
        self.now = 0.0
        self._keep = LEASES_REMEMBERED * lease
        self._ended: OrderedDict[Attempt, float] = OrderedDict()  # when, in that order

    def __len__(self) -> int:
        return len(self._ended)

    def __contains__(self, attempt: Attempt) -> bool:
        return attempt in self._ended

    def add(self, attempt: Attempt) -> None:
        """It ends now, or again."""
        self._ended[attempt] = self.now
        self._ended.move_to_end(attempt)
        if len(self._ended) > NUM_REMEMBERED:
            self._ended.popitem(last=False)

    def forget_old(self) -> None:
        """Nothing can be under way any more for those that ended long ago."""
        while self._ended and self.now - next(iter(self._ended.values())) >= self._keep:
            self._ended.popitem(last=False)
