"""The engine alone on one GPU: decode steps against the bytes they move, prefill against the products it makes, and both at work.

    python benchmarks/gpu/engine.py [--model llama-3.1-8b] [--quick]
    python benchmarks/gpu/engine.py --device cpu     # no GPU: proves the script on a tiny shape, times nothing real

Random weights, bfloat16, KV blocks of 16 tokens. First the same tokens as the plain executor on the CPU (tiny shape, float32).
Then, of the model:

decode_bN_fraction       the least bytes of a step at context 1,024 (weights and KV, each read once) at the bandwidth that a
                         plain copy reaches in the same run, over the time of a step; decode_bN_ms is that time
prefill_mfu              2 * parameters * tokens and the attention's operations, over the time of a prompt of 8,192 tokens and the
                         rate of a large product in the same run
host_overhead_b64        share of the time in which the device waits for the next step, batch 64, two steps in flight
offline_tok_s            output tokens per second of 1,000 in, 1,000 out; as many at a time as the pool holds, 256 at most

The last line is JSON. Without a GPU the script says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from baton.core.kv import KVLayout
from baton.core.request import Attempt, SamplingParams, SequenceSpec
from baton.core.step import StepOutput, StepPlan, StepRow, TokenEvent
from baton.engine.blocks import BlockPool
from baton.engine.cache import kv_layout, kv_tensor
from baton.engine.executor import Executor, TorchExecutor
from baton.engine.gpu.executor import DeviceExecutor
from baton.engine.gpu.memory import kv_budget
from baton.engine.scheduler import Scheduler, SchedulerConfig
from baton.kernels.device import CudaDevice, Device, HostDevice
from baton.policy.ordering import ORDERING
from models import KINDS, Kind, num_parameters, random_model

BLOCK = 16
GREEDY = SamplingParams(temperature=0.0)
WORKSPACE = 6 << 30  # bytes left for activations and graphs


@dataclass(frozen=True)
class Sizes:
    """What is run."""

    batches: tuple[int, ...]
    context: int
    prompt: int
    steps: int
    offline: tuple[int, int, int]  # sequences, input and output tokens
    product: int
    copied: int


FULL = Sizes((1, 64, 256), 1024, 8192, 40, (512, 1000, 1000), 8192, 2 << 30)
QUICK = Sizes((1, 64), 1024, 8192, 10, (128, 1000, 200), 8192, 1 << 30)
TINY = Sizes((1, 4), 32, 64, 3, (3, 20, 6), 64, 1 << 16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(KINDS))
    parser.add_argument("--quick", action="store_true", help="fewer batches, steps and sequences")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    sys.setswitchinterval(0.001)  # as in a worker: the thread that launches must not wait 5 ms for the interpreter
    if options.device == "cpu":
        figures = measure(HostDevice(), KINDS["tiny"], TINY, torch.float32, "cpu")
    elif torch.cuda.is_available():
        device = CudaDevice(0, 0.95)
        figures = measure(device, KINDS[options.model], QUICK if options.quick else FULL, torch.bfloat16, "triton")
    else:
        print("no CUDA device here; --device cpu proves the script", file=sys.stderr)
        return 2
    on_cpu = options.device == "cpu"
    print(json.dumps({"device": "CPU" if on_cpu else device.name, "model": "tiny" if on_cpu else options.model} | figures))
    return 0


def measure(device: Device, kind: Kind, sizes: Sizes, dtype: torch.dtype, kernels: str) -> dict[str, float]:
    """Every figure, by name."""
    figures = {"tokens_compared": float(compare_tokens(device, kernels))}
    copy, product = copy_rate(device, sizes.copied), product_rate(device, sizes.product, dtype)
    figures |= {"copy_tb_s": round(copy / 1e12, 3), "product_tflop_s": round(product / 1e12, 1)}
    model = random_model(kind, device.torch_device, dtype, kernels)
    layout = kv_layout(model.config, BLOCK, str(dtype).removeprefix("torch."))
    num_blocks = pool_blocks(device, layout, sizes)
    shape = num_blocks, layout.num_layers, 2, layout.num_kv_heads, BLOCK, layout.head_dim
    kv = torch.empty(shape, dtype=dtype, device=device.torch_device).normal_()  # zeros would be cheaper to attend to
    executor = DeviceExecutor(model, kv, layout, device, max(sizes.batches))
    executor.warm_up(min(2048, sizes.prompt))
    weights = num_parameters(kind) * dtype.itemsize
    token_bytes = layout.block_bytes / BLOCK
    for batch in sizes.batches:
        if batch * layout.num_blocks_for(sizes.context + sizes.steps) > num_blocks:
            continue
        seconds, idle = decode(executor, layout, batch, sizes)
        least = (weights + batch * sizes.context * token_bytes) / copy
        figures |= {f"decode_b{batch}_ms": round(1e3 * seconds, 3), f"decode_b{batch}_fraction": round(least / seconds, 3)}
        if batch in (4, 64):
            figures[f"host_overhead_b{batch}"] = round(idle, 4)
    seconds = prefill(executor, layout, sizes)
    config = model.config
    # Causal: half of the pairs, twice (scores and weighted sum), a multiplication and an addition each.
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * sizes.prompt**2
    work = 2 * num_parameters(kind) * sizes.prompt + attention
    figures |= {"prefill_tok_s": round(sizes.prompt / seconds, 1), "prefill_mfu": round(work / seconds / product, 3)}
    figures["offline_tok_s"] = round(offline(executor, num_blocks, model.config.max_position_embeddings, sizes), 1)
    executor.close()
    return figures


def compare_tokens(device: Device, kernels: str) -> int:
    """The tokens of the device's executor against those of the plain one, in float32. Raises when one differs."""
    kind, host, made = KINDS["tiny"], torch.device("cpu"), []
    for plain in (True, False):
        where = host if plain else device.torch_device
        model = random_model(kind, where, torch.float32, "cpu" if plain else kernels, origin=host)
        layout = kv_layout(model.config, BLOCK, "float32")
        kv = kv_tensor(bytearray(64 * layout.block_bytes), layout, 64).to(where)
        executor = TorchExecutor(model, kv, layout) if plain else DeviceExecutor(model, kv, layout, device, 8)
        executor.warm_up(64)
        made.append(serve(executor, 64, kind.max_model_len, 8, 64, (6, 24, 12)))
        executor.close()
    if made[0] != made[1]:
        raise SystemExit(f"tokens differ from those of the plain executor:\n{made[0]}\n{made[1]}")
    return sum(map(len, made[0].values()))


def copy_rate(device: Device, num_bytes: int) -> float:
    """Bytes per second of a plain copy, those read and those written."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(device, lambda: target.copy_(source))


def product_rate(device: Device, size: int, dtype: torch.dtype) -> float:
    """Operations per second of a square product of random numbers."""
    a, b = (torch.randn((size, size), device=device.torch_device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / seconds_of(device, lambda: torch.mm(a, b, out=out))


def seconds_of(device: Device, work: Callable[[], object], repeats: int = 10) -> float:
    """The median, as the device measures it."""
    stream, taken = device.stream(), []
    for _ in range(repeats + 3):
        began, ended = stream.event(), stream.event()
        began.record()
        stream.launch(lambda: (work(), None)[1])
        ended.record()
        ended.wait()
        taken.append(ended.seconds_since(began))
    return max(statistics.median(taken[3:]), 1e-9)


def pool_blocks(device: Device, layout: KVLayout, sizes: Sizes) -> int:
    """Blocks of the pool: what the device has room for, and no more than what is run needs."""
    longest = max(sizes.context + sizes.steps, sum(sizes.offline[1:]), sizes.prompt) + BLOCK
    wanted = max(max(sizes.batches) * layout.num_blocks_for(longest), layout.num_blocks_for(sizes.prompt) + 1)
    memory = device.memory()
    return wanted if memory.total == 0 else min(wanted, kv_budget(memory, 0.95, WORKSPACE) // layout.block_bytes)


def decode(executor: DeviceExecutor, layout: KVLayout, batch: int, sizes: Sizes) -> tuple[float, float]:
    """Seconds of a decode step of `batch` rows at the context, and the share of time that the device idles between steps."""
    needed = layout.num_blocks_for(sizes.context + sizes.steps + 4)
    tables = [tuple(range(row * needed, (row + 1) * needed)) for row in range(batch)]
    attempts = [Attempt(f"d{row}", 1) for row in range(batch)]

    def plan(step: int) -> StepPlan:
        start = sizes.context + step
        rows = [
            StepRow(attempt, start, (5,) if step == 0 else (), table[: layout.num_blocks_for(start + 1)], GREEDY, step + 1, True,
                    pending=step > 0)
            for attempt, table in zip(attempts, tables, strict=True)
        ]  # fmt: skip
        return StepPlan(step, tuple(rows))

    plans = [plan(step) for step in range(sizes.steps)]
    executor.submit(plans[0]).result()
    began, in_flight, busy = time.perf_counter(), deque[Future[StepOutput]](), []
    for each in plans[1:]:
        in_flight.append(executor.submit(each))
        if len(in_flight) > 1:
            busy.append(in_flight.popleft().result().seconds)
    busy += [future.result().seconds for future in in_flight]
    wall = time.perf_counter() - began
    for attempt in attempts:
        executor.forget(attempt)
    return statistics.median(busy), max(0.0, 1.0 - sum(busy) / wall)


def prefill(executor: DeviceExecutor, layout: KVLayout, sizes: Sizes) -> float:
    """Seconds of one prompt in one step, the median of a few."""
    tokens = tuple(3 + i % 300 for i in range(sizes.prompt))
    row = StepRow(Attempt("p", 1), 0, tokens, tuple(range(layout.num_blocks_for(sizes.prompt))), GREEDY, 0, True)
    return statistics.median(executor.submit(StepPlan(0, (row,))).result().seconds for _ in range(5))


def offline(executor: DeviceExecutor, num_blocks: int, limit: int, sizes: Sizes) -> float:
    """Output tokens per second of the whole load."""
    began = time.perf_counter()
    made = serve(executor, num_blocks, limit, max(sizes.batches), 8192, sizes.offline)
    return sum(map(len, made.values())) / (time.perf_counter() - began)


def serve(
    executor: Executor, num_blocks: int, limit: int, seats: int, step_tokens: int, load: Sequence[int]
) -> dict[str, list[int]]:
    """Run sequences to their end, two steps in flight, as the engine's loop would: their tokens."""
    count, given, wanted = load
    scheduler = Scheduler(BlockPool(num_blocks, BLOCK), SchedulerConfig(step_tokens, seats, limit), ORDERING["fcfs"])
    made: dict[str, list[int]] = {}
    for number in range(count):
        prompt = tuple(3 + (number * 7919 + i * 31) % 300 for i in range(given))
        sampling = SamplingParams(temperature=0.0, max_tokens=wanted)
        scheduler.add(SequenceSpec(Attempt(str(number), 1), prompt, sampling), 0.0)
    in_flight: deque[tuple[StepPlan, Future[StepOutput]]] = deque()
    while True:
        plan = scheduler.plan(0.0) if len(in_flight) < 2 else None
        if plan is not None:
            in_flight.append((plan, executor.submit(plan)))
        elif in_flight:
            oldest, future = in_flight.popleft()
            for event in scheduler.commit(oldest, future.result(), 0.0):
                if isinstance(event, TokenEvent):
                    made.setdefault(event.attempt.request_id, []).extend(event.tokens)
                    if event.finish is not None:
                        executor.forget(event.attempt)
        else:
            return made


if __name__ == "__main__":
    sys.exit(main())
