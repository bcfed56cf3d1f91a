"""Measures what steps cost on this machine: real plans through a worker's own engine, over prompts, decode batches and mixtures.

Every point of a grid is run in turn, round after round, so that a busy machine slows all of them alike; its time is the median
over rounds. What the host adds between steps is measured by the engine's own loop. Never measures a model it does not run.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..core.clock import MonotonicClock
from ..core.errors import InvalidRequest
from ..core.request import Attempt, SamplingParams, SequenceSpec
from ..core.shape import shape_of
from ..core.step import SequenceEvent, StepPlan, StepRow
from ..core.topology import KvTransferSpec, ModelSpec, PoolSpec, WorkerConfig
from ..core.view import Role
from ..engine.cache import kv_tensor
from ..engine.loop import EngineLoop
from ..engine.model_config import load_config
from ..engine.model_folder import resolve_model
from ..engine.timing import StepTimes
from ..kv_transfer.pool import PoolMemory
from ..worker.build import Engine, build_engine
from .fit import Measurement, fit_cost, residuals
from .model_shape import ModelShape, shape_of_config
from .profile import MeasuredCost, Profile

OVERHEAD_ROWS, OVERHEAD_STEPS = 8, 40
LEAST_ROUNDS = 2  # one alone would not show what disturbed it
DECODE_RUNS = 4  # of a decode point in each round; the first one warms up
LONGEST = 4096  # tokens of the longest sequence that is measured
SPREAD = 0.25  # contexts of a batch lie within this share around their mean

Tell = Callable[[str, int, int], None]
"""Told what is going on, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class MeasureSpec:
    """What is measured, and how thoroughly.

    model          a folder or a hub id
    kernels        as in a topology
    max_step_tokens, block_size   as in the topology that will serve
    kv_memory_bytes  of the pool: larger batches of longer contexts fit in it
    seconds        after which no further round is begun
    rounds         at most; at least `LEAST_ROUNDS` are run
    """

    model: str
    dtype: str = "bfloat16"
    kernels: str = "auto"
    threads: int = 1
    max_step_tokens: int = 2048
    block_size: int = 32
    kv_memory_bytes: int = 512 << 20
    seconds: float = 45.0
    rounds: int = 7
    quick: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """One step of the grid: chunks of prompts as (start, tokens), and the contexts of decode rows."""

    chunks: tuple[tuple[int, int], ...] = ()
    contexts: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(tokens for _, tokens in self.chunks) + len(self.contexts)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens in the cache after the step, row by row."""
        return tuple(start + tokens for start, tokens in self.chunks) + self.contexts


@dataclass(frozen=True, slots=True)
class Measured:
    """The profile (its links still empty) and the steps that it was fitted to.

    scatter  how much the times of one step differ between rounds, as a share, in the median: small on an idle machine
    """

    profile: Profile
    steps: tuple[Measurement, ...]
    scatter: float


def measure(spec: MeasureSpec, tell: Tell) -> Measured:
    """Build the engine, run the grid, fit. Raises ModelError for a model that cannot run, InvalidRequest when no step fits."""
    tell("loading the model", 0, 1)
    folder = resolve_model(spec.model)
    shape = shape_of_config(load_config(folder), folder.resolve().name)
    longest = min(LONGEST, shape.max_model_len)
    engine = build_engine(_worker(spec, shape, longest))
    try:
        _fill_cache(engine)
        points = grid(spec, longest, engine.blocks.num_blocks)
        if not points:
            raise InvalidRequest("nothing can be measured: the model, the step budget or the KV memory is too small")
        steps, scatter = _run_rounds(spec, engine, points, shape.vocab_size, tell)
        tell("host overhead", 0, 1)
        overhead = asyncio.run(_host_overhead(engine, longest, shape.vocab_size))
    finally:
        engine.close()
    cost = fit_cost(steps)
    profile = Profile(
        model=shape.name,
        fingerprint=shape.fingerprint,
        accelerator="cpu",
        dtype=spec.dtype,
        kernels=spec.kernels,
        threads=spec.threads,
        block_size=spec.block_size,
        host_overhead=overhead,
        links={},
        costs=(MeasuredCost(1, 1, cost, residuals(cost, steps)),),
    )
    return Measured(profile, steps, scatter)


def grid(spec: MeasureSpec, longest: int, num_blocks: int) -> list[Point]:
    """The points that fit a step's budget, the model's positions and the pool."""
    draw = random.Random(spec.seed)
    points = [Point(((0, length),)) for length in ((32, 128, 512) if spec.quick else (8, 32, 64, 128, 256, 512, 1024, 2048))]
    points += [Point(chunks) for chunks in (_QUICK_CHUNKS if spec.quick else _CHUNKS)]
    batches, means = ((1, 4, 8, 16, 32), (128, 512)) if spec.quick else ((1, 2, 4, 8, 16, 32, 64), (64, 256, 512, 1024, 2048))
    points += [Point((), _contexts(draw, batch, mean)) for batch in batches for mean in means]
    points += [
        Point(((start, n),), _contexts(draw, rows, mean)) for rows, mean, start, n in (_MIXED[:4] if spec.quick else _MIXED)
    ]

    def fits(point: Point) -> bool:
        blocks = sum(-(-end // spec.block_size) for end in point.ends)
        return point.num_tokens <= spec.max_step_tokens and max(point.ends) <= longest and blocks <= num_blocks

    return [point for point in points if fits(point)]


# (start, tokens) of each row
_QUICK_CHUNKS = (((512, 256),), ((0, 256), (0, 256)))
_CHUNKS = (
    *_QUICK_CHUNKS,
    ((256, 256),),
    ((1024, 512),),
    ((1024, 1024),),
    ((2048, 256),),
    ((0, 128),) * 4,
    ((0, 32),) * 8,
    ((0, 512), (0, 512)),
)
# decode rows, their mean context, start and tokens of the prompt beside them
_MIXED = (
    (4, 512, 0, 256),
    (16, 512, 0, 128),
    (8, 512, 512, 256),
    (32, 256, 0, 64),
    (1, 512, 0, 64),
    (32, 512, 0, 512),
    (8, 1024, 0, 1024),
    (16, 512, 1024, 512),
)


def _contexts(draw: random.Random, rows: int, mean: int) -> tuple[int, ...]:
    return tuple(max(2, round(mean * draw.uniform(1 - SPREAD, 1 + SPREAD))) for _ in range(rows))


def _worker(spec: MeasureSpec, shape: ModelShape, longest: int) -> WorkerConfig:
    """A worker as `baton up` would start it, but for the sockets; its pool holds the longest sequence at least."""
    model = ModelSpec(spec.model, dtype=spec.dtype, max_model_len=longest, kernels=spec.kernels)
    least = shape.kv_bytes_per_token(spec.dtype) * (longest + 2 * spec.block_size)
    pool = PoolSpec(
        Role.MIXED,
        max_step_tokens=spec.max_step_tokens,
        block_size=spec.block_size,
        kv_memory_bytes=max(spec.kv_memory_bytes, int(least)),
        threads=spec.threads,
        prefix_cache=False,
    )
    return WorkerConfig("profile", "profile", model, pool, KvTransferSpec(), controller="")


def _fill_cache(engine: Engine) -> None:
    """Keys and values of ordinary size in every block: zeros could be cheaper to attend to."""
    assert isinstance(engine.memory, PoolMemory)  # `_worker` asks for one on the CPU
    kv = kv_tensor(engine.memory.buffer, engine.layout, engine.blocks.num_blocks)
    kv[:] = torch.randn(kv.shape[1:], generator=torch.Generator().manual_seed(0)).to(kv.dtype)


def _run_rounds(
    spec: MeasureSpec, engine: Engine, points: Sequence[Point], vocab_size: int, tell: Tell
) -> tuple[tuple[Measurement, ...], float]:
    """Every point in random order, round after round; the medians, and how far rounds are apart."""
    draw = random.Random(spec.seed)
    plans = [_plan(point, number, engine, vocab_size, draw) for number, point in enumerate(points)]
    seconds: list[list[float]] = [[] for _ in points]
    total = spec.rounds * len(points)
    deadline = time.monotonic() + spec.seconds
    for number in range(spec.rounds):
        if number >= LEAST_ROUNDS and time.monotonic() > deadline:
            break
        order = draw.sample(range(len(points)), len(points))
        for done, index in enumerate(order):
            tell("steps", number * len(points) + done, total)
            seconds[index].append(_run(engine, plans[index]))
    tell("steps", total, total)
    measured = tuple(Measurement(shape_of(plan), statistics.median(times)) for plan, times in zip(plans, seconds, strict=True))
    return measured, statistics.median((max(times) - min(times)) / statistics.median(times) for times in seconds)


def _run(engine: Engine, plan: StepPlan) -> float:
    """Seconds of one step: of a decode step the median of a few, as they come in long series."""
    decodes = all(row.output_index > 0 for row in plan.rows)
    times = [engine.executor.submit(plan).result().seconds for _ in range(DECODE_RUNS if decodes else 1)]
    for row in plan.rows:
        engine.executor.forget(row.attempt)
    return statistics.median(times[1:] or times)


def _plan(point: Point, number: int, engine: Engine, vocab_size: int, draw: random.Random) -> StepPlan:
    """Rows with blocks of their own in no order, as in a pool that has served for a while."""
    blocks = draw.sample(range(engine.blocks.num_blocks), engine.blocks.num_blocks)
    rows = []
    fed = [(start, tokens, 0) for start, tokens in point.chunks] + [(context - 1, 1, 1) for context in point.contexts]
    for place, (start, tokens, index) in enumerate(fed):
        needed = engine.layout.num_blocks_for(start + tokens)
        table, blocks = tuple(blocks[:needed]), blocks[needed:]
        ids = tuple(draw.randrange(vocab_size) for _ in range(tokens))
        attempt = Attempt(f"profile-{number}-{place}", 0)
        rows.append(StepRow(attempt, start, ids, table, SamplingParams(temperature=0.0), index, True))
    return StepPlan(number + 1, tuple(rows))


async def _host_overhead(engine: Engine, longest: int, vocab_size: int) -> float:
    """Seconds from one decode step's end to the next one's beyond the device's work, in the loop that serves."""
    ended: list[tuple[float, float]] = []  # when a step was committed, and how long the device worked on it
    clock = MonotonicClock()
    left = OVERHEAD_ROWS
    all_ended = asyncio.Event()

    def on_events(_: int, events: list[SequenceEvent]) -> None:
        nonlocal left
        ended.append((clock.now(), loop.times.last_step))
        left -= sum(getattr(event, "finish", None) is not None for event in events)
        if left == 0:
            all_ended.set()

    def on_failed(_: StepPlan, error: Exception) -> None:
        raise error

    loop = EngineLoop(engine.scheduler, engine.executor, StepTimes(), clock, on_events, on_failed)
    steps = min(OVERHEAD_STEPS, longest - 33)
    sampling = SamplingParams(temperature=0.0, max_tokens=steps)
    for number in range(OVERHEAD_ROWS):
        prompt = tuple(1 + (number * 7 + i) % (vocab_size - 1) for i in range(32))
        engine.scheduler.add(SequenceSpec(Attempt(f"overhead-{number}", 0), prompt, sampling), clock.now())
    running = asyncio.create_task(loop.run())
    waiting = asyncio.create_task(all_ended.wait())
    await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    running.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    if not all_ended.is_set():
        running.result()  # raises what ended the loop
    gaps = [after[0] - before[0] - after[1] for before, after in pairwise(ended[2:])]
    return max(0.0, statistics.median(gaps)) if gaps else 0.0
