"""A worker's engine on a device, with the CPU in its role: memory, kernels, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from baton.core.errors import ModelError
from baton.core.topology import KvTransferSpec, ModelSpec, PoolSpec, WorkerConfig
from baton.core.view import Role
from baton.engine.cache import kv_layout
from baton.engine.gpu.executor import DeviceExecutor
from baton.engine.gpu.memory import OVERHEAD_BYTES
from baton.engine.grammar import Grammars
from baton.engine.model_config import load_config
from baton.engine.random_model import Shape, make_model
from baton.kernels.device import DeviceMemory, HostDevice
from baton.kv_transfer.device_pool import DevicePool
from baton.worker.gpu import Placed, open_gpu, place_on_gpu

SHAPE = Shape(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=48, vocab_size=300, head_dim=16)
LIMIT = 64


@dataclass(frozen=True)
class Sized(HostDevice):
    """Has `total` bytes, of which nobody ever takes any."""

    total: int = 0

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self.total, self.total, 0, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    make_model(out, SHAPE, dtype="float32", max_model_len=LIMIT)
    return out


def config(folder: Path, kernels: str = "cpu", **pool: object) -> WorkerConfig:
    spec = PoolSpec(Role.DECODE, accelerator="H200", block_size=16, max_num_seqs=4, **pool)  # type: ignore[arg-type]
    return WorkerConfig("w", "c", ModelSpec(str(folder), dtype="float32", kernels=kernels), spec, KvTransferSpec(), "")


def place(folder: Path, device: HostDevice, **pool: object) -> Placed:
    model = load_config(folder)
    grammars = Grammars(folder, model.vocab_size, model.eos_token_ids)
    return place_on_gpu(config(folder, **pool), folder, kv_layout(model, 16, "float32"), LIMIT, grammars, device)


def test_a_named_size_is_taken(folder: Path) -> None:
    placed = place(folder, HostDevice(), kv_memory_bytes=9 * 4096)
    assert placed.num_blocks == 9
    assert isinstance(placed.memory, DevicePool)
    assert isinstance(placed.executor, DeviceExecutor)
    assert placed.memory.num_bytes == 9 * 4096
    placed.executor.warm_up(LIMIT)
    placed.executor.close()


def test_without_a_size_the_pool_takes_the_workers_share(folder: Path) -> None:
    device = Sized(total=2 * OVERHEAD_BYTES)
    placed = place(folder, device, kv_memory_bytes=0, gpu_memory_fraction=0.500244140625)  # 2**30 + 2**19 bytes
    assert placed.num_blocks == (1 << 19) // 4096
    placed.executor.close()
    with pytest.raises(ModelError, match=r"pools.decode.gpu_memory_fraction: 0 bytes hold 0 blocks"):
        place(folder, device, kv_memory_bytes=0, gpu_memory_fraction=0.4)


def test_running_out_of_memory_says_what_to_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(ModelError, match=r"pools.decode: model and KV pool do not fit into 0.9 of the 0 MiB of CPU"):
        place(folder, HostDevice(), kv_memory_bytes=1 << 20)


@pytest.mark.parametrize("kernels", ["native", "cpu"])
def test_kernels_of_the_cpu_are_refused_on_a_gpu(folder: Path, kernels: str) -> None:
    with pytest.raises(ModelError, match=f"model.kernels: {kernels!r} run on the CPU, and pools.decode.accelerator is 'H200'"):
        open_gpu(config(folder, kernels))


def test_deterministic_is_refused_on_a_gpu(folder: Path) -> None:
    asked = config(folder, "auto")
    with pytest.raises(ModelError, match=r"model.deterministic"):
        open_gpu(replace(asked, model=replace(asked.model, deterministic=True)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_told_by_the_key_that_asks_for_one(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"pools.decode.accelerator: GPU 0 was asked for, and torch .* finds no CUDA device"):
        open_gpu(config(folder, "auto"))
