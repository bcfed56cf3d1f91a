"""The latest requests of a router: when they came, how long they were, how they fared. No prompt, no token, no client."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..core.observed import ObservedRequest
from ..observability.records import RequestRecord

MAX_RECENT = 8192


class RecentRequests:
    """Filled as requests end, whatever their end: what was refused was wanted too."""

    def __init__(self) -> None:
        self._kept: deque[ObservedRequest] = deque(maxlen=MAX_RECENT)

    def add(self, arrival: float, record: RequestRecord) -> None:
        """A request that came at `arrival` (this process's clock) is over: one entry per sequence."""
        for sequence in record.sequences:
            stages = sequence.stages
            self._kept.append(
                ObservedRequest(
                    arrival,
                    record.prompt_tokens,
                    sequence.output_tokens,
                    sequence.cached_tokens,
                    record.outcome == "ok",
                    stages.ttft,
                    stages.tpot,
                )
            )

    def requests(self) -> Sequence[ObservedRequest]:
        """In the order of their ends."""
        return tuple(self._kept)
