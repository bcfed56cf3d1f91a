"""What is found out before anything starts."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from baton.core.errors import TopologyError
from baton.deploy import checks
from baton.deploy.checks import check_topology
from baton.deploy.gpus import Gpu
from baton.deploy.settings import TopologyFile, read_topology_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@pytest.fixture
def make(tmp_path: Path):
    """Builds a model folder and a topology file around it."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / "model.safetensors").write_bytes(b"x" * 100)

    def build(model_lines: str = "", pool: str = "", router: str = "") -> TopologyFile:
        file = tmp_path / "t.yaml"
        file.write_text(
            f"cluster: chat\nmodel:\n  path: ./model\n  dtype: float32\n{model_lines}"
            f"pools:\n  mixed:\n    block_size: 16\n{pool}"
            f"router:\n  grpc: 127.0.0.1:0\n{router or '  http: 127.0.0.1:0'}\n"
        )
        return read_topology_file(file)

    return build


def _problems(file: TopologyFile) -> list[str]:
    with pytest.raises(TopologyError) as caught:
        check_topology(file)
    folder = str(Path(file.marks.file).parent)
    return [line.replace(folder + "/", "") for line in str(caught.value).splitlines()]


def test_a_good_topology_passes(make):
    check_topology(make())


def test_parallel_workers_are_refused_for_now(make):
    assert _problems(make(pool="    tensor_parallel: 2\n    pipeline_parallel: 4\n")) == [
        "t.yaml:8: pools.mixed.tensor_parallel: 2 is not supported yet; use 1, and more replicas instead",
        "t.yaml:9: pools.mixed.pipeline_parallel: 4 is not supported yet; use 1, and more replicas instead",
    ]


def test_kv_memory_must_hold_one_sequence(make):
    # A block is 2 layers x 2 x 2 heads x 16 slots x 16 dims x 4 bytes = 8 KiB; 256 tokens take 16 blocks and one to spare.
    check_topology(make(pool=f"    kv_memory: {17 * 8192}\n"))
    assert _problems(make(pool=f"    kv_memory: {17 * 8192 - 1}\n")) == [
        "t.yaml:8: pools.mixed.kv_memory: 136 KiB is too small; one sequence of 256 tokens takes 17 blocks of 8 KiB: "
        "at least 136 KiB, or a smaller model.max_model_len"
    ]
    check_topology(make("  max_model_len: 128\n", f"    kv_memory: {9 * 8192}\n"))


GPU_POOL = "    accelerator: H200\n"


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "local_gpus", lambda: (Gpu("NVIDIA H200", 141 << 30, 140 << 30),))


def test_a_gpu_must_be_there(make, monkeypatch):
    monkeypatch.setattr(checks, "local_gpus", lambda: ())
    assert _problems(make(pool=GPU_POOL)) == [
        "t.yaml:8: pools.mixed.accelerator: 'H200' asks for a GPU, and nvidia-smi finds none on this machine; use cpu, or "
        "start the cluster where the GPUs are"
    ]


def test_workers_must_fit_the_gpus(make, one_gpu):
    check_topology(make(pool=GPU_POOL))  # the size of its KV pool is left to the worker
    check_topology(make(pool=GPU_POOL + "    replicas: 2\n    gpu_memory_fraction: 0.5\n"))
    assert _problems(make(pool=GPU_POOL + "    replicas: 3\n    gpu_memory_fraction: 0.5\n")) == [
        "t.yaml:5: pools: these workers need 2 GPUs and this machine has 1; use fewer replicas, or a gpu_memory_fraction in "
        "each pool: workers share a GPU whose fractions add up to at most 1"
    ]


def test_weights_and_kv_memory_must_fit_a_workers_share(make, one_gpu):
    check_topology(make(pool=GPU_POOL + "    kv_memory: 126GiB\n"))
    assert _problems(make(pool=GPU_POOL + "    kv_memory: 127GiB\n")) == [
        "t.yaml:6: pools.mixed: weights of 100 bytes and a KV pool of 127 GiB do not fit into 0.9 of the 141 GiB of NVIDIA H200; "
        "set a smaller kv_memory, or leave it out to use what is left"
    ]


def test_a_gpu_fraction_on_the_cpu_is_refused(make):
    assert _problems(make(pool="    gpu_memory_fraction: 0.5\n")) == [
        "t.yaml:8: pools.mixed.gpu_memory_fraction: 0.5 says nothing of a pool on the CPU; "
        "set accelerator to cuda, or leave it out"
    ]


def test_longer_than_the_model_is_refused(make):
    (problem,) = _problems(make("  max_model_len: 300\n"))
    assert problem == "t.yaml:5: model.max_model_len: 300 is not allowed; this model was made for at most 256 positions"


def test_a_folder_that_is_no_model(make, tmp_path):
    file = make()
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "config.json").write_text("{}")
    problems = _problems(file)
    assert problems[0] == "t.yaml:3: model.path: model holds no *.safetensors; needed: a folder in Hugging Face format"
    assert problems[1].startswith("t.yaml:3: model.path: ")
    assert "config.json" in problems[1]


def test_no_folder_at_all(make, tmp_path):
    file = make()
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    assert _problems(file) == ["t.yaml:3: model.path: there is no folder model; needed: a folder in Hugging Face format"]


def test_a_taken_port_is_named_with_its_key_and_owner(make):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (problem,) = _problems(make(router=f"  http: 127.0.0.1:{port}\n"))
    assert problem.startswith(f"t.yaml:10: router.http: port {port} on 127.0.0.1 is taken")
    assert problem.endswith("; choose another, or port 0 for any free one")


def test_a_foreign_address_is_refused(make):
    (problem,) = _problems(make(router="  http: 203.0.113.7:0\n"))
    assert problem.startswith("t.yaml:10: router.http: cannot listen on 203.0.113.7:0: ")


def test_implausible_memory_is_refused(make):
    (problem,) = _problems(make(pool="    kv_memory: 900TiB\n"))
    assert problem.startswith("t.yaml:5: pools: these pools need 900 TiB (mixed 900 TiB) and this machine has ")
