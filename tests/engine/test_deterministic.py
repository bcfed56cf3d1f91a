"""`deterministic: true`: a request is served to the bit alike, alone and in any company, undisturbed and interrupted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from baton.core.errors import ModelError
from baton.core.request import Attempt, SamplingParams, SequenceSpec, TokenLogprob
from baton.core.step import PreemptedEvent, TokenEvent
from baton.engine.blocks import BlockPool
from baton.engine.cache import kv_layout, kv_tensor
from baton.engine.executor import TorchExecutor
from baton.engine.loader import load_model
from baton.engine.model.interface import CausalModel
from baton.engine.random_model import Shape, make_model
from baton.engine.scheduler import Scheduler, SchedulerConfig
from baton.kernels.native_build import COMPILERS
from baton.policy.ordering import ORDERING

BLOCK = 8
SHAPE = Shape(hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=128, vocab_size=300, head_dim=32)
PROMPT = tuple(3 + i * 7 % 250 for i in range(53))
SAMPLING = SamplingParams(temperature=1.3, top_p=0.95, seed=11, max_tokens=24, logprobs=3)
Served = list[tuple[int, TokenLogprob]]


@pytest.fixture(
    scope="module", params=[("llama", "bfloat16"), ("llama", "float32"), ("gemma2", "bfloat16"), ("qwen3_moe", "bfloat16")]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    family, dtype = request.param
    folder: Path = tmp_path_factory.mktemp(family)
    make_model(folder, SHAPE, family, seed=5, dtype=dtype, max_model_len=256)
    try:
        return load_model(folder, dtype, kernels="native", threads=2, deterministic=True)
    except ModelError as error:
        if any(name in str(error) for name in COMPILERS):
            pytest.skip(str(error))
        raise


def serve(
    model: CausalModel, seed: int, company: int, step_tokens: int = 1000, num_blocks: int = 64, known: Served | None = None
) -> Served:
    """The request beside `company` others of random lengths, in chunks of up to `step_tokens`; `known` was sampled elsewhere."""
    known = known or []
    layout = kv_layout(model.config, BLOCK, model.config.dtype)
    kv = kv_tensor(bytearray(num_blocks * layout.block_bytes), layout, num_blocks).fill_(float("nan"))
    scheduler = Scheduler(BlockPool(num_blocks, BLOCK), SchedulerConfig(step_tokens, 16, model.max_model_len), ORDERING["fcfs"])
    executor = TorchExecutor(model, kv, layout)
    draw = random.Random(seed)
    names = [f"other-{i}" for i in range(company)]
    specs = [
        SequenceSpec(
            Attempt(name, 1),
            tuple(draw.choices(range(300), k=draw.randint(1, 90))),
            SamplingParams(max_tokens=draw.randint(1, 40)),
        )
        for name in names
    ]
    mine = SequenceSpec(Attempt("mine", 1), PROMPT, SAMPLING, tuple(token for token, _ in known))
    specs.insert(draw.randint(0, company), mine)
    served = list(known)
    for spec in specs:
        scheduler.add(spec, 0.0)
        for _ in range(draw.randint(0, 3)):
            _step(scheduler, executor, served)
    while _step(scheduler, executor, served):
        pass
    executor.close()
    return served


def _step(scheduler: Scheduler, executor: TorchExecutor, served: Served) -> bool:
    plan = scheduler.plan(0.0)
    assert not any(isinstance(event, PreemptedEvent) for event in scheduler.take_events())
    if plan is None:
        return False
    for event in scheduler.commit(plan, executor.submit(plan).result(60), 0.0):
        if isinstance(event, TokenEvent) and event.attempt.request_id == "mine":
            served += zip(event.tokens, event.logprobs, strict=True)
    return True


def test_alone_in_company_in_chunks_and_resumed(model: CausalModel) -> None:
    alone = serve(model, 0, 0)
    assert len(alone) == SAMPLING.max_tokens
    assert len({token for token, _ in alone}) > 5
    for seed in range(1, 5):
        assert serve(model, seed, 5) == alone
    assert serve(model, 5, 3, step_tokens=17) == alone
    assert serve(model, 6, 5, step_tokens=40, num_blocks=26) == alone  # others and this one are preempted
    for given in (1, 9, 23):  # after the death of a decode worker: prompt and tokens are prefilled
        assert serve(model, given, 2, known=alone[:given]) == alone


def test_half_precision_without_native_linears_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "m", SHAPE, "llama", dtype="float16", max_model_len=64)
    with pytest.raises(ModelError, match="deterministic results are not to be had in float16; use bfloat16 or float32"):
        load_model(tmp_path / "m", "float16", deterministic=True)
