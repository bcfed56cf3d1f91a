"""How the router's process spends its core: for latency while there is time, for throughput when there is none.

gRPC hands every finished read and write to the event loop through threads of its own. When they and the loop share
a core, each hand-over interrupts the loop: good for the message that has come, but two context switches for each.
While the process needs most of a core, these threads become batch threads: they no longer interrupt it, and
hand over all that has piled up when it pauses. Linux only; elsewhere, and where it is forbidden, nothing changes.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from pathlib import Path

INTERVAL = 0.1  # seconds between looks at the load
BUSY, RELAXED = 0.75, 0.5  # share of a core that the process uses: above the first it is busy, below the second it is not
GC_THRESHOLDS = (20_000, 10, 20)  # objects come and go with requests, almost none of them in cycles

logger = logging.getLogger("baton.router.load_mode")


def settle_memory() -> None:
    """Take what the process has built at its start out of the garbage collector's sight, and let it look less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


async def follow_load() -> None:
    """Switch between the two modes for as long as that is possible. Runs on the main thread's event loop."""
    if not hasattr(os, "sched_setscheduler") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return  # another system, or somebody has chosen a policy for this process
    busy, used, since = False, time.process_time(), time.monotonic()
    while True:
        await asyncio.sleep(INTERVAL)
        now, now_used = time.monotonic(), time.process_time()
        share = (now_used - used) / (now - since)
        used, since = now_used, now
        was_busy, busy = busy, share > (RELAXED if busy else BUSY)
        # While it lasts, threads that came later are included.
        if (busy or was_busy) and not _set_policy(os.SCHED_BATCH if busy else os.SCHED_OTHER):
            return


def _set_policy(policy: int) -> bool:
    """Of every thread. False when it is not allowed."""
    for entry in Path("/proc/self/task").iterdir():
        thread = int(entry.name)
        try:
            if os.sched_getscheduler(thread) != policy:
                os.sched_setscheduler(thread, policy, os.sched_param(0))
        except ProcessLookupError:
            continue
        except OSError as error:
            logger.info("threads keep their scheduling policy: %s", error)
            return False
    return True
