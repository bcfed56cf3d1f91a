"""The executor: plans in, outputs out, one after the other on one thread, failures through the future."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from baton.core.errors import InternalError
from baton.core.request import Attempt, SamplingParams
from baton.core.step import RowOutput, StepPlan, StepRow
from baton.engine import executor as executor_module
from baton.engine.cache import kv_layout, kv_tensor
from baton.engine.executor import Executor, TorchExecutor
from baton.engine.loader import load_model
from baton.engine.model.interface import CausalModel
from baton.engine.random_model import Shape, make_model
from baton.kernels.interface import PagedAttention
from baton.kernels.table import Kernels
from torch import Tensor

LIMIT, BLOCK, NUM_BLOCKS = 64, 8, 20
SHAPE = Shape(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=48, vocab_size=300, head_dim=16)
GREEDY = SamplingParams(temperature=0.0)
PROMPT = tuple(range(10, 27))
TABLE = (7, 3, 11, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    make_model(out, SHAPE, dtype="float32", max_model_len=LIMIT)
    return out


@dataclass(frozen=True, slots=True)
class Watched:
    """A model that can be held at the start of a step, and that says which rows reach its head."""

    inner: CausalModel
    gate: threading.Event
    sampled: list[list[int]] = field(default_factory=list)
    threads: list[tuple[str, int]] = field(default_factory=list)

    @property
    def config(self) -> object:
        return self.inner.config

    @property
    def kernels(self) -> Kernels:
        return self.inner.kernels

    @property
    def max_model_len(self) -> int:
        return self.inner.max_model_len

    def forward(self, tokens: Tensor, positions: Tensor, attention: PagedAttention, sampled: Tensor) -> Tensor:
        self.gate.wait(30)
        self.sampled.append(sampled.tolist())
        self.threads.append((threading.current_thread().name, torch.get_num_threads()))
        assert torch.is_inference_mode_enabled()
        return self.inner.forward(tokens, positions, attention, sampled)


@pytest.fixture
def watched(folder: Path) -> Watched:
    gate = threading.Event()
    gate.set()
    return Watched(load_model(folder, "float32"), gate)


def make_executor(model: CausalModel, threads: int = 1, step_delay: float = 0.0) -> TorchExecutor:
    layout = kv_layout(model.config, BLOCK, "float32")
    kv = kv_tensor(bytearray(NUM_BLOCKS * layout.block_bytes), layout, NUM_BLOCKS)
    return TorchExecutor(model, kv, layout, threads, step_delay)


@pytest.fixture
def executor(watched: Watched) -> Iterator[TorchExecutor]:
    made = make_executor(watched)
    yield made
    watched.gate.set()
    made.close()


def attempt(name: str = "a", number: int = 1) -> Attempt:
    return Attempt(name, number)


def prefill(
    step: int = 1, sample: bool = True, of: Attempt = attempt(), tokens: tuple[int, ...] = PROMPT, start: int = 0
) -> StepPlan:
    return StepPlan(step, (StepRow(of, start, tokens, TABLE, GREEDY, 0, sample),))


def decode(step: int, start: int, token: int | None, index: int, of: Attempt = attempt()) -> StepPlan:
    tokens = () if token is None else (token,)
    return StepPlan(step, (StepRow(of, start, tokens, TABLE, GREEDY, index, True, pending=token is None),))


def test_pending_rows_take_the_token_sampled_last(executor: TorchExecutor, watched: Watched) -> None:
    start = len(PROMPT)
    known = [executor.submit(prefill()).result(30).rows[0].tokens[0]]
    for i in range(4):
        known.append(executor.submit(decode(2 + i, start + i, known[-1], i + 1)).result(30).rows[0].tokens[0])
    watched.gate.clear()  # all plans are submitted before the first one ran
    ahead = [executor.submit(prefill(10))]
    ahead += [executor.submit(decode(11 + i, start + i, None, i + 1)) for i in range(4)]
    watched.gate.set()
    outputs = [future.result(30) for future in ahead]
    assert [output.rows[0].tokens[0] for output in outputs] == known
    assert [output.step for output in outputs] == [10, 11, 12, 13, 14]
    assert len(set(known)) > 1


def test_pending_without_a_token_fails_through_the_future(executor: TorchExecutor) -> None:
    with pytest.raises(InternalError, match="a#1 is pending"):
        executor.submit(decode(1, 0, None, 1)).result(30)
    executor.submit(prefill()).result(30)
    executor.forget(attempt())
    with pytest.raises(InternalError, match="pending"):
        executor.submit(decode(2, len(PROMPT), None, 1)).result(30)
    assert executor.submit(prefill(3)).result(30).step == 3  # and the executor goes on


def test_remembered_tokens_are_bounded(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "MAX_LAST_TOKENS", 2)
    executor = make_executor(watched)
    for name in ("a", "b", "a", "c"):
        executor.submit(prefill(of=attempt(name))).result(30)
    for name in ("a", "c"):
        executor.submit(decode(9, len(PROMPT), None, 1, attempt(name))).result(30)
    with pytest.raises(InternalError, match="pending"):
        executor.submit(decode(9, len(PROMPT), None, 1, attempt("b"))).result(30)
    executor.close()


def test_only_rows_that_sample_reach_the_head(executor: TorchExecutor, watched: Watched) -> None:
    rows = (
        prefill(sample=False).rows[0],
        StepRow(attempt("b"), 0, (5, 6, 7), (1,), GREEDY, 0, True),
        StepRow(attempt("c"), 0, (9,), (2,), GREEDY, 0, True),
    )
    output = executor.submit(StepPlan(1, rows)).result(30)
    assert output.rows[0] == RowOutput()
    assert [len(row.tokens) for row in output.rows] == [0, 1, 1]
    executor.submit(prefill(2, sample=False)).result(30)
    assert watched.sampled == [[19, 20], []]
    assert executor.submit(StepPlan(3, ())).result(30).rows == ()


def test_chunks_without_sampling_leave_the_same_cache(executor: TorchExecutor) -> None:
    whole = executor.submit(prefill()).result(30).rows[0].tokens
    executor.submit(prefill(2, sample=False, tokens=PROMPT[:9])).result(30)
    assert executor.submit(prefill(3, tokens=PROMPT[9:], start=9)).result(30).rows[0].tokens == whole


def test_adopted_sequences_are_not_misled_by_what_lies_behind_them(watched: Watched) -> None:
    """KV that landed from another worker: only the slots of the prompt are written, the rest of the pool is NaN."""
    layout = kv_layout(watched.inner.config, BLOCK, "float32")
    prompts = {attempt("a"): (PROMPT, (7, 3, 11)), attempt("b"): (PROMPT[:3], (1,))}
    source, target = (torch.full((NUM_BLOCKS, 2, 2, 1, BLOCK, 16), float("nan")) for _ in range(2))
    prefiller, decoder = TorchExecutor(watched, source, layout), TorchExecutor(watched, target, layout)
    rows = tuple(StepRow(a, 0, tokens, table, GREEDY, 0, True) for a, (tokens, table) in prompts.items())
    first = [row.tokens[0] for row in prefiller.submit(StepPlan(1, rows)).result(30).rows]
    for tokens, table in prompts.values():
        for i, block in enumerate(table):
            filled = min(BLOCK, len(tokens) - i * BLOCK)
            target[block, :, :, :, :filled] = source[block, :, :, :, :filled]
    rows = tuple(
        StepRow(a, len(tokens), (token,), table, GREEDY, 1, True)
        for (a, (tokens, table)), token in zip(prompts.items(), first, strict=True)
    )
    split, colocated = decoder.submit(StepPlan(1, rows)).result(30), prefiller.submit(StepPlan(2, rows)).result(30)
    assert split.rows == colocated.rows
    assert not target[[7, 3, 11, 1]].isnan().any()
    prefiller.close()
    decoder.close()


def test_seeded_draws_do_not_depend_on_the_batch(executor: TorchExecutor) -> None:
    params = SamplingParams(temperature=1.3, seed=77, logprobs=2)
    mine = StepRow(attempt(), 0, PROMPT, TABLE, params, 0, True)
    other = StepRow(attempt("b"), 0, (5, 6, 7), (1,), SamplingParams(seed=5), 0, True)
    alone = executor.submit(StepPlan(1, (mine,))).result(30).rows[0]
    assert executor.submit(StepPlan(2, (other, mine))).result(30).rows[1].tokens == alone.tokens
    assert alone.logprobs[0].token == alone.tokens[0]
    assert len(alone.logprobs[0].top) == 2


@pytest.mark.parametrize(
    "row",
    [
        StepRow(attempt(), 0, PROMPT, TABLE[:2], GREEDY, 0, True),
        StepRow(attempt(), 0, (), TABLE, GREEDY, 0, True),
        StepRow(attempt(), LIMIT, (1,), tuple(range(12)), GREEDY, 0, True),
    ],
    ids=["short table", "no tokens", "beyond the model"],
)
def test_impossible_rows_are_refused_by_name(executor: TorchExecutor, row: StepRow) -> None:
    with pytest.raises(InternalError, match="row of a#1"):
        executor.submit(StepPlan(1, (row,))).result(30)


def test_a_failing_step_does_not_end_the_executor(executor: TorchExecutor) -> None:
    with pytest.raises(IndexError):
        executor.submit(prefill(tokens=(10**6,))).result(30)
    assert executor.submit(prefill(2)).result(30).step == 2


def test_steps_run_on_one_thread_with_its_own_thread_count(watched: Watched) -> None:
    torch.set_num_threads(1)
    executor = make_executor(watched, threads=2)
    for step in range(3):
        executor.submit(prefill(step)).result(30)
    executor.close()
    assert set(watched.threads) == {("executor_0", 2)}
    torch.set_num_threads(1)


def test_close_cancels_what_is_queued_and_refuses_more(watched: Watched) -> None:
    executor: Executor = make_executor(watched)
    watched.gate.clear()
    running, queued = executor.submit(prefill(1)), executor.submit(prefill(2))
    closer = threading.Thread(target=executor.close)
    closer.start()
    assert queued.cancelled() or not queued.done()
    watched.gate.set()
    closer.join(30)
    assert running.result(0).step == 1
    assert queued.cancelled()
    with pytest.raises(InternalError, match="closed"):
        executor.submit(prefill(3)).result(0)
    executor.forget(attempt())
    executor.close()


def test_step_delay_is_part_of_the_step(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(executor_module.time, "sleep", slept.append)
    for delay in (0.25, 0.0):
        executor = make_executor(watched, step_delay=delay)
        assert executor.submit(prefill()).result(30).seconds > 0
        executor.close()
    assert slept == [0.25]


def test_warm_up_measures_both_kinds_of_step_and_leaves_no_trace(executor: TorchExecutor) -> None:
    before = executor.submit(prefill()).result(30).rows[0].tokens
    (chunk, chunk_seconds), (one, one_seconds) = executor.warm_up(max_step_tokens=30)
    assert (chunk.num_tokens, one.num_tokens) == (30, 1)
    assert one.rows[0].output_index > 0  # a decode row to whoever learns step times from it
    assert chunk_seconds > 0
    assert one_seconds > 0
    assert executor.submit(prefill(2)).result(30).rows[0].tokens == before
    assert executor.warm_up(max_step_tokens=10**6)[0][0].num_tokens == LIMIT - 1


def test_a_pool_of_another_layout_is_refused(watched: Watched) -> None:
    layout = kv_layout(watched.inner.config, BLOCK, "float32")
    with pytest.raises(InternalError, match="layout"):
        TorchExecutor(watched, torch.zeros(4, 2, 2, 1, 16, 16), layout)
    with pytest.raises(InternalError, match="needs at least"):
        kv_tensor(bytearray(layout.block_bytes), layout, 2)


def test_kv_tensor_is_the_memory_itself(watched: Watched) -> None:
    layout = kv_layout(watched.inner.config, BLOCK, "bfloat16")
    memory = bytearray(3 * layout.block_bytes + 5)
    kv = kv_tensor(memoryview(memory), layout, 3)
    kv[1] = 1.0
    assert bytes(memory[: layout.block_bytes]) == bytes(layout.block_bytes)
    assert bytes(memory[layout.block_bytes : 2 * layout.block_bytes]) == b"\x80\x3f" * (layout.block_bytes // 2)
    assert kv[0].is_contiguous()
