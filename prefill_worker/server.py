"""The process of one prefill worker: `python -m baton.prefill_worker.server '<WorkerConfig as JSON>'`."""

from __future__ import annotations

import sys

from ..worker.process import run_worker
from .worker import PrefillWorker


def run(config_json: str) -> int:
    """Serve until told to stop. Blocks; returns the exit status."""
    return run_worker(config_json, PrefillWorker)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
