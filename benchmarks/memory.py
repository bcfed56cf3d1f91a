"""What a process's memory holds, from /proc/PID/smaps (proc(5)). Pure: text in, bytes out."""

from __future__ import annotations

import re
from dataclasses import dataclass

KV_POOL = "memfd:baton-kv-pool"  # a worker's own, and those of peers that it pushes to
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)$")
_SIZE = re.compile(r"^(Pss|Rss): +(\d+) kB$")


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes. `pss` splits shared pages over the processes that map them; both leave out KV pools, whose `rss` is `kv`."""

    pss: int
    rss: int
    kv: int


def parse_smaps(text: str) -> Usage:
    """Raises ValueError when the text names no memory at all."""
    sums = {"Pss": 0, "Rss": 0}
    kv = 0
    path = ""
    for line in text.splitlines():
        if mapping := _MAPPING.match(line):
            path = mapping[1]
        elif size := _SIZE.match(line):
            num_bytes = 1024 * int(size[2])
            if KV_POOL not in path:
                sums[size[1]] += num_bytes
            elif size[1] == "Rss":
                kv += num_bytes
    if not any(sums.values()):
        raise ValueError("no mapping with a resident page: this is no smaps of a living process")
    return Usage(sums["Pss"], sums["Rss"], kv)
