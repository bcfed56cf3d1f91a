"""Which transport is used for which peer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from baton.core.errors import TransferRefused
from baton.core.kv import Endpoint, KVLayout
from baton.core.request import WorkerRef
from baton.kernels.device import HostDevice
from baton.kv_transfer.device_pool import DevicePool
from baton.kv_transfer.pool import PoolMemory
from baton.kv_transfer.registry import TRANSPORTS, choose, host_identity
from baton.kv_transfer.transports import make_transports

LAYOUT = KVLayout(1, 1, 8, 16, "float32")
HERE = Endpoint(WorkerRef("prefill-0", 1), "127.0.0.1:1", "host-a", "/proc/1/fd/5", 4, LAYOUT)
PEER = Endpoint(WorkerRef("decode-0", 1), "127.0.0.1:2", "host-a", "/proc/2/fd/5", 4, LAYOUT)


@pytest.fixture
def transports():
    memory = PoolMemory.private(4096)
    yield make_transports(HERE, memory)
    memory.close()


def test_every_transport_of_the_table_is_made(transports):
    assert [(name, transport.name) for name, transport in transports.items()] == [
        (name, name) for name in ("shm", "grpc", "torch_dist")
    ]
    on_device = make_transports(HERE, DevicePool(torch.zeros(4096, dtype=torch.uint8), 1024, HostDevice()))
    assert [(name, transport.name) for name, transport in on_device.items()] == [(name, name) for name in TRANSPORTS]


@pytest.mark.parametrize(
    ("peer", "expected"),
    [(PEER, "shm"), (replace(PEER, host="host-b"), "grpc"), (replace(PEER, shm_path=""), "grpc")],
)
def test_auto_takes_shared_memory_on_one_host(transports, peer, expected):
    assert choose("auto", peer, transports).name == expected


def test_a_named_transport_must_reach(transports):
    assert choose("grpc", PEER, transports).name == "grpc"
    with pytest.raises(TransferRefused, match="shm does not reach decode-0@1"):
        choose("shm", replace(PEER, host="host-b"), transports)
    with pytest.raises(TransferRefused, match="none of the transports"):
        choose("auto", replace(PEER, address="", shm_path=""), transports)
    with pytest.raises(TransferRefused, match="no transport is called 'smoke'; there are auto, grpc, shm"):
        choose("smoke", PEER, transports)


def test_the_host_identity_names_machine_and_namespace():
    boot, _, namespace = host_identity().partition(":")
    assert len(boot) == 36
    assert namespace.startswith("pid:[")
    assert host_identity() == host_identity()
