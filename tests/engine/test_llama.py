"""The Llama runner against transformers, token for token, however the work is cut into steps."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from baton.core.kv import KVLayout
from baton.core.request import Attempt, SamplingParams
from baton.core.step import StepPlan, StepRow
from baton.engine.cache import kv_layout, kv_tensor
from baton.engine.executor import TorchExecutor
from baton.engine.loader import load_model
from baton.engine.model.interface import CausalModel
from baton.engine.model_config import RopeConfig
from baton.engine.random_model import Shape, make_model
from baton.kernels.batch import RowSpan
from baton.tests.engine.model_rig import ThreadedContext
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

LIMIT = 96  # positions of the test model
BLOCK = 8
SHAPE = Shape(hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=96, vocab_size=512, head_dim=16)
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("llama")
    make_model(out, SHAPE, dtype="float32", max_model_len=LIMIT)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> CausalModel:
    return load_model(folder, "float32")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def expected_tokens(oracle: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by transformers, recomputed from scratch for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(oracle(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.inference_mode()
def logits_of(model: CausalModel, tokens: list[int], kv: Tensor, table: list[int]) -> Tensor:
    """Logits after every token of one prompt [T, V]."""
    attention = model.kernels.attention(kv, [RowSpan(0, len(tokens), 0, tuple(table))])
    positions = torch.arange(len(tokens))
    return model.forward(torch.tensor(tokens), positions, attention, positions)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(SHAPE.vocab_size), k=length)


@dataclass
class Running:
    """One sequence in the hands of `Driver`."""

    attempt: Attempt
    known: list[int]
    table: tuple[int, ...]
    num_prompt: int
    computed: int = 0

    @property
    def output(self) -> list[int]:
        return self.known[self.num_prompt :]


@dataclass
class Driver:
    """A minimal scheduler: shuffled blocks, chunks of at most `chunk` tokens."""

    model: CausalModel
    executor: TorchExecutor
    layout: KVLayout
    free: list[int]
    chunk: int = 1000
    step: int = 0
    sequences: list[Running] = field(default_factory=list)

    def add(self, prompt: list[int], shared: tuple[int, ...] = ()) -> Running:
        blocks = self.layout.num_blocks_for(LIMIT) - len(shared)
        table = shared + tuple(self.free.pop() for _ in range(blocks))
        attempt = Attempt(f"r{len(self.sequences)}", 1)
        sequence = Running(attempt, list(prompt), table, len(prompt), len(shared) * self.layout.block_size)
        self.sequences.append(sequence)
        return sequence

    def run(self, *sequences: Running) -> None:
        """One step over these sequences, each with as much as it has to compute."""
        self.step += 1
        rows = []
        for s in sequences:
            tokens = tuple(s.known[s.computed : s.computed + self.chunk])
            last = s.computed + len(tokens) == len(s.known)
            rows.append(StepRow(s.attempt, s.computed, tokens, s.table, GREEDY, len(s.output), last))
        output = self.executor.submit(StepPlan(self.step, tuple(rows))).result(60)
        for s, row, made in zip(sequences, rows, output.rows, strict=True):
            s.computed = row.end
            s.known += made.tokens
            assert len(made.tokens) == row.sample

    def finish(self, sequence: Running, count: int) -> list[int]:
        while len(sequence.output) < count:
            self.run(sequence)
        return sequence.output


@pytest.fixture
def driver(model: CausalModel) -> Iterator[Driver]:
    made = make_driver(model)
    yield made
    made.executor.close()


def make_driver(model: CausalModel, dtype: str = "float32", fill: float = float("nan")) -> Driver:
    """The pool starts full of NaN: whatever is not written must not be seen."""
    layout = kv_layout(model.config, BLOCK, dtype)
    num_blocks = 160
    kv = kv_tensor(bytearray(num_blocks * layout.block_bytes), layout, num_blocks).fill_(fill)
    free = list(range(num_blocks))
    random.Random(1).shuffle(free)
    return Driver(model, TorchExecutor(model, kv, layout), layout, free)


@pytest.mark.parametrize("chunk", [1, 5, 8, 1000])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 50, LIMIT - 1, LIMIT])
def test_greedy_equals_transformers(driver: Driver, oracle: LlamaForCausalLM, length: int, chunk: int) -> None:
    driver.chunk = chunk
    prompt = prompt_of(length, seed=length)
    count = min(10, LIMIT - length + 1)
    assert driver.finish(driver.add(prompt), count) == expected_tokens(oracle, prompt, count)


def test_mixed_batches_of_chunks_and_decode_rows(driver: Driver, oracle: LlamaForCausalLM) -> None:
    driver.chunk = 6
    rng = random.Random(5)
    prompts = [prompt_of(length, seed=length) for length in (1, 3, 17, 24, 40, 61, 70)]
    waiting = [driver.add(prompt) for prompt in prompts]
    active: list[Running] = []
    while waiting or active:
        if waiting:
            active.append(waiting.pop(0))
        driver.run(*rng.sample(active, rng.randint(1, len(active))))
        active = [s for s in active if len(s.output) < 12]
    for sequence, prompt in zip(driver.sequences, prompts, strict=True):
        assert sequence.output == expected_tokens(oracle, prompt, 12)


@pytest.mark.parametrize("num_shared", [1, 3])
def test_prefix_in_the_cache_is_used(driver: Driver, oracle: LlamaForCausalLM, num_shared: int) -> None:
    driver.chunk = 10
    prompt = prompt_of(40)
    first = driver.add(prompt)
    driver.finish(first, 1)
    other = prompt[: num_shared * BLOCK] + prompt_of(13, seed=9)
    second = driver.add(other, shared=first.table[:num_shared])
    assert driver.finish(second, 8) == expected_tokens(oracle, other, 8)
    assert driver.finish(first, 8) == expected_tokens(oracle, prompt, 8)


def test_logits_are_those_of_transformers(model: CausalModel, oracle: LlamaForCausalLM, driver: Driver) -> None:
    prompt = prompt_of(LIMIT)
    sequence = driver.add(prompt)
    kv = torch.zeros(160, *(SHAPE.num_layers, 2, SHAPE.num_kv_heads, BLOCK, SHAPE.head_dim))
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(logits_of(model, prompt, kv, list(sequence.table)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.06), ("float16", 0.008)])
def test_half_precision_is_as_near_as_it_can_be(folder: Path, dtype: str, tolerance: float) -> None:
    prompt = prompt_of(LIMIT)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
    ours = load_model(folder, dtype)
    layout = kv_layout(ours.config, BLOCK, dtype)
    kv = kv_tensor(bytearray(12 * layout.block_bytes), layout, 12)
    with torch.inference_mode():
        reference = exact(torch.tensor([prompt])).logits[0]
        scale = float(reference.std())
        their_error = float((theirs(torch.tensor([prompt])).logits[0].float() - reference).std()) / scale
    our_error = float((logits_of(ours, prompt, kv, list(range(12))).float() - reference).std()) / scale
    assert our_error < tolerance
    assert our_error < 1.3 * their_error


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_decodes_what_it_prefills(folder: Path, dtype: str) -> None:
    """Decode rows, alone and in groups of unequal length, follow the same logits as a prefill of the same tokens."""
    model = load_model(folder, dtype)
    driver = make_driver(model, dtype)
    sequences = [driver.add(prompt_of(length, seed=length)) for length in (5, 20, 33)]
    while len(sequences[0].output) < 9:
        driver.run(*sequences)
    kv = torch.zeros(12, SHAPE.num_layers, 2, SHAPE.num_kv_heads, BLOCK, SHAPE.head_dim, dtype=getattr(torch, dtype))
    for s in sequences:
        logits = logits_of(model, s.known, kv, list(range(12))).float()
        for position, token in enumerate(s.known[s.num_prompt :], s.num_prompt - 1):
            assert logits[position, token] > logits[position].max() - 0.15
    driver.executor.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 48,
            }
        },
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"head_dim": 24, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    ],
    ids=["linear", "llama3", "biases", "tied-mha", "mqa"],
)
def test_variants_saved_by_transformers(tmp_path: Path, settings: dict[str, object]) -> None:
    torch.manual_seed(3)
    shape: dict[str, object] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": SHAPE.vocab_size,
        "max_position_embeddings": LIMIT,
        "initializer_range": 0.15,
    }
    oracle = LlamaForCausalLM(LlamaConfig(**(shape | settings))).eval()
    for name, parameter in oracle.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    oracle.save_pretrained(tmp_path)
    driver = make_driver(load_model(tmp_path, "float32"))
    driver.chunk = 30
    prompt = prompt_of(75)
    assert driver.finish(driver.add(prompt), 15) == expected_tokens(oracle, prompt, 15)
    driver.executor.close()


def test_llama3_scaling_written_by_make_model(tmp_path: Path) -> None:
    rope = RopeConfig("llama3", 500.0, 4.0, 1.0, 4.0, 32)
    assert make_model(tmp_path, SHAPE, dtype="float32", max_model_len=LIMIT, rope=rope).rope == rope
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    driver = make_driver(load_model(tmp_path, "float32"))
    prompt = prompt_of(60)
    assert driver.finish(driver.add(prompt), 8) == expected_tokens(oracle, prompt, 8)
    driver.executor.close()


def test_reference_kernels_agree(folder: Path, model: CausalModel) -> None:
    plain = load_model(folder, "float32", kernels="reference")
    prompt = prompt_of(20)
    outputs = []
    for each in (plain, model):
        driver = make_driver(each)
        driver.chunk = 9
        sequences = [driver.add(prompt), driver.add(prompt_of(3))]
        while len(sequences[0].output) < 4:
            driver.run(*sequences)
        outputs.append([s.output for s in sequences])
        driver.executor.close()
    assert outputs[0] == outputs[1]


def test_two_tensor_parallel_ranks_give_the_same_logits(folder: Path, model: CausalModel) -> None:
    prompt = prompt_of(30)
    barrier, parts = threading.Barrier(2), {}
    results: dict[int, Tensor] = {}

    def run(rank: int) -> None:
        parallel = ThreadedContext(rank, 2, barrier=barrier, parts=parts)
        shard = load_model(folder, "float32", parallel)
        layout = kv_layout(shard.config, BLOCK, "float32", parallel)
        assert (layout.num_kv_heads, layout.first_head) == (1, rank)
        kv = kv_tensor(bytearray(4 * layout.block_bytes), layout, 4)
        results[rank] = logits_of(shard, prompt, kv, [2, 0, 3, 1])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    kv = torch.zeros(4, SHAPE.num_layers, 2, SHAPE.num_kv_heads, BLOCK, SHAPE.head_dim)
    whole = logits_of(model, prompt, kv, [0, 1, 2, 3])
    for rank in range(2):
        torch.testing.assert_close(results[rank], whole, rtol=1e-4, atol=1e-4)
