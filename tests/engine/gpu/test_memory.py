"""What of a GPU is left for KV."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from baton.core.errors import ModelError
from baton.core.kv import KVLayout
from baton.engine.gpu.memory import OVERHEAD_BYTES, blocks_in, kv_budget, measured_workspace
from baton.kernels.device import DeviceMemory, HostDevice

GIB = 1 << 30
LAYOUT = KVLayout(2, 1, 16, 16, "float32")  # 4 KiB a block


@pytest.mark.parametrize(
    ("memory", "share", "expected"),
    [
        (DeviceMemory(total=100 * GIB, free=80 * GIB, held=16 * GIB, peak=0), 0.9, 90 - 16 - 3),
        (DeviceMemory(total=100 * GIB, free=80 * GIB, held=16 * GIB, peak=0), 0.45, 45 - 16 - 3),  # a share of a shared one
        (DeviceMemory(total=100 * GIB, free=20 * GIB, held=16 * GIB, peak=0), 0.9, 20 - 3),  # others have taken more than theirs
        (DeviceMemory(total=100 * GIB, free=80 * GIB, held=16 * GIB, peak=0), 0.15, 0),  # the weights alone are too much
    ],
)
def test_kv_gets_what_the_share_leaves(memory: DeviceMemory, share: float, expected: int) -> None:
    assert kv_budget(memory, share, 2 * GIB) == pytest.approx(expected * GIB, abs=8)
    assert OVERHEAD_BYTES == GIB


@dataclass(frozen=True)
class Counted(HostDevice):
    """A device that counts what it is told was allocated."""

    log: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=lambda: [5])

    def memory(self) -> DeviceMemory:
        return DeviceMemory(0, 0, held=self.sizes[-1], peak=max(self.sizes))

    def reset_peak(self) -> None:
        del self.sizes[:-1]

    def release(self) -> None:
        self.log.append("released")


def test_the_workspace_is_the_peak_beyond_what_was_held_and_what_is_not_counted() -> None:
    device = Counted(sizes=[50, 5])

    def run() -> int:
        device.sizes.extend([40, 12])
        return 10

    assert measured_workspace(device, run) == 40 - 5 - 10
    assert device.log == ["released"]


def test_a_pool_must_hold_one_sequence() -> None:
    assert blocks_in(5 * 4096 + 17, LAYOUT, 64, "x") == 5
    with pytest.raises(ModelError, match=r"^pools.mixed.kv_memory: 20479 bytes hold 4 blocks .* 64 tokens needs at least 20480"):
        blocks_in(5 * 4096 - 1, LAYOUT, 64, "pools.mixed.kv_memory")
