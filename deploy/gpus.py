"""The NVIDIA GPUs of this host, and which worker gets which. Asks the driver's own tool: no CUDA library is loaded here."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.topology import PoolSpec

_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
_PATIENCE = 20.0  # seconds that the tool may take: without the persistence daemon the driver is loaded for it
_ROUNDING = 1e-9  # shares such as three thirds add up to a hair more than 1


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Sizes in bytes."""

    name: str
    total_bytes: int
    free_bytes: int


def local_gpus() -> tuple[Gpu, ...]:
    """The GPUs of this host in the driver's order; none where there is no driver or it does not answer."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, check=True, timeout=_PATIENCE)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(done.stdout)


def parse_gpus(listing: str) -> tuple[Gpu, ...]:
    """One GPU per line: name, total and free memory in MiB. What cannot be read, such as a lost device, is left out."""
    gpus = []
    for line in listing.splitlines():
        name, *sizes = [part.strip() for part in line.rsplit(",", 2)]
        if len(sizes) == 2 and all(size.isdigit() for size in sizes):
            gpus.append(Gpu(name, *(int(size) << 20 for size in sizes)))
    return tuple(gpus)


def assign_gpus(pools: Sequence[PoolSpec]) -> tuple[int, ...]:
    """The GPU of every worker, pool by pool and replica by replica: the first that has room for its share.

    Workers on the CPU get 0, which nobody looks at. The numbers go as high as needed: see `num_gpus`.
    """
    taken: list[float] = []
    numbers = []
    for pool in pools:
        for _ in range(pool.replicas):
            number = next((i for i, load in enumerate(taken) if load + pool.gpu_share <= 1.0 + _ROUNDING), len(taken))
            if pool.on_gpu:
                taken += [0.0] * (number + 1 - len(taken))
                taken[number] += pool.gpu_share
            numbers.append(number if pool.on_gpu else 0)
    return tuple(numbers)


def num_gpus(pools: Sequence[PoolSpec]) -> int:
    """How many GPUs `assign_gpus` needs."""
    on_gpu = [pool for pool in pools if pool.on_gpu]
    return max(assign_gpus(on_gpu), default=-1) + 1
