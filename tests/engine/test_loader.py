"""Model folders: what is read from them, and how damaged or foreign ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from baton.core.errors import ModelError
from baton.engine import loader
from baton.engine.cache import kv_layout
from baton.engine.checkpoint import INDEX, SINGLE, Checkpoint
from baton.engine.layers import GatedMLP, RowLinear
from baton.engine.loader import load_config, load_model, resolve_model
from baton.engine.model.decoder import Decoder
from baton.engine.model.interface import CausalModel
from baton.engine.model_config import RopeConfig
from baton.engine.parallel import ParallelContext
from baton.engine.random_model import Shape, make_model
from baton.kernels.reference import ReferenceLinear
from safetensors.torch import load_file, save_file
from torch import Tensor

SHAPE = Shape(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=48, vocab_size=300, head_dim=16)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    make_model(out, SHAPE, dtype="float32", max_model_len=128, shard_bytes=20_000)
    return out


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit(file: Path, change: Callable[[dict[str, object]], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def set_keys(folder: Path, **values: object) -> None:
    """Set keys of config.json; None removes one."""
    edit(folder / "config.json", lambda config: config.update(values))
    edit(folder / "config.json", lambda config: [config.pop(key) for key, value in values.items() if value is None])


# ---- config --------------------------------------------------------------------------------------


def test_config_is_read(folder: Path) -> None:
    config = load_config(folder)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 2, 2, 16)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (32, 48, 300)
    assert config.max_position_embeddings == 128
    assert config.rope == RopeConfig(theta=10000.0)
    assert config.dtype == "float32"


def test_old_and_new_spelling_of_rotary_settings_are_one(folder: Path) -> None:
    scaling = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}
    set_keys(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    new = load_config(folder).rope
    assert new == RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 64)
    set_keys(folder, rope_parameters=None, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    assert load_config(folder).rope == new
    set_keys(folder, rope_scaling={"type": "linear", "factor": 2.0})
    assert load_config(folder).rope == RopeConfig("linear", 5e5, 2.0)
    set_keys(folder, rope_scaling=None, rope_theta=None)
    assert load_config(folder).rope == RopeConfig()


def test_eos_of_the_generation_config_wins(folder: Path) -> None:
    set_keys(folder, eos_token_id=7)
    generation = folder / "generation_config.json"
    edit(generation, lambda values: values.update(eos_token_id=[5, 6]))
    assert load_config(folder).eos_token_ids == (5, 6)
    edit(generation, lambda values: values.pop("eos_token_id"))
    assert load_config(folder).eos_token_ids == (7,)
    generation.unlink()
    assert load_config(folder).eos_token_ids == (7,)
    set_keys(folder, eos_token_id=None, bos_token_id=None)
    config = load_config(folder)
    assert (config.eos_token_ids, config.bos_token_id) == ((), None)


def test_defaults_of_a_sparse_config(folder: Path) -> None:
    set_keys(folder, head_dim=None, num_key_value_heads=None, architectures=None, tie_word_embeddings=None)
    config = load_config(folder)
    assert (config.head_dim, config.num_kv_heads, config.tied_embeddings) == (16, 2, False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; it must be one of llama"),
        ({"model_type": None}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
        ({"quantization_config": {"quant_method": "gguf"}}, "quantization_config.quant_method is 'gguf'; it must be one of gptq"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; it must be a whole number"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_attention_heads": 3}, "num_key_value_heads is 2; it must be a divisor of num_attention_heads"),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 4}},
            "rope_parameters.rope_type is 'longrope'; it must be one of default",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "su", "factor": 2}}, "rope_scaling.type is 'su'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is None"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": [1]}, "rope_parameters is .1.; it must be an object"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id"),
    ],
)
def test_unsupported_settings_are_refused_by_name(folder: Path, values: dict[str, object], message: str) -> None:
    (folder / "generation_config.json").unlink()
    set_keys(folder, **values)
    with pytest.raises(ModelError, match=message) as refused:
        load_config(folder)
    assert "config.json" in str(refused.value)


def test_missing_and_broken_config_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: No such file"):
        load_config(tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        load_config(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not an object"):
        load_config(folder)


# ---- weights -------------------------------------------------------------------------------------


def merged(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def matrix(linear: object) -> Tensor:
    """The weight that a linear was made from."""
    assert isinstance(linear, ReferenceLinear)
    return linear.weight


def head_of(model: CausalModel) -> Tensor:
    assert isinstance(model, Decoder)
    return matrix(model.head)


def qkv_of(model: CausalModel, layer: int) -> Tensor:
    assert isinstance(model, Decoder)
    return matrix(model.layers[layer].attention.qkv.linear)


def output_of(model: CausalModel, layer: int) -> Tensor:
    assert isinstance(model, Decoder)
    output = model.layers[layer].attention.output
    assert isinstance(output, RowLinear)
    return matrix(output.linear)


def down_of(model: CausalModel, layer: int) -> Tensor:
    assert isinstance(model, Decoder)
    mlp = model.layers[layer].mlp
    assert isinstance(mlp, GatedMLP)
    return matrix(mlp.down.linear)


def test_shards_and_a_single_file_load_alike(folder: Path, tmp_path: Path) -> None:
    sharded = load_model(folder, "float32")
    assert len(list(folder.glob("*.safetensors"))) > 2
    weights = merged(folder)
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(folder / "config.json", single)
    save_file(weights, single / SINGLE)
    model = load_model(single, "float32")
    assert torch.equal(head_of(model), head_of(sharded))
    for layer in range(SHAPE.num_layers):
        assert torch.equal(qkv_of(model, layer), qkv_of(sharded, layer))
        assert torch.equal(down_of(model, layer), down_of(sharded, layer))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_converted_and_fused(folder: Path, dtype: str) -> None:
    model, weights = load_model(folder, dtype), merged(folder)
    attention = "model.layers.1.self_attn"
    fused = torch.cat([weights[f"{attention}.{p}_proj.weight"] for p in "qkv"])
    assert torch.equal(qkv_of(model, 1), fused.to(getattr(torch, dtype)))


def test_each_rank_reads_its_share(folder: Path) -> None:
    weights = merged(folder)
    name = "model.layers.0.self_attn"
    for rank in range(2):
        shard = load_model(folder, "float32", ParallelContext(rank, 2))
        rows = slice(rank * 16, rank * 16 + 16)
        expected = torch.cat([weights[f"{name}.{p}_proj.weight"][rows] for p in "qkv"])
        assert torch.equal(qkv_of(shard, 0), expected)
        assert torch.equal(output_of(shard, 0), weights[f"{name}.o_proj.weight"][:, rows])
        inner = slice(rank * 24, rank * 24 + 24)
        assert torch.equal(down_of(shard, 0), weights["model.layers.0.mlp.down_proj.weight"][:, inner])


def test_missing_tensor_and_wrong_shape_are_named(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = tensors[name][:10].contiguous()
    save_file(tensors, file)
    with pytest.raises(ModelError, match=rf"{file.name}: tensor {name} has shape \[10, 32\]; config.json asks for \[48, 32\]"):
        load_model(folder)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=rf"{file.name}: tensor {name} is missing; it must have shape \[48, 32\]"):
        load_model(folder)
    edit(folder / INDEX, lambda values: values["weight_map"].pop(name))  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load_model(folder)


def test_all_wrong_tensors_are_named_before_any_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_keys(folder, intermediate_size=64, num_hidden_layers=7)
    monkeypatch.setattr(Checkpoint, "read_into", lambda *_: pytest.fail("read before everything was checked"))
    with pytest.raises(ModelError) as refused:
        load_model(folder)
    assert str(refused.value).count("tensor model.layers") == 8
    assert "more" in str(refused.value)


def test_damaged_and_missing_files(folder: Path, tmp_path: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ModelError, match=f"{shard.name} is not a readable safetensors file"):
        load_model(folder)
    shard.unlink()
    with pytest.raises(ModelError, match=f"names files that are not in .*{shard.name}"):
        load_model(folder)
    (folder / INDEX).write_text('{"weights": 1}')
    with pytest.raises(ModelError, match="weight_map"):
        load_model(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ModelError, match=f"neither {SINGLE} nor {INDEX}"):
        load_model(folder)


def test_what_is_asked_for_must_be_possible(folder: Path) -> None:
    with pytest.raises(ModelError, match="'int8' is not supported; use one of float32"):
        load_model(folder, "int8")
    with pytest.raises(ModelError, match=r"max_model_len is 129; .*allows 1 to 128"):
        load_model(folder, max_model_len=129)
    assert load_model(folder, max_model_len=100).max_model_len == 100
    with pytest.raises(ModelError, match="2 query heads cannot be split over 4"):
        load_model(folder, parallel=ParallelContext(0, 4))
    with pytest.raises(ModelError, match="pipeline_parallel is 2"):
        load_model(folder, parallel=ParallelContext(pipeline_size=2))


# ---- layout and hub ------------------------------------------------------------------------------


def test_layout_of_ranks_and_stages(folder: Path) -> None:
    config = replace(load_config(folder), num_layers=5, num_kv_heads=4)
    layout = kv_layout(config, 32, "bfloat16", ParallelContext(1, 2, pipeline_rank=1, pipeline_size=2))
    assert (layout.num_layers, layout.first_layer, layout.num_kv_heads, layout.first_head) == (2, 3, 2, 2)
    assert layout.block_bytes == 2 * 2 * 2 * 32 * 16 * 2
    with pytest.raises(ModelError, match="4 KV heads cannot be split over 3"):
        kv_layout(config, 32, "bfloat16", ParallelContext(0, 3))
    with pytest.raises(ModelError, match="5 layers cannot fill 6"):
        ParallelContext(pipeline_size=6).stage(5)


def test_a_folder_is_its_own_answer_and_a_missing_one_is_named(folder: Path) -> None:
    assert resolve_model(str(folder)) == folder
    for missing in (str(folder / "nothing"), "./nothing", ""):
        with pytest.raises(ModelError, match="no model folder at"):
            resolve_model(missing)


def test_a_hub_id_is_fetched_at_its_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert "*.safetensors" in allow_patterns
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert loader.resolve_model("owner/name", "v2") == folder
    assert asked == [("owner/name", "v2")]


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match=r"'owner/name' is not a folder.*revision 'v2'.*no route.*path of a model folder"):
        resolve_model("owner/name", "v2")
