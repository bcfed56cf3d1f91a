"""Every family against transformers: logits of whole prompts, and greedy tokens however the work is cut.

Prompts are longer than the windows. The models are tiny and random, their norms and biases too.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from baton.core.errors import ModelError, Unavailable
from baton.engine.loader import load_model
from baton.engine.model.interface import CausalModel
from baton.engine.parallel import ParallelContext
from baton.tests.engine.model_rig import (
    Engine,
    ThreadedContext,
    expected_tokens,
    logits_of,
    make_oracle,
    oracle_logits,
    prompt_of,
)
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

LIMIT, WINDOW = 96, 20
SIZES: dict[str, object] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LIMIT,
    "pad_token_id": None,
}
GEMMA = SIZES | {"head_dim": 64, "query_pre_attn_scalar": 40, "sliding_window": WINDOW}
OPT: dict[str, object] = {key: SIZES[key] for key in SIZES if key not in ("intermediate_size", "num_key_value_heads")} | {
    "ffn_dim": 80
}
EXPERTS = SIZES | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 24}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rotary(**settings: object) -> LlamaConfig:
    return LlamaConfig(**SIZES, rope_parameters=settings)


# What serves in all ways; of these, layers, biases, norms, windows and tied heads differ.
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW, head_dim=80),
    "mixtral": MixtralConfig(**SIZES, sliding_window=WINDOW, num_local_experts=4),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=128),
    "qwen3-moe": Qwen3MoeConfig(**EXPERTS, head_dim=64, norm_topk_prob=True, mlp_only_layers=[1]),
    "gemma2": Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(**GEMMA, layer_types=LAYERS),
    "opt": OPTConfig(**OPT),
    "opt-350m": OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=48),
}
# Settings that change numbers, and nothing of how work is cut.
VARIANTS: dict[str, PreTrainedConfig] = {
    "linear": rotary(rope_type="linear", rope_theta=5000.0, factor=2.5),
    "dynamic": rotary(rope_type="dynamic", rope_theta=5000.0, factor=4.0),
    "yarn": rotary(**YARN),
    "yarn-mscale": rotary(**YARN, beta_fast=8, beta_slow=2, mscale=0.7, mscale_all_dim=0.4, truncate=False),
    "yarn-attention": rotary(**YARN, attention_factor=1.7),
    "llama3": rotary(**LLAMA3, original_max_position_embeddings=48),
    "mistral-null": MistralConfig(**SIZES, sliding_window=None),
    "qwen2-no-window": Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=WINDOW, max_window_layers=0),
    "qwen3-bias-tied": Qwen3Config(**SIZES, head_dim=64, attention_bias=True, tie_word_embeddings=True),
    "mixtral-one": MixtralConfig(**SIZES, num_experts_per_tok=1, tie_word_embeddings=True),
    "qwen3-moe-window": Qwen3MoeConfig(**EXPERTS, use_sliding_window=True, sliding_window=WINDOW, attention_bias=True),
    "qwen3-moe-sparse-step": Qwen3MoeConfig(**EXPERTS | {"num_experts_per_tok": 5}, decoder_sparse_step=2),
    "gemma2-256": Gemma2Config(**GEMMA | {"head_dim": 256}, attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3-scaled": Gemma3TextConfig(
        **GEMMA,
        layer_types=LAYERS,
        final_logit_softcapping=2.0,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 800.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 60.0},
        },
    ),
    "opt-plain": OPTConfig(**OPT, enable_bias=False, activation_function="gelu", tie_word_embeddings=False),
}


@dataclass(frozen=True)
class Subject:
    folder: Path
    oracle: PreTrainedModel
    model: CausalModel


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, folders: Path) -> Subject:
    folder = folders / request.param
    return Subject(folder, make_oracle(FAMILIES[request.param], folder), load_model(folder, "float32"))


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Within 3e-5 of the logits' size: what is required is 1e-4, and a wrong epsilon shows at 3e-5."""
    size = float(expected.abs().max())
    assert 0.5 < size < 100
    assert float((got - expected).abs().max()) < 3e-5 * size


def test_logits_of_a_whole_prompt_and_of_chunks(subject: Subject) -> None:
    prompt = prompt_of(LIMIT)
    expected = oracle_logits(subject.oracle, prompt)
    assert_near(logits_of(subject.model, prompt), expected)
    assert_near(logits_of(subject.model, prompt, chunk=13), expected)
    assert_near(logits_of(subject.model, prompt, chunk=1), expected)


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_logits_of_other_kernels(subject: Subject, kernels: str) -> None:
    prompt = prompt_of(40)
    try:
        model = load_model(subject.folder, "float32", kernels=kernels)
    except Unavailable as error:
        pytest.skip(str(error))
    assert_near(logits_of(model, prompt, chunk=30), oracle_logits(subject.oracle, prompt))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_variants(name: str, tmp_path: Path) -> None:
    oracle = make_oracle(VARIANTS[name], tmp_path)
    prompt = prompt_of(LIMIT)
    assert_near(logits_of(load_model(tmp_path, "float32"), prompt, chunk=40), oracle_logits(oracle, prompt))


def test_served_in_chunks_and_with_prefix_hits(subject: Subject) -> None:
    engine = Engine(subject.model, max_step_tokens=17)
    prompts = {f"r{length}": prompt_of(length, seed=length) for length in (1, 23, 64)}
    prompts["hit"] = prompts["r64"][:41] + prompt_of(9, seed=1)
    specs = {name: engine.add(name, prompt, 6) for name, prompt in prompts.items() if name != "hit"}
    engine.run()
    fed = engine.num_fed
    specs["hit"] = engine.add("hit", prompts["hit"], 6)
    engine.run()
    assert engine.num_fed - fed == 50 - 40 + 5  # five blocks of eight were not computed again
    for name, prompt in prompts.items():
        assert engine.outputs[specs[name].attempt] == expected_tokens(subject.oracle, prompt, 6)
    engine.close()


def test_served_across_a_handoff(subject: Subject) -> None:
    prefill, decode = Engine(subject.model, max_step_tokens=24), Engine(subject.model)
    prompts = [prompt_of(length, seed=length) for length in (5, 37, 70)]
    specs = [prefill.add(f"r{i}", prompt, 12, hand_over=True) for i, prompt in enumerate(prompts)]
    prefill.run()
    for spec in specs:
        decode.land(prefill, spec)
    assert prefill.blocks.num_free == prefill.blocks.num_blocks
    prefill.kv.fill_(float("nan"))
    decode.run()
    for spec, prompt in zip(specs, prompts, strict=True):
        assert decode.outputs[spec.attempt] == expected_tokens(subject.oracle, prompt, 12)
    prefill.close()
    decode.close()


def test_two_ranks_give_the_same_logits(subject: Subject) -> None:
    prompt = prompt_of(40)
    barrier, parts = threading.Barrier(2), {}
    results: dict[int, Tensor] = {}

    def run(rank: int) -> None:
        results[rank] = logits_of(
            load_model(subject.folder, "float32", ThreadedContext(rank, 2, barrier=barrier, parts=parts)), prompt
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = oracle_logits(subject.oracle, prompt)
    assert_near(results[0], expected)
    assert_near(results[1], expected)
    with pytest.raises(ModelError, match="cannot be split over 3 tensor-parallel ranks"):
        load_model(subject.folder, "float32", ParallelContext(0, 3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_near_as_that_of_transformers(subject: Subject, dtype: str) -> None:
    prompt = prompt_of(LIMIT)
    exact = oracle_logits(subject.oracle, prompt)
    half = type(subject.oracle).from_pretrained(subject.folder, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
    their_error = error_of(oracle_logits(half, prompt), exact)
    model = load_model(subject.folder, dtype)
    assert error_of(logits_of(model, prompt, dtype=dtype), exact) < 1.4 * their_error


def error_of(logits: Tensor, exact: Tensor) -> float:
    """That of most positions: where two experts are nearly as likely, rounding may choose another one, here or there."""
    return float((logits.float() - exact).std(dim=1).median())
