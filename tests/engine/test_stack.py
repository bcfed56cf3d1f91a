"""Layers that run in one native call give the bits that they give one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from baton.core.errors import ModelError
from baton.engine.cache import kv_layout, kv_tensor
from baton.engine.loader import load_model
from baton.engine.model.decoder import Decoder
from baton.engine.random_model import Shape, make_model
from baton.kernels.batch import RowSpan
from baton.kernels.native_build import COMPILERS
from torch import Tensor

BLOCK, NUM_BLOCKS = 8, 16
SHAPE = Shape(hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=128, vocab_size=300, head_dim=32)
ROWS = [  # a chunk behind a prefix, a decode row, a fresh prompt
    RowSpan(0, 21, 11, (3, 1, 8, 14)),
    RowSpan(21, 1, 18, (0, 12, 5), clear_tail=False),
    RowSpan(22, 9, 0, (7, 2)),
]


def load(folder: Path, family: str, dtype: str, shape: Shape = SHAPE) -> Decoder:
    make_model(folder, shape, family, seed=5, dtype=dtype, max_model_len=256)
    try:
        model = load_model(folder, dtype, kernels="native", threads=2)
    except ModelError as error:
        if any(name in str(error) for name in COMPILERS):
            pytest.skip(str(error))
        raise
    assert isinstance(model, Decoder)
    return model


def run(model: Decoder, dtype: str) -> tuple[Tensor, Tensor]:
    """Logits of two sampled tokens, and the pool afterwards."""
    layout = kv_layout(model.config, BLOCK, dtype)
    kv = kv_tensor(bytearray(NUM_BLOCKS * layout.block_bytes), layout, NUM_BLOCKS)
    kv.copy_(torch.randn(kv.shape, generator=torch.Generator().manual_seed(1)))
    tokens = torch.arange(31) * 7 % 300
    positions = torch.cat([torch.arange(row.start, row.end) for row in ROWS])
    with torch.inference_mode():
        return model.forward(tokens, positions, model.kernels.attention(kv, ROWS), torch.tensor([21, 30])), kv


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stack_gives_the_bits_of_its_layers(family: str, dtype: str, tmp_path: Path) -> None:
    model = load(tmp_path, family, dtype)
    if dtype == "bfloat16" and model.stack is None:
        pytest.skip("this processor's bfloat16 products are left to torch")
    assert model.stack is not None
    together, apart = run(model, dtype), run(replace(model, stack=None), dtype)
    assert torch.equal(together[0], apart[0])
    assert torch.equal(together[1], apart[1])


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_other_layers_are_left_apart(family: str, tmp_path: Path) -> None:
    assert load(tmp_path, family, "float32").stack is None


@pytest.mark.parametrize("shape", [replace(SHAPE, num_layers=1), replace(SHAPE, intermediate_size=80)])
def test_shapes_that_gain_nothing_or_do_not_fit_are_left_apart(shape: Shape, tmp_path: Path) -> None:
    model = load(tmp_path, "llama", "float32", shape)
    assert model.stack is None
    assert torch.isfinite(run(model, "float32")[0]).all()
