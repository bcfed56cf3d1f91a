"""Reading /proc/PID/smaps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from baton.kv_transfer.pool import PoolMemory
from memory import Usage, parse_smaps

SMAPS = """\
55d0c8a00000-55d0c8a21000 rw-p 00000000 00:00 0                          [heap]
Size:                132 kB
Rss:                 100 kB
Pss:                  60 kB
SwapPss:               7 kB
7f10a0000000-7f10b0000000 rw-s 00000000 00:01 1036                       /memfd:baton-kv-pool (deleted)
Rss:              262144 kB
Pss:              131072 kB
7f10c0000000-7f10c0001000 r-xp 00000000 fe:00 12 /a library.so
Rss:                   4 kB
Pss:                   1 kB
7f10c1000000-7f10c1001000 rw-p 00000000 00:00 0
Rss:                   8 kB
Pss:                   8 kB
VmFlags: rd wr mr mw me ac sd
"""


def test_kv_pools_are_kept_apart() -> None:
    assert parse_smaps(SMAPS) == Usage(pss=69 * 1024, rss=112 * 1024, kv=262144 * 1024)


def test_a_living_process_and_its_pool() -> None:
    smaps = Path(f"/proc/{os.getpid()}/smaps")
    before = parse_smaps(smaps.read_text())
    pool = PoolMemory.shared(8 << 20)
    try:
        assert parse_smaps(smaps.read_text()).kv - before.kv == 8 << 20
    finally:
        pool.close()
    assert before.pss > 1 << 20


def test_a_text_without_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="no smaps"):
        parse_smaps("")
