"""Memory that is shared, private, and gone when it should be."""

from __future__ import annotations

import gc
import os
import resource

import numpy as np
import pytest
from baton.core.errors import TransferRefused
from baton.kv_transfer.pool import PoolMemory

SIZE = 1 << 20


def test_a_peer_sees_what_is_written():
    pool = PoolMemory.shared(SIZE)
    assert pool.path == f"/proc/{os.getpid()}/fd/{pool.path.rpartition('/')[2]}"
    peer = PoolMemory.open(pool.path, SIZE)
    pool.buffer[5:8] = b"abc"
    peer.buffer[9] = 7
    assert bytes(peer.buffer[5:8]) == b"abc"
    assert pool.buffer[9] == 7
    assert (pool.buffer.format, pool.buffer.readonly, pool.num_bytes) == ("B", False, SIZE)
    peer.close()
    pool.close()


def test_private_memory_has_no_path():
    pool = PoolMemory.private(SIZE)
    pool.buffer[:4] = b"kvkv"
    assert pool.path == ""
    pool.close()


@pytest.mark.parametrize("make", [PoolMemory.shared, PoolMemory.private])
def test_every_page_is_there_from_the_start(make):
    pool = make(16 << 20)
    array = np.frombuffer(pool.buffer, np.uint8)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    array[:: os.sysconf("SC_PAGE_SIZE")] = 1
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    assert faults < 100  # of 4096 pages
    del array
    pool.close()


def test_a_pool_that_is_gone_cannot_be_opened():
    pool = PoolMemory.shared(SIZE)
    path = pool.path
    pool.close()
    with pytest.raises(TransferRefused, match="cannot be opened"):
        PoolMemory.open(path, SIZE)


def test_another_size_is_refused():
    pool = PoolMemory.shared(SIZE)
    with pytest.raises(TransferRefused, match=f"has {SIZE} bytes, expected {2 * SIZE}"):
        PoolMemory.open(pool.path, 2 * SIZE)
    pool.close()


def test_views_outlive_close():
    pool = PoolMemory.shared(SIZE)
    array = np.frombuffer(pool.buffer, np.uint8)
    pool.close()
    pool.close()
    array[3] = 9
    assert array[3] == 9


def test_nothing_is_left_open():
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(20):
        pool = PoolMemory.shared(4096)
        PoolMemory.open(pool.path, 4096).close()
        pool.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize("make", [PoolMemory.shared, PoolMemory.private])
def test_an_empty_pool_is_refused(make):
    with pytest.raises(ValueError, match="at least one byte"):
        make(0)
