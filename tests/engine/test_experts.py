"""Routed experts against a plain loop over tokens, and what config.json may say of them. Whole models: `test_families`."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from baton.core.errors import ModelError
from baton.engine.experts_config import ExpertsConfig
from baton.engine.loader import load_config, load_model
from baton.engine.model.experts import Expert, RoutedMLP
from baton.engine.parallel import ParallelContext
from baton.kernels.reference import GATES, silu_mul
from baton.tests.engine.model_rig import ThreadedContext
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

HIDDEN, INNER, EXPERTS = 24, 16, 6


@dataclass(frozen=True)
class RowLinear:
    """A linear whose rows are computed alone, as those of a batch-invariant backend are."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([self.weight @ row for row in x]) if len(x) else x.new_empty(0, len(self.weight))

    def gated(self, activation: str, x: Tensor) -> Tensor:
        return GATES[activation](self(x))

    def rows(self, index: Tensor) -> Tensor:
        return self.weight[index]


def make_mlp(num_chosen: int = 2, normalized: bool = True, parallel: ParallelContext = ParallelContext()) -> RoutedMLP:
    """This rank's share of one fixed routed MLP."""
    generator = torch.Generator().manual_seed(4)
    inner = parallel.share(INNER, "columns")
    columns = slice(inner.start, inner.stop)

    def random_weight(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=generator) / inputs**0.5

    experts = []
    for _ in range(EXPERTS):
        gate, up, down = random_weight(INNER, HIDDEN), random_weight(INNER, HIDDEN), random_weight(HIDDEN, INNER)
        experts.append(Expert(RowLinear(torch.cat([gate[columns], up[columns]])), RowLinear(down[:, columns])))
    return RoutedMLP(RowLinear(random_weight(EXPERTS, HIDDEN)), tuple(experts), "silu", num_chosen, normalized, parallel)


def one_by_one(mlp: RoutedMLP, x: Tensor) -> Tensor:
    """The definition: each token through its likeliest experts."""
    rows = []
    for token in x:
        probabilities = torch.softmax(mlp.router(token[None])[0], dim=0)
        chosen = probabilities.argsort(descending=True)[: mlp.num_chosen].tolist()
        scale = float(probabilities[chosen].sum()) if mlp.normalized else 1.0
        made = [mlp.experts[i].down(silu_mul(mlp.experts[i].gate_up(token[None])))[0] * probabilities[i] / scale for i in chosen]
        rows.append(torch.stack(made).sum(0))
    return torch.stack(rows) if rows else x


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("num_chosen", [1, 2, EXPERTS])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 33])
def test_tokens_go_through_their_likeliest_experts(num_tokens: int, num_chosen: int, normalized: bool) -> None:
    mlp = make_mlp(num_chosen, normalized)
    x = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens))
    torch.testing.assert_close(mlp(x), one_by_one(mlp, x))


def test_experts_without_tokens_are_not_run() -> None:
    mlp = make_mlp()
    x = torch.randn(1, HIDDEN)
    used = set(mlp.route(x)[1].flatten().tolist())

    @dataclass(frozen=True)
    class Idle(RowLinear):
        def __call__(self, x: Tensor) -> Tensor:
            pytest.fail("an expert that no token chose was run")

    idle = Expert(Idle(torch.empty(0)), Idle(torch.empty(0)))
    experts = tuple(expert if index in used else idle for index, expert in enumerate(mlp.experts))
    alone = RoutedMLP(mlp.router, experts, "silu", mlp.num_chosen, mlp.normalized, mlp.parallel)
    assert torch.equal(alone(x), mlp(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_depend_on_the_other_tokens(dtype: torch.dtype) -> None:
    mlp = make_mlp(num_chosen=4)
    experts = tuple(Expert(RowLinear(e.gate_up.weight.to(dtype)), RowLinear(e.down.weight.to(dtype))) for e in mlp.experts)
    mlp = RoutedMLP(RowLinear(mlp.router.weight.to(dtype)), experts, "silu", 4, True, mlp.parallel)
    x = torch.randn(40, HIDDEN).to(dtype)
    alone = torch.cat([mlp(x[i : i + 1]) for i in range(40)])
    rng = random.Random(2)
    for size in (2, 7, 23, 40):
        batch = rng.sample(range(40), size)
        assert torch.equal(mlp(x[batch]), alone[batch])


def test_two_ranks_hold_half_of_every_expert() -> None:
    x = torch.randn(9, HIDDEN)
    barrier, parts = threading.Barrier(2), {}
    results: dict[int, Tensor] = {}

    def run(rank: int) -> None:
        results[rank] = make_mlp(parallel=ThreadedContext(rank, 2, barrier=barrier, parts=parts))(x)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank in range(2):
        torch.testing.assert_close(results[rank], make_mlp()(x))


# ---- model folders -------------------------------------------------------------------------------

SHAPE: dict[str, object] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}


def save_mixtral(folder: Path, **settings: object) -> MixtralForCausalLM:
    torch.manual_seed(3)
    model = MixtralForCausalLM(MixtralConfig(**{**SHAPE, "intermediate_size": 40, "num_local_experts": 4} | settings)).eval()
    model.save_pretrained(folder)
    return model


def save_qwen3_moe(folder: Path, **settings: object) -> Qwen3MoeForCausalLM:
    torch.manual_seed(3)
    experts = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "intermediate_size": 48, "head_dim": 16}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SHAPE, **experts} | settings)).eval()
    model.save_pretrained(folder)
    return model


def test_what_is_read_of_mixtral(tmp_path: Path) -> None:
    save_mixtral(tmp_path, num_experts_per_tok=3, sliding_window=20)
    config = load_config(tmp_path)
    assert config.experts == ExpertsConfig(num_experts=4, num_chosen=3, inner_size=40, normalized=True)
    assert config.windows == (20, 20, 20)
    set_keys(tmp_path, num_local_experts=None, num_experts_per_tok=None, sliding_window=None, rope_parameters=None)
    config = load_config(tmp_path)
    assert config.experts == ExpertsConfig(num_experts=8, num_chosen=2, inner_size=40, normalized=True)
    assert config.windows == ()
    assert config.rope is not None
    assert config.rope.theta == 1e6


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({}, set()),
        ({"mlp_only_layers": [0, 2]}, {0, 2}),
        ({"decoder_sparse_step": 2}, {0, 2}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, {0, 1, 2}),
    ],
)
def test_which_layers_of_qwen3_moe_are_dense(tmp_path: Path, settings: dict[str, object], dense: set[int]) -> None:
    model = save_qwen3_moe(tmp_path, norm_topk_prob=True, **settings)
    config = load_config(tmp_path)
    assert config.experts == ExpertsConfig(6, 3, inner_size=24, normalized=True, dense_layers=frozenset(dense))
    assert config.intermediate_size == 48
    assert {index for index, layer in enumerate(model.model.layers) if not hasattr(layer.mlp, "experts")} == dense
    set_keys(tmp_path, num_local_experts=None, num_experts=6)  # as it was spelt before transformers 5
    assert load_config(tmp_path) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts_per_tok": 7}, r"num_experts_per_tok is 7; it must be at most num_local_experts \(6\)"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"moe_intermediate_size": "24"}, "moe_intermediate_size is '24'"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3; it must be a list of whole numbers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be true or false"),
        ({"num_local_experts": 5}, r"mlp.gate.weight has shape \[6, 32\]; config.json asks for \[5, 32\]"),
        ({"moe_intermediate_size": 40}, r"experts.0.gate_proj.weight has shape \[24, 32\]; config.json asks for \[40, 32\]"),
        ({"mlp_only_layers": [1]}, r"model.layers.1.mlp.gate_proj.weight is missing; it must have shape \[48, 32\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, values: dict[str, object], message: str) -> None:
    save_qwen3_moe(tmp_path)
    set_keys(tmp_path, **values)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_ranks_must_divide_the_experts(tmp_path: Path) -> None:
    save_mixtral(tmp_path, intermediate_size=35, num_key_value_heads=2)
    with pytest.raises(ModelError, match="35 columns of each expert cannot be split over 2 tensor-parallel ranks"):
        load_model(tmp_path, parallel=ParallelContext(0, 2))


def set_keys(folder: Path, **values: object) -> None:
    """Set keys of config.json; None removes one."""
    file = folder / "config.json"
    changed = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
