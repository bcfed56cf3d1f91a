"""A worker's engine over a model folder, driven step by step, and the float32 pass that its outputs are held against.

`Rig` is what a worker builds: shared KV pool, block pool, scheduler, executor; here plan, execute, sample and commit follow
each other on one thread and each is timed. `Truth` runs the same model in float32 with the plain torch kernels over the
tokens that the rig fed: a step that returned anything but rounding raises WrongOutput. Must never measure without checking.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from baton.core.request import Attempt, SamplingParams, SequenceSpec
from baton.core.step import StepPlan
from baton.engine.blocks import BlockPool
from baton.engine.cache import kv_layout, kv_tensor
from baton.engine.executor import TorchExecutor
from baton.engine.loader import load_model
from baton.engine.scheduler import Scheduler, SchedulerConfig
from baton.kernels.batch import RowSpan
from baton.kv_transfer.pool import PoolMemory
from baton.policy.ordering import ORDERING
from stopwatch import Stopwatch, load_stopped
from torch import Tensor

BLOCK_SIZE = 32
MAX_LENGTH = 1024
BASE_TOKENS = 640  # of the prompts whose KV decode contexts are cut from
LOGIT_TOLERANCE = 0.1  # of the logits' spread: how far below the best a token sampled in bfloat16 may be
KV_TOLERANCE = 0.03  # relative distance of the last layer's new keys and values; bfloat16 alone makes about 0.015


class WrongOutput(Exception):
    """The engine did not compute what the model says."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step, in seconds.

    planning, executing, committing   what the caller waits for; executing is from submit to result
    submitted                         reading of `time.perf_counter` at the submit
    device                            of executing, what the executor reports
    """

    plan: StepPlan
    submitted: float
    planning: float
    executing: float
    committing: float
    device: float

    @property
    def seconds(self) -> float:
        return self.planning + self.executing + self.committing


@dataclass(frozen=True, slots=True)
class Row:
    """What one sequence was fed and what came of it.

    base     which base prompt its context is cut from
    length   tokens of that prompt in its context
    fed      tokens fed after it, the first of them given, the others sampled
    sampled  tokens sampled, one after each that was fed (after the whole context when nothing was fed)
    kv       keys and values of the last layer at the new positions, [tokens, 2, K, D]
    """

    base: int
    length: int
    fed: tuple[int, ...]
    sampled: tuple[int, ...]
    kv: Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """The steps of one measurement, in order, and its rows."""

    steps: tuple[Step, ...]
    rows: tuple[Row, ...]


class Rig:
    """One bfloat16 model on its executor. `bases` are prompts of `BASE_TOKENS` tokens. Close it."""

    def __init__(
        self,
        folder: Path,
        kernels: str,
        threads: int,
        bases: Sequence[Sequence[int]],
        max_batch: int,
        watch: Stopwatch | None = None,
    ) -> None:
        self._bases = [tuple(base) for base in bases]
        if watch is None:
            self.model = load_model(folder, "bfloat16", max_model_len=MAX_LENGTH, kernels=kernels, threads=threads)
        else:
            self.model = load_stopped(folder, "bfloat16", MAX_LENGTH, kernels, threads, watch)
        self.layout = kv_layout(self.model.config, BLOCK_SIZE, "bfloat16")
        blocks = self.layout.num_blocks_for(BASE_TOKENS) + 4
        self._num_blocks = max_batch * blocks + 8
        self._memory = PoolMemory.shared(self._num_blocks * self.layout.block_bytes)
        self._kv = kv_tensor(self._memory.buffer, self.layout, self._num_blocks)
        self._executor = TorchExecutor(self.model, self._kv, self.layout, threads)
        self._num_samples = 0
        self._base_kv = [self._keep(base) for base in self._bases]  # [blocks, L, 2, K, S, D] each

    def close(self) -> None:
        self._executor.close()
        del self._kv
        self._memory.close()

    def prefill(self, base: int, num_tokens: int) -> Sample:
        """One step over the first `num_tokens` tokens of a base prompt, nothing of it cached."""
        scheduler, _ = self._scheduler(base)
        attempt = self._next_attempt(0)
        prompt = self._bases[base][:num_tokens]
        scheduler.add(SequenceSpec(attempt, prompt, SamplingParams(temperature=0.0, max_tokens=2)), 0.0)
        step, tokens = self._step(scheduler)
        kv = self._last_layer(step.plan.rows[0].block_table, 0, num_tokens)
        return Sample((step,), (Row(base, num_tokens, (), (tokens[attempt],), kv),))

    def decode(self, contexts: Sequence[tuple[int, int]], num_steps: int, seed: int) -> Sample:
        """`num_steps` steps of one sequence per context (base, length); every sequence has blocks of its own, in no order."""
        scheduler, pool = self._scheduler(seed)
        draw = random.Random(seed)
        rows: dict[Attempt, tuple[int, int, list[int]]] = {}
        for number, (base, length) in enumerate(contexts):
            attempt = self._next_attempt(number)
            blocks = pool.allocate(pool.num_blocks_for(length))
            assert blocks is not None, "the rig's pool holds max_batch contexts"
            self._kv[list(blocks)] = self._base_kv[base][: len(blocks)]
            first = draw.randrange(self.model.config.vocab_size)
            sampling = SamplingParams(temperature=0.0, max_tokens=1 + num_steps)
            scheduler.adopt(SequenceSpec(attempt, self._bases[base][:length], sampling), blocks, first, 0.0)
            rows[attempt] = (base, length, [first])
        steps = []
        for _ in range(num_steps):
            step, tokens = self._step(scheduler)
            if len(tokens) != len(contexts):
                raise WrongOutput(f"a step of {len(contexts)} sequences gave tokens for {len(tokens)}")
            for attempt, token in tokens.items():
                rows[attempt][2].append(token)
            steps.append(step)
        tables = {row.attempt: row.block_table for row in steps[-1].plan.rows}
        return Sample(
            tuple(steps),
            tuple(
                Row(base, length, tuple(known[:-1]), tuple(known[1:]), self._last_layer(tables[attempt], length, num_steps))
                for attempt, (base, length, known) in rows.items()
            ),
        )

    # ---- inside --------------------------------------------------------------------------------

    def _keep(self, base: tuple[int, ...]) -> Tensor:
        """The KV of a base prompt, block by block in its order."""
        scheduler, _ = self._scheduler(0)
        scheduler.add(SequenceSpec(self._next_attempt(0), base, SamplingParams(temperature=0.0, max_tokens=2)), 0.0)
        step, _ = self._step(scheduler)
        table = step.plan.rows[0].block_table[: self.layout.num_blocks_for(len(base))]
        return self._kv[list(table)].clone()

    def _scheduler(self, seed: int) -> tuple[Scheduler, BlockPool]:
        """A scheduler whose pool remembers no prefix and gives blocks in random order."""
        pool = BlockPool(self._num_blocks, BLOCK_SIZE)
        blocks = list(pool.allocate(self._num_blocks) or ())
        random.Random(seed).shuffle(blocks)
        pool.release(blocks)
        config = SchedulerConfig(max_step_tokens=2048, max_num_seqs=64, max_model_len=MAX_LENGTH)
        return Scheduler(pool, config, ORDERING["fcfs"]), pool

    def _next_attempt(self, number: int) -> Attempt:
        self._num_samples += number == 0
        return Attempt(f"sample-{self._num_samples}-{number}", 0)

    def _step(self, scheduler: Scheduler) -> tuple[Step, dict[Attempt, int]]:
        began = time.perf_counter()
        plan = scheduler.plan(began)
        planned = time.perf_counter()
        assert plan is not None, "there is work and room for it"
        output = self._executor.submit(plan).result()
        executed = time.perf_counter()
        events = scheduler.commit(plan, output, executed)
        ended = time.perf_counter()
        tokens = {event.attempt: event.tokens[0] for event in events}
        return Step(plan, planned, planned - began, executed - planned, ended - executed, output.seconds), tokens

    def _last_layer(self, table: Sequence[int], start: int, num_tokens: int) -> Tensor:
        """[num_tokens, 2, K, D] of positions from `start` on."""
        return last_layer(self._kv, table, start, num_tokens)


class Truth:
    """The same model in float32 on the plain torch kernels, with the KV of the base prompts.

    saved   a file for what is known of the base prompts, so that one run's processes compute it once
    """

    def __init__(self, folder: Path, bases: Sequence[Sequence[int]], prefill_tokens: int, saved: Path) -> None:
        self._model = load_model(folder, "float32", max_model_len=MAX_LENGTH, kernels="cpu")
        layout = kv_layout(self._model.config, BLOCK_SIZE, "float32")
        base_blocks = layout.num_blocks_for(BASE_TOKENS)
        self._tables = [tuple(range(i * base_blocks, (i + 1) * base_blocks)) for i in range(len(bases))]
        self._first_scratch = len(bases) * base_blocks
        if saved.exists():
            known = torch.load(saved)
            self._kv, self._prefill_logits = known["kv"], known["logits"]
            return
        shape = (self._first_scratch, layout.num_layers, 2, layout.num_kv_heads, BLOCK_SIZE, layout.head_dim)
        self._kv = torch.zeros(shape)  # grows by the blocks that rows write to
        self._prefill_logits = torch.cat(  # [bases, V]
            [
                self._forward([RowSpan(0, BASE_TOKENS, 0, table)], base, range(BASE_TOKENS), [prefill_tokens - 1])
                for table, base in zip(self._tables, bases, strict=True)
            ]
        )
        torch.save({"kv": self._kv, "logits": self._prefill_logits}, saved)

    def check(self, what: str, rows: Sequence[Row]) -> int:
        """Raise WrongOutput unless every token and every new key and value of `rows` is right; returns the tokens checked."""
        prompts = [row for row in rows if not row.fed]
        for row in prompts:
            true = last_layer(self._kv, self._tables[row.base], 0, row.length)
            _compare(what, row, self._prefill_logits[row.base][None], true)
        continued = [row for row in rows if row.fed]
        if continued:
            for row, (logits, kv) in zip(continued, self._continue(continued), strict=True):
                _compare(what, row, logits, kv)
        return sum(len(row.sampled) for row in rows)

    def _continue(self, rows: Sequence[Row]) -> list[tuple[Tensor, Tensor]]:
        """Logits [tokens, V] and the last layer's KV after each token that a row was fed, all rows in one pass."""
        per_row = 2 + max(len(row.fed) for row in rows) // BLOCK_SIZE  # blocks that it writes to
        self._grow(self._first_scratch + len(rows) * per_row)
        spans: list[RowSpan] = []
        tokens: list[int] = []
        positions: list[int] = []
        for number, row in enumerate(rows):
            full, begun = divmod(row.length, BLOCK_SIZE)
            first = self._first_scratch + number * per_row
            needed = -(-(row.length + len(row.fed)) // BLOCK_SIZE) - full
            if begun:
                self._kv[first] = self._kv[self._tables[row.base][full]]
            table = self._tables[row.base][:full] + tuple(range(first, first + needed))
            spans.append(RowSpan(len(tokens), len(row.fed), row.length, table))
            tokens += row.fed
            positions += range(row.length, row.length + len(row.fed))
        logits = self._forward(spans, tokens, positions, range(len(tokens)))
        return [
            (
                logits[span.offset : span.offset + span.num_tokens],
                last_layer(self._kv, span.block_table, span.start, span.num_tokens),
            )
            for span in spans
        ]

    def _forward(
        self, spans: Sequence[RowSpan], tokens: Sequence[int], positions: Sequence[int], sampled: Sequence[int]
    ) -> Tensor:
        with torch.inference_mode():
            attention = self._model.kernels.attention(self._kv, spans)
            as_tensors = (torch.tensor(list(tokens)), torch.tensor(list(positions)), torch.tensor(list(sampled)))
            return self._model.forward(as_tensors[0], as_tensors[1], attention, as_tensors[2])

    def _grow(self, num_blocks: int) -> None:
        missing = num_blocks - self._kv.shape[0]
        if missing > 0:
            self._kv = torch.cat((self._kv, torch.zeros((missing, *self._kv.shape[1:]))))


def last_layer(kv: Tensor, table: Sequence[int], start: int, num_tokens: int) -> Tensor:
    """Keys and values of the last layer at `num_tokens` positions from `start` on: kv[N, L, 2, K, S, D] -> [tokens, 2, K, D]."""
    positions = torch.arange(start, start + num_tokens)
    blocks = torch.tensor(table)[positions // BLOCK_SIZE]
    return kv[blocks, -1, :, :, positions % BLOCK_SIZE].float()


def _compare(what: str, row: Row, logits: Tensor, kv: Tensor) -> None:
    """logits [tokens, V] and kv [tokens, 2, K, D] are the truth. Written so that NaN fails too."""
    where = f"{what}, context of {row.length} tokens"
    vocabulary = logits.shape[1]
    if any(not 0 <= token < vocabulary for token in row.sampled):
        raise WrongOutput(f"{where}: tokens {row.sampled} are not all in the vocabulary of {vocabulary}")
    chosen = logits.gather(1, torch.tensor(row.sampled)[:, None])[:, 0]
    below = (logits.amax(1) - chosen) / logits.std(1)
    worst = below.amax().item()
    if not worst <= LOGIT_TOLERANCE:
        raise WrongOutput(
            f"{where}: token {int(below.argmax())} sampled is {worst:.2f} standard deviations below the best in float32; "
            f"rounding allows {LOGIT_TOLERANCE}"
        )
    distance = ((row.kv - kv).norm() / kv.norm()).item()
    if not distance <= KV_TOLERANCE:
        raise WrongOutput(
            f"{where}: KV of the last layer is {distance:.3f} off (relative to float32); rounding allows {KV_TOLERANCE}"
        )
