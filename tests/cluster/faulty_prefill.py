"""A prefill worker process whose pushes arrive damaged at every request's first attempt."""

from __future__ import annotations

import sys

from baton.kv_transfer.transport import Header
from baton.prefill_worker.worker import PrefillWorker
from baton.worker.process import run_worker


class FaultyPrefillWorker(PrefillWorker):
    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        for transport in self._transports.values():
            transport._tamper = _flip  # type: ignore[attr-defined]


def _flip(header: Header, data: memoryview) -> None:
    if header.attempt.number <= 1 and len(data):
        data[0] ^= 0xFF


if __name__ == "__main__":
    sys.exit(run_worker(sys.argv[1], FaultyPrefillWorker))
