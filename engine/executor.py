"""Runs the model: a StepPlan in, a StepOutput out.

Everything that touches tensors happens on one thread, in the order of submission. The executor knows
nothing of scheduling; it trusts the plan's block tables, but checks that they cover what is fed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from ..core.errors import InternalError
from ..core.kv import KVLayout
from ..core.request import Attempt, SamplingParams
from ..core.step import RowOutput, StepOutput, StepPlan, StepRow
from ..kernels.batch import RowSpan
from .grammar import Grammars
from .model.interface import CausalModel
from .row_sampler import RowSampler, with_prompts

MAX_LAST_TOKENS = 1 << 16  # attempts that are remembered: a bound for owners that never call `forget`


class Executor(Protocol):
    """Whatever can run plans, one after the other."""

    def submit(self, plan: StepPlan) -> Future[StepOutput]:
        """Start (or queue) a step. Never raises: a failure arrives through the future."""
        ...

    def forget(self, attempt: Attempt) -> None:
        """The sequence ended here: no later plan has a pending row of it."""
        ...

    def close(self) -> None:
        """Finish the running step, cancel the queued ones, release the thread."""
        ...


class TorchExecutor:
    """Runs a torch model over one pool of KV.

    step_delay  seconds added to every step, to play slow hardware
    grammars    the model's; without them a sequence that asks for one fails
    """

    def __init__(
        self,
        model: CausalModel,
        kv: Tensor,
        layout: KVLayout,
        threads: int = 1,
        step_delay: float = 0.0,
        grammars: Grammars | None = None,
    ) -> None:
        if kv.shape[1:] != (layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim):
            raise InternalError(f"a KV tensor of shape {list(kv.shape)} does not have the layout {layout}")
        self._model = model
        self._kv: Tensor | None = kv
        self._layout = layout
        self._step_delay = step_delay
        self._last: dict[Attempt, int] = {}  # the last token sampled for an attempt, oldest entries first
        self._sampler = RowSampler(model.kernels, grammars)
        self._thread = ThreadPoolExecutor(1, "executor", initializer=torch.set_num_threads, initargs=(threads,))

    def submit(self, plan: StepPlan) -> Future[StepOutput]:
        try:
            return self._thread.submit(self._run, plan)
        except RuntimeError:  # the thread is shut down
            failed: Future[StepOutput] = Future()
            failed.set_exception(InternalError(f"step {plan.step} was submitted to an executor that is closed"))
            return failed

    def forget(self, attempt: Attempt) -> None:
        try:
            self._thread.submit(self._forget, attempt)
        except RuntimeError:
            return  # closed: nothing is remembered any more

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._last.clear()
        self._sampler.clear()
        self._kv = None  # the pool's memory may be closed now

    def warm_up(self, max_step_tokens: int = 512) -> list[tuple[StepPlan, float]]:
        """Run a full prefill chunk and a decode step, each twice; returns both plans with the seconds of the second run.

        Writes to the first blocks of the pool: call it before any sequence holds blocks. Blocks the caller.
        """
        plans = warm_up_plans(self._model, self._layout, 0 if self._kv is None else self._kv.shape[0], max_step_tokens)
        measured = []
        for plan in plans:
            self.submit(plan).result()
            measured.append((plan, self.submit(plan).result().seconds))
            self.forget(plan.rows[0].attempt)
        return measured

    def _run(self, plan: StepPlan) -> StepOutput:
        began = time.perf_counter()
        with torch.inference_mode():
            outputs = self._step(plan)
        if self._step_delay > 0:
            time.sleep(self._step_delay)
        return StepOutput(plan.step, outputs, time.perf_counter() - began)

    def _step(self, plan: StepPlan) -> tuple[RowOutput, ...]:
        if self._kv is None:
            raise InternalError(f"step {plan.step} ran after the executor was closed")
        if not plan.rows:
            return ()
        spans: list[RowSpan] = []
        tokens: list[int] = []
        positions: list[int] = []
        for row in plan.rows:
            spans.append(self._span(row, len(tokens)))
            tokens += self._tokens(row)
            positions += range(row.start, row.end)
        places: list[int] = []  # packed tokens whose logits are wanted, ascending
        last: list[int] = []  # of those, the ones that are sampled from
        for row, span in zip(plan.rows, spans, strict=True):
            if row.needs is not None and row.needs.targets:
                places += range(span.offset, span.offset + len(row.needs.targets))
            if row.sample:
                last.append(len(places))
                places.append(span.offset + span.num_tokens - 1)
        attention = self._model.kernels.attention(self._kv, spans)
        logits = self._model.forward(
            torch.tensor(tokens), torch.tensor(positions), attention, torch.tensor(places, dtype=torch.int64)
        )
        if len(last) == len(places):
            return self._sample(plan.rows, logits)
        sampled = self._sample(plan.rows, logits[last])
        return with_prompts(plan.rows, sampled, logits)

    def _sample(self, rows: Sequence[StepRow], logits: Tensor) -> tuple[RowOutput, ...]:
        """logits [R, V], one for each of `rows` that samples: their tokens, and nothing for the others."""
        sampling = [row for row in rows if row.sample]
        if not sampling:
            return (RowOutput(),) * len(rows)
        made = self._sampler.sample(logits, sampling, self._last)
        for row, output in zip(sampling, made, strict=True):
            self._remember(row.attempt, output.tokens[-1])
        taken = iter(self._sampler.take(sampling, made))
        return tuple(next(taken) if row.sample else RowOutput() for row in rows)

    def _span(self, row: StepRow, offset: int) -> RowSpan:
        """Check a row and describe it to the kernels."""
        needed = check_row(row, self._layout, self._model.max_model_len)
        # Behind the last token there may be anything, unless the same sequence wrote to the block before.
        entered = row.num_tokens > 1 or row.start % self._layout.block_size == 0
        return RowSpan(offset, row.num_tokens, row.start, row.block_table[:needed], entered or row.attempt not in self._last)

    def _tokens(self, row: StepRow) -> Sequence[int]:
        if not row.pending:
            return row.tokens
        token = self._last.get(row.attempt)
        if token is None:
            raise InternalError(f"row of {row.attempt} is pending, but no token was sampled for that attempt here")
        return (token,)

    def _forget(self, attempt: Attempt) -> None:
        self._last.pop(attempt, None)
        self._sampler.forget(attempt)

    def _remember(self, attempt: Attempt, token: int) -> None:
        self._last.pop(attempt, None)
        self._last[attempt] = token
        if len(self._last) > MAX_LAST_TOKENS:
            del self._last[next(iter(self._last))]


def check_row(row: StepRow, layout: KVLayout, max_model_len: int) -> int:
    """The number of blocks that hold the row's tokens. Raises InternalError when it has fewer, or feeds what cannot be fed."""
    needed = layout.num_blocks_for(row.end)
    if row.num_tokens < 1 or len(row.block_table) < needed or row.end > max_model_len:
        raise InternalError(
            f"row of {row.attempt}: {row.num_tokens} tokens from position {row.start} need {needed} blocks of "
            f"{len(row.block_table)} given, and the model takes {max_model_len} positions"
        )
    return needed


def warm_up_plans(model: CausalModel, layout: KVLayout, num_blocks: int, max_step_tokens: int) -> list[StepPlan]:
    """Step 0 twice: a chunk of `max_step_tokens` (less if the model or the pool is smaller), then one decode row."""
    if num_blocks < 1:
        raise InternalError("warm-up needs an open executor and at least one block")
    length = max(2, min(max_step_tokens, model.max_model_len - 1, num_blocks * layout.block_size - 1))
    length = min(length, model.max_model_len)
    table = tuple(i % num_blocks for i in range(layout.num_blocks_for(length + 1)))
    tokens = tuple(1 + i % (model.config.vocab_size - 1) for i in range(length))
    attempt = Attempt("warm-up", 0)
    greedy = SamplingParams(temperature=0.0)
    prefill = StepRow(attempt, 0, tokens, table, greedy, 0, True)
    decode = StepRow(attempt, length - 1, (1,), table, greedy, 1, True)
    return [StepPlan(0, (prefill,)), StepPlan(0, (decode,))]
