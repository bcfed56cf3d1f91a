"""GPTQ and AWQ folders, packed here from the formats' definitions, against the numbers they stand for."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from baton.core.errors import ModelError
from baton.engine import quantized
from baton.engine.checkpoint import INDEX, SINGLE, Checkpoint
from baton.engine.loader import load_config, load_model
from baton.engine.quantization_config import QuantizationConfig
from baton.engine.quantized import QuantizedCheckpoint, open_checkpoint
from baton.kernels.batch import RowSpan
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

WORD = 1 << 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # field i of a word holds output AWQ_ORDER[i]


@dataclass(frozen=True)
class Format:
    """What a writer was asked for."""

    method: str = "gptq"
    bits: int = 4
    group: int = 32  # -1: one group
    ordered: bool = False
    layout: str = "gptq"
    symmetric: bool = False
    writer: str = ""
    index: str = "true"  # g_idx: "true", "zero" or "none"

    @property
    def json(self) -> dict[str, object]:
        """The quantization_config that goes with it, as the writers spell it."""
        common: dict[str, object] = {"quant_method": self.method, "bits": self.bits, "group_size": self.group}
        if self.method == "awq":
            return common | {"version": "GEMM", "zero_point": not self.symmetric, "modules_to_not_convert": ["lm_head"]}
        meta = {"meta": {"quantizer": [self.writer], "damp_percent": 0.05}} if self.writer else {}
        gptq = {"desc_act": self.ordered, "sym": self.symmetric, "checkpoint_format": self.layout, "true_sequential": True}
        return common | gptq | meta | {"lm_head": False, "dynamic": {"-:lm_head": {}}, "pack_dtype": "int32"}


FORMATS = [
    *(Format(bits=bits, group=group) for bits in (4, 8) for group in (-1, 32, 64, 128)),
    Format(symmetric=True),
    Format(ordered=True),
    Format(ordered=True, bits=8, group=64, layout="gptq_v2"),
    Format(ordered=True, group=-1),
    Format(layout="gptq_v2"),
    Format(writer="gptqmodel:4.2.0"),
    Format(bits=8, writer="gptqmodel:1.0.0"),
    Format(index="zero"),
    Format(index="none"),
    *(Format("awq", group=group) for group in (-1, 32, 64, 128)),
    Format("awq", symmetric=True),
]


def pack(fields: list[int], bits: int) -> list[int]:
    """32-bit words of consecutive fields, lowest bits first."""
    per = 32 // bits
    return [sum(value << (bits * i) for i, value in enumerate(fields[at : at + per])) for at in range(0, len(fields), per)]


def as_int32(words: list[list[int]]) -> Tensor:
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32).copy())


def quantise(weight: Tensor, form: Format, rng: random.Random) -> tuple[dict[str, Tensor], Tensor]:
    """Packed tensors of weight [O, I], and the weight that they stand for, float64."""
    num_outputs, num_inputs = weight.shape
    size = num_inputs if form.group == -1 else form.group
    num_groups = num_inputs // size
    group_of = [i // size for i in range(num_inputs)]
    if form.ordered:
        rng.shuffle(group_of)
    top = (1 << form.bits) - 1
    scales = torch.empty(num_groups, num_outputs, dtype=torch.float16)
    zeros = [[0] * num_outputs for _ in range(num_groups)]
    levels = [[0] * num_outputs for _ in range(num_inputs)]
    meant = torch.empty(num_outputs, num_inputs, dtype=torch.float64)
    for o in range(num_outputs):
        for g in range(num_groups):
            members = [i for i in range(num_inputs) if group_of[i] == g]
            values = weight[o, members].double()
            low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
            if form.symmetric:
                low, high = -max(-low, high), max(-low, high)
            scales[g, o] = (high - low) / top
            scale = float(scales[g, o])
            # Now and then the extremes, which real weights hardly reach.
            zero = (top + 1) // 2 if form.symmetric else rng.choice([0, 1, top, *[round(-low / scale)] * 3])
            zeros[g][o] = zero
            for i, value in zip(members, values.tolist(), strict=True):
                level = min(top, max(0, round(value / scale) + zero))
                levels[i][o] = level
                meant[o, i] = (level - zero) * scale
    packed = pack_awq(levels, zeros) if form.method == "awq" else pack_gptq(levels, zeros, form)
    if form.method == "gptq" and form.index != "none":
        packed["g_idx"] = torch.tensor([0] * num_inputs if form.index == "zero" else group_of, dtype=torch.int32)
    return packed | {"scales": scales}, meant


def pack_gptq(levels: list[list[int]], zeros: list[list[int]], form: Format) -> dict[str, Tensor]:
    by_output = [pack(list(column), form.bits) for column in zip(*levels, strict=True)]  # [O, I / n]
    qweight = as_int32([list(row) for row in zip(*by_output, strict=True)])
    mask, ones = (1 << form.bits) - 1, sum(1 << at for at in range(0, 32, form.bits))
    if form.layout == "gptq_v2":
        words = [pack(row, form.bits) for row in zeros]
    elif form.writer.startswith("gptqmodel"):
        words = [[(word - ones) % WORD for word in pack(row, form.bits)] for row in zeros]
    else:
        words = [pack([(zero - 1) & mask for zero in row], form.bits) for row in zeros]
    return {"qweight": qweight, "qzeros": as_int32(words)}


def pack_awq(levels: list[list[int]], zeros: list[list[int]]) -> dict[str, Tensor]:
    def reorder(row: list[int]) -> list[int]:
        return [row[at + AWQ_ORDER[i]] for at in range(0, len(row), 8) for i in range(8)]

    return {name: as_int32([pack(reorder(row), 4) for row in rows]) for name, rows in (("qweight", levels), ("qzeros", zeros))}


def save_linear(folder: Path, form: Format, num_outputs: int, num_inputs: int) -> tuple[QuantizedCheckpoint, Tensor]:
    """A checkpoint of one packed linear "x", and its weight."""
    generator = torch.Generator().manual_seed(7)
    packed, meant = quantise(torch.randn(num_outputs, num_inputs, generator=generator), form, random.Random(7))
    save_file({f"x.{name}": tensor for name, tensor in packed.items()}, folder / SINGLE)
    checkpoint = open_checkpoint(folder, quantization_of(folder, form))
    assert isinstance(checkpoint, QuantizedCheckpoint)
    return checkpoint, meant


def quantization_of(folder: Path, form: Format) -> QuantizationConfig | None:
    """The config of a form, as read from a config.json."""
    LlamaConfig(quantization_config=form.json, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": form.json}))
    return load_config(folder).quantization


# ---- one linear ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: "-".join(str(value) for value in vars(form).values()))
def test_packed_weights_are_the_numbers_they_stand_for(tmp_path: Path, form: Format) -> None:
    checkpoint, meant = save_linear(tmp_path, form, 40, 128)
    checkpoint.require({"x.weight": (40, 128)})
    assert torch.equal(checkpoint.read("x.weight", (40, 128), torch.float32).double(), meant)
    assert torch.equal(checkpoint.read("x.weight", (40, 128), torch.bfloat16), meant.float().bfloat16())


@pytest.fixture(scope="module", params=[Format(ordered=True), Format(bits=8), Format("awq")], ids=["ordered", "8", "awq"])
def linear(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedCheckpoint, Tensor]:
    form: Format = request.param
    return save_linear(tmp_path_factory.mktemp("linear"), form, 48, 160)


@given(data=st.data())
def test_any_share_of_outputs_or_inputs_is_read(linear: tuple[QuantizedCheckpoint, Tensor], data: st.DataObject) -> None:
    checkpoint, meant = linear
    axis = data.draw(st.sampled_from([0, 1]))
    begin = data.draw(st.integers(0, meant.shape[axis] - 1))
    share = range(begin, data.draw(st.integers(begin + 1, meant.shape[axis])))
    expected = meant.narrow(axis, begin, len(share)).float()
    out = torch.empty_like(expected)
    checkpoint.read_into(out, "x.weight", share, axis)
    assert torch.equal(out, expected)


def test_slabs_do_not_show(linear: tuple[QuantizedCheckpoint, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, meant = linear
    monkeypatch.setattr(quantized, "SLAB", 1)
    reads: list[int] = []
    levels = QuantizedCheckpoint._levels

    def counted(self: QuantizedCheckpoint, module: str, inputs: range, outputs: range) -> Tensor:
        reads.append(len(inputs))
        return levels(self, module, inputs, outputs)

    monkeypatch.setattr(QuantizedCheckpoint, "_levels", counted)
    assert torch.equal(checkpoint.read("x.weight", (48, 160), torch.float32), meant.float())
    assert reads == [32] * 5


def test_a_group_index_must_point_to_groups(tmp_path: Path) -> None:
    checkpoint, _ = save_linear(tmp_path, Format(), 8, 64)
    tensors = load_file(tmp_path / SINGLE)
    tensors["x.g_idx"][5] = 2
    save_file(tensors, tmp_path / SINGLE)
    checkpoint = QuantizedCheckpoint(tmp_path, QuantizationConfig("gptq", 4, 32))
    with pytest.raises(ModelError, match=r"model\.safetensors: tensor x\.g_idx names groups outside 0 to 1"):
        checkpoint.read("x.weight", (8, 64), torch.float32)


# ---- whole models --------------------------------------------------------------------------------

SHAPE: dict[str, object] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
LLAMA = LlamaConfig(**SHAPE, intermediate_size=128, attention_bias=True)
MIXTRAL = MixtralConfig(**SHAPE, intermediate_size=32, num_local_experts=4)


def save_model(folder: Path, form: Format, shards: int = 1, left_out: str = "lm_head", config: PreTrainedConfig = LLAMA) -> Path:
    """A packed model folder; returns a plain one of the weights that the packed ones stand for."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    plain = folder / "plain"
    model.half().save_pretrained(plain)
    tensors: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    rng = random.Random(5)
    for name, tensor in load_file(plain / SINGLE).items():
        module = name.removesuffix(".weight")
        if not module.endswith(("_proj", "w1", "w2", "w3")) or left_out in module:
            tensors[name] = meant[name] = tensor
            continue
        packed, weight = quantise(tensor, form, rng)
        tensors |= {f"{module}.{part}": value for part, value in packed.items()}
        meant[name] = weight.float()
    save_file(meant, plain / SINGLE, {"format": "pt"})
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    if shards == 1:
        save_file(tensors, folder / SINGLE)
    else:
        for file in set(files.values()):
            save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    shutil.copy(plain / "config.json", folder)
    edit_config(folder, lambda values: values.update(quantization_config=form.json))
    return plain


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Format], Path]:
    """Packed model folders, each written once."""
    folders: dict[Format, Path] = {}

    def folder_of(form: Format) -> Path:
        if form not in folders:
            folders[form] = tmp_path_factory.mktemp("packed")
            save_model(folders[form], form)
        return folders[form]

    return folder_of


def edit_config(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


@torch.inference_mode()
def logits_of(folder: Path, dtype: str, tokens: list[int]) -> Tensor:
    model = load_model(folder, dtype)
    kv = torch.zeros(1, 2, 2, 2, 64, 16, dtype=getattr(torch, dtype))
    attention = model.kernels.attention(kv, [RowSpan(0, len(tokens), 0, (0,))])
    positions = torch.arange(len(tokens))
    return model.forward(torch.tensor(tokens), positions, attention, positions)


@pytest.mark.parametrize(
    ("form", "shards", "left_out", "config"),
    [
        (Format(ordered=True), 1, "lm_head", LLAMA),
        (Format(bits=8, group=-1, writer="gptqmodel:4.2.0"), 3, "layers.1", LLAMA),
        (Format("awq"), 4, "o_proj", LLAMA),
        (Format("awq"), 1, "lm_head", MIXTRAL),
    ],
    ids=["gptq", "gptq-8-sharded", "awq-sharded", "awq-experts"],
)
def test_a_packed_model_gives_the_logits_of_its_weights(
    tmp_path: Path, form: Format, shards: int, left_out: str, config: PreTrainedConfig
) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, form, shards, left_out, config), dtype=torch.float32)
    tokens = random.Random(1).choices(range(96), k=40)
    with torch.inference_mode():
        expected = oracle.eval()(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits_of(tmp_path, "float32", tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.06), ("float16", 0.008)])
def test_a_packed_model_runs_in_half_precision(saved: Callable[[Format], Path], dtype: str, tolerance: float) -> None:
    folder = saved(Format())
    tokens = random.Random(1).choices(range(96), k=40)
    expected = logits_of(folder, "float32", tokens)
    assert float((logits_of(folder, dtype, tokens).float() - expected).std() / expected.std()) < tolerance


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.float16, torch.bfloat16, torch.float32])
def test_plain_weights_of_any_type_are_read_into_any_other(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    weight = torch.randn(6, 4).to(stored)
    save_file({"x.weight": weight}, tmp_path / SINGLE)
    assert torch.equal(Checkpoint(tmp_path).read("x.weight", (6, 4), wanted), weight.to(wanted))


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "values", "message"),
    [
        (Format(), {"quant_method": "bitsandbytes"}, r"quant_method is 'bitsandbytes'; it must be one of gptq, awq"),
        (Format(), {"quant_method": "compressed-tensors"}, "quant_method is 'compressed-tensors'"),
        (Format(), {"quant_method": None}, "quant_method is None"),
        (Format(), {"bits": 3}, "quantization_config.bits is 3; it must be 4 or 8 for quant_method 'gptq'"),
        (Format("awq"), {"bits": 8}, "bits is 8; it must be 4 for quant_method 'awq'"),
        (Format(), {"bits": None}, "bits is None"),
        (Format(), {"group_size": 0}, "group_size is 0"),
        (Format(), {"group_size": None}, "group_size is None"),
        (Format(), {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; it must be 'gptq' or 'gptq_v2'"),
        (Format(), {"checkpoint_format": None, "format": "marlin"}, "format is 'marlin'"),
        (Format(), {"pack_dtype": "int64"}, "pack_dtype is 'int64'; it must be 'int32'"),
        (Format(), {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic is .*; it must be absent"),
        (Format("awq"), {"version": "gemv"}, "version is 'gemv'; it must be 'gemm'"),
        (Format("awq"), {"backend": "llm-awq"}, "backend is 'llm-awq'"),
        (Format(), {"group_size": 48}, "group_size is 48; it must divide the 64 inputs of model.layers.0.self_attn.q_proj"),
        (Format(), {"bits": 8}, r"qweight has shape \[8, 64\]; config.json asks for \[16, 64\]"),
        (Format(), {"group_size": 64}, r"scales has shape \[2, 64\]; config.json asks for \[1, 64\]"),
        (Format(index="none"), {"desc_act": True}, r"q_proj.g_idx is missing; it must have shape \[64\]"),
        (Format("awq"), {"quant_method": "gptq"}, r"qweight has shape \[64, 8\]; config.json asks for \[8, 64\]"),
    ],
)
def test_what_cannot_be_read_is_refused_before_any_weight(
    tmp_path: Path,
    saved: Callable[[Format], Path],
    monkeypatch: pytest.MonkeyPatch,
    form: Format,
    values: dict[str, object],
    message: str,
) -> None:
    shutil.copytree(saved(form), tmp_path, dirs_exist_ok=True)
    changed = {key: value for key, value in (form.json | values).items() if value is not None}
    edit_config(tmp_path, lambda config: config.update(quantization_config=changed))
    refuse_reads(monkeypatch)
    with pytest.raises(ModelError, match=message) as refused:
        load_model(tmp_path)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("qzeros", r"tensor model.layers.1.mlp.up_proj.qzeros is missing; it must have shape \[2, 16\]"),
        ("scales", r"tensor model.layers.1.mlp.up_proj.scales is missing; it must have shape \[2, 128\]"),
        ("qweight", r"tensor model.layers.1.mlp.up_proj.qweight is missing; it must have shape \[8, 128\]"),
    ],
)
def test_missing_packed_tensors_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, message: str) -> None:
    save_model(tmp_path, Format())
    tensors = load_file(tmp_path / SINGLE)
    del tensors[f"model.layers.1.mlp.up_proj.{part}"]
    save_file(tensors, tmp_path / SINGLE)
    refuse_reads(monkeypatch)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_packed_tensors_of_a_wrong_type_or_without_a_config_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, Format())
    tensors = load_file(tmp_path / SINGLE)
    name = "model.layers.0.self_attn.k_proj"
    save_file(tensors | {f"{name}.qweight": tensors[f"{name}.qweight"].long()}, tmp_path / SINGLE)
    refuse_reads(monkeypatch)
    with pytest.raises(ModelError, match=rf"{SINGLE}: tensor {name}.qweight has type I64; it must be I32"):
        load_model(tmp_path)
    edit_config(tmp_path, lambda config: config.pop("quantization_config"))
    with pytest.raises(ModelError, match=rf"{name}.weight is missing.*{name}.qweight is there: config.json must describe"):
        load_model(tmp_path)


def test_outputs_must_fill_words(tmp_path: Path) -> None:
    for form, message in ((Format("awq"), "12 outputs"), (Format(bits=8), "6 outputs")):
        checkpoint, _ = save_linear(tmp_path, form, 16, 64)
        with pytest.raises(ModelError, match=rf"bits is {form.bits}; x with {message} cannot be packed so"):
            checkpoint.require({"x.weight": (int(message.split()[0]), 64)})


def refuse_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "read_into", lambda *_: pytest.fail("read before everything was checked"))
    monkeypatch.setattr(QuantizedCheckpoint, "read_into", lambda *_: pytest.fail("read before everything was checked"))
