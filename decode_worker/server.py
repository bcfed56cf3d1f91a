"""The process of one decode or mixed worker: `python -m baton.decode_worker.server '<WorkerConfig as JSON>'`."""

from __future__ import annotations

import sys

from ..worker.process import run_worker
from .worker import DecodeWorker


def run(config_json: str) -> int:
    """Serve until told to stop. Blocks; returns the exit status."""
    return run_worker(config_json, DecodeWorker)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
