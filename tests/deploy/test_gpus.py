"""Which GPUs there are, and who gets which."""

from __future__ import annotations

import subprocess

import pytest
from baton.core.topology import PoolSpec
from baton.core.view import Role
from baton.deploy import gpus
from baton.deploy.gpus import Gpu, assign_gpus, local_gpus, num_gpus, parse_gpus


def pool(role: Role, replicas: int = 1, fraction: float | None = None, accelerator: str = "cuda") -> PoolSpec:
    return PoolSpec(role, replicas=replicas, accelerator=accelerator, gpu_memory_fraction=fraction)


def test_the_listing_is_read_and_lost_devices_are_left_out() -> None:
    listing = "NVIDIA H200, 143771, 143000\nNVIDIA H200, [N/A], [GPU is lost]\n\nA card, of two names, 100, 50\n"
    assert parse_gpus(listing) == (
        Gpu("NVIDIA H200", 143771 << 20, 143000 << 20),
        Gpu("A card, of two names", 100 << 20, 50 << 20),
    )


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.CalledProcessError(9, "nvidia-smi")])
def test_no_driver_means_no_gpus(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(gpus.subprocess, "run", fail)
    assert local_gpus() == ()


@pytest.mark.parametrize(
    ("pools", "numbers", "needed"),
    [
        ((pool(Role.PREFILL, 2), pool(Role.DECODE)), (0, 1, 2), 3),  # without fractions everybody has one alone
        ((pool(Role.PREFILL, fraction=0.5), pool(Role.DECODE, fraction=0.5)), (0, 0), 1),
        ((pool(Role.MIXED, 3, 1 / 3), pool(Role.DECODE, fraction=0.1)), (0, 0, 0, 1), 2),  # three thirds are one
        ((pool(Role.PREFILL, 2, 0.6), pool(Role.DECODE, 2, 0.4)), (0, 1, 0, 1), 2),  # gaps are filled
        ((pool(Role.PREFILL, 2, accelerator="cpu"), pool(Role.DECODE)), (0, 0, 0), 1),
        ((pool(Role.PREFILL, accelerator="cpu"),), (0,), 0),
    ],
)
def test_workers_take_the_first_gpu_with_room_for_their_share(
    pools: tuple[PoolSpec, ...], numbers: tuple[int, ...], needed: int
) -> None:
    assert assign_gpus(pools) == numbers
    assert num_gpus(pools) == needed
