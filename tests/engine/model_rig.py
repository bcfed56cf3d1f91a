"""Tiny models made by transformers, and a whole engine without sockets that serves them: scheduler, executor, pool."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from baton.core.request import Attempt, SamplingParams, SequenceSpec
from baton.core.step import ComputedEvent, TokenEvent
from baton.engine.blocks import BlockPool
from baton.engine.cache import kv_layout, kv_tensor
from baton.engine.executor import TorchExecutor
from baton.engine.model.interface import CausalModel
from baton.engine.parallel import ParallelContext
from baton.engine.scheduler import Scheduler, SchedulerConfig
from baton.kernels.batch import RowSpan
from baton.policy.ordering import ORDERING
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

BLOCK, NUM_BLOCKS = 8, 64


def make_oracle(config: PreTrainedConfig, folder: Path, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, saved to `folder`. Norms and biases are random too, and matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.3, std=0.3)
        elif "embed" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        else:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def oracle_logits(oracle: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """[T, V]"""
    return oracle(torch.tensor([list(tokens)])).logits[0]


def expected_tokens(oracle: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy continuation by transformers, recomputed from scratch for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(oracle_logits(oracle, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def prompt_of(length: int, seed: int = 0, vocab_size: int = 128) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(vocab_size), k=length))


@torch.inference_mode()
def logits_of(model: CausalModel, tokens: Sequence[int], chunk: int = 1000, dtype: str = "float32") -> Tensor:
    """Logits after every token [T, V], computed in chunks over a shuffled table in a pool of NaN."""
    layout = kv_layout(model.config, BLOCK, dtype, model.parallel)
    kv = kv_tensor(bytearray(NUM_BLOCKS * layout.block_bytes), layout, NUM_BLOCKS).fill_(float("nan"))
    table = tuple(random.Random(3).sample(range(NUM_BLOCKS), NUM_BLOCKS))
    parts = []
    for start in range(0, len(tokens), chunk):
        fed = torch.tensor(list(tokens[start : start + chunk]))
        row = RowSpan(0, len(fed), start, table[: layout.num_blocks_for(start + len(fed))])
        positions = torch.arange(start, start + len(fed))
        attention = model.kernels.attention(kv, [row])
        parts.append(model.forward(fed, positions, attention, torch.arange(len(fed))).clone())
    return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class ThreadedContext(ParallelContext):
    """Two ranks as two threads: all_reduce meets at a barrier and sums."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    parts: dict[int, Tensor] = field(default_factory=dict)

    def all_reduce(self, x: Tensor) -> Tensor:
        self.parts[self.rank] = x
        self.barrier.wait(30)
        total = self.parts[0] + self.parts[1]
        self.barrier.wait(30)
        return total


class Engine:
    """A worker's engine over a pool that starts full of NaN: whatever is not written must not be seen."""

    def __init__(self, model: CausalModel, max_step_tokens: int = 1000) -> None:
        self.layout = kv_layout(model.config, BLOCK, "float32")
        self.kv = kv_tensor(bytearray(NUM_BLOCKS * self.layout.block_bytes), self.layout, NUM_BLOCKS).fill_(float("nan"))
        self.blocks = BlockPool(NUM_BLOCKS, BLOCK)
        config = SchedulerConfig(max_step_tokens, 8, model.max_model_len)
        self.scheduler = Scheduler(self.blocks, config, ORDERING["fcfs"])
        self.executor = TorchExecutor(model, self.kv, self.layout)
        self.outputs: dict[Attempt, list[int]] = {}
        self.computed: dict[Attempt, ComputedEvent] = {}
        self.num_steps = self.num_fed = 0

    def add(self, name: str, prompt: Sequence[int], max_tokens: int, hand_over: bool = False) -> SequenceSpec:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        spec = SequenceSpec(Attempt(name, 1), tuple(prompt), sampling, hand_over=hand_over)
        self.outputs[spec.attempt] = []
        self.scheduler.add(spec, 0.0)
        return spec

    def land(self, source: Engine, spec: SequenceSpec) -> None:
        """Take over a prefilled sequence: the bytes of its blocks are copied into other blocks, then it decodes here."""
        computed, output = source.computed[spec.attempt], source.outputs[spec.attempt]
        fresh = self.blocks.allocate(len(computed.blocks))
        assert fresh is not None
        for mine, theirs in zip(fresh, computed.blocks, strict=True):
            self.kv[mine] = source.kv[theirs]
        source.scheduler.release(spec.attempt)
        taken = SequenceSpec(spec.attempt, spec.prompt, spec.sampling)
        self.outputs[spec.attempt] = list(output)
        self.scheduler.adopt(taken, fresh, output[0], 0.0)

    def run(self) -> None:
        """Steps until nothing is left to do."""
        while (plan := self.scheduler.plan(0.0)) is not None:
            self.num_steps += 1
            self.num_fed += plan.num_tokens
            for event in self.scheduler.commit(plan, self.executor.submit(plan).result(60), 0.0):
                if isinstance(event, TokenEvent):
                    self.outputs[event.attempt] += event.tokens
                if isinstance(event, ComputedEvent):
                    self.computed[event.attempt] = event

    def close(self) -> None:
        self.executor.close()
