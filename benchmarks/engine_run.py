"""The measuring half of `engine.py`, in a process of its own with so many cores and threads: figures and where they come from.

    python engine_run.py --threads N --kernels NAME --rounds R --steps S --scratch FOLDER [--profile]

What is measured and what bounds it take turns within each round; a fraction is the median over rounds of bound / measured of
the same round, so that a noisy neighbour hits both. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from bounds import READ_BYTES, Linears, Reading, Timed
from clusters import random_model
from engine_rig import BASE_TOKENS, Rig, Sample, Truth, WrongOutput
from stopwatch import Stopwatch

CONTEXT = 512  # tokens: prompts, and the mean context of decode rows
SPREAD = 96  # contexts of a batch lie within CONTEXT +- this
NUM_BASES = 2
WARM_STEPS = 2  # of every decode sample: checked, not timed
BATCHES = (1, 8, 32)


@dataclass(frozen=True, slots=True)
class Options:
    threads: int
    kernels: str
    rounds: int
    steps: int
    scratch: Path


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with what checks it."""

    rig: Rig
    truth: Truth

    def decode(self, batch: int, num_steps: int, seed: int) -> Sample:
        """A checked sample; contexts of its timed steps are `CONTEXT` tokens on the mean."""
        start = CONTEXT - WARM_STEPS - (num_steps + 1) // 2
        sample = self.rig.decode(_contexts(batch, start, seed), WARM_STEPS + num_steps, seed)
        self.truth.check(f"decode batch {batch}", sample.rows)
        return sample

    def prefill(self, base: int) -> Sample:
        sample = self.rig.prefill(base, CONTEXT)
        self.truth.check(f"prefill of {CONTEXT} tokens", sample.rows)
        return sample


class Record:
    """Values by name, one per round."""

    def __init__(self) -> None:
        self._values: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float) -> float:
        self._values[name].append(value)
        return value

    def median(self, name: str) -> float:
        return statistics.median(self._values[name])

    def spread(self, name: str) -> str:
        values = self._values[name]
        return f"{min(values):.4g} to {max(values):.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kernels", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    options = Options(arguments.threads, arguments.kernels, arguments.rounds, arguments.steps, arguments.scratch)
    torch.set_num_threads(options.threads)
    try:
        figures = profile(options) if arguments.profile else measure(options)
    except WrongOutput as error:
        raise SystemExit(f"wrong output from the {options.kernels} kernels on {options.threads} threads: {error}") from error
    print(json.dumps(figures))


def measure(options: Options) -> dict[str, float]:
    """All figures of one number of threads; names end in its number, fractions of two threads in nothing."""
    large, small = (_subject(size, options, max(batches)) for size, batches in (("110M", BATCHES), ("16M", (1,))))
    with closing(large.rig), closing(small.rig):
        linears, reading = Linears(large.rig.model.config), Reading()
        record = Record()
        methods: defaultdict[str, list[str]] = defaultdict(list)
        for number in range(options.rounds):
            _round(number, options, large, linears, reading, record, methods)
            sample = small.decode(1, 4 * options.steps, number)
            record.add("step_ms_16m_b1", 1000 * _median_seconds(sample))
    _tell(options, record, methods, linears)
    return _figures(options.threads, record)


def _round(
    number: int,
    options: Options,
    large: Subject,
    linears: Linears,
    reading: Reading,
    record: Record,
    methods: defaultdict[str, list[str]],
) -> None:
    """One turn of everything on the large model."""
    repeats = 3 if options.rounds > 1 else 2

    def keep(what: str, timed: Timed) -> float:
        methods[what].append(timed.method)
        return timed.seconds

    prefill = statistics.median(_median_seconds(large.prefill(i % NUM_BASES), 0) for i in range(repeats))
    gemm = keep("products of a prefill", linears.measure_prefill(CONTEXT, repeats))
    flop_rate = record.add("gemm_flop_s", linears.prefill_flop(CONTEXT) / gemm)
    record.add("prefill_tok_s", CONTEXT / prefill)
    record.add("prefill_ms", 1000 * prefill)
    record.add("prefill_fraction", gemm / prefill)
    for batch in BATCHES:
        before = reading.measure(repeats)
        sample = large.decode(batch, options.steps, number)
        after = reading.measure(repeats)
        seconds = _median_seconds(sample)
        read = READ_BYTES / min(before.seconds, after.seconds)
        keep("reading", min(before, after, key=lambda timed: timed.seconds))
        kv = _mean_context_tokens(sample) * large.rig.layout.block_bytes / large.rig.layout.block_size
        bound = (linears.num_bytes + kv) / read
        if batch > 1:
            bound += linears.decode_flop(batch) / flop_rate
        record.add("read_b_s", read)
        record.add(f"step_ms_b{batch}", 1000 * seconds)
        record.add(f"decode_b{batch}_tok_s", batch / seconds)
        record.add(f"decode_b{batch}_fraction", bound / seconds)
        record.add(f"bound_ms_b{batch}", 1000 * bound)
        record.add(
            f"torch_linears_ms_b{batch}",
            1000 * keep(f"products of batch {batch}", linears.measure_decode(batch, repeats)),
        )


def _figures(threads: int, record: Record) -> dict[str, float]:
    rates = {f"prefill_{CONTEXT}_tok_s_{threads}t": round(record.median("prefill_tok_s"), 1)}
    rates |= {f"decode_b{batch}_tok_s_{threads}t": round(record.median(f"decode_b{batch}_tok_s"), 1) for batch in BATCHES}
    suffix = "" if threads == 2 else f"_{threads}t"
    names = ["prefill_fraction", *(f"decode_b{batch}_fraction" for batch in BATCHES)]
    fractions = {name + suffix: round(record.median(name), 3) for name in names}
    return {
        **rates,
        **fractions,
        f"step_ms_16m_b1{suffix}": round(record.median("step_ms_16m_b1"), 3),
        f"gemm_gflop_s_{threads}t": round(record.median("gemm_flop_s") / 1e9, 1),
        f"read_gb_s_{threads}t": round(record.median("read_b_s") / 1e9, 1),
    }


def _tell(options: Options, record: Record, methods: defaultdict[str, list[str]], linears: Linears) -> None:
    """For people: medians with their ranges over rounds, and what the bounds were measured with."""
    print(f"\n{options.kernels} kernels, {options.threads} threads, {options.rounds} rounds; median (range)")
    rows = [("prefill 512, ms", "prefill_ms"), ("  fraction of its products alone", "prefill_fraction")]
    for batch in BATCHES:
        rows += [
            (f"decode batch {batch}, ms a step", f"step_ms_b{batch}"),
            ("  bound, ms", f"bound_ms_b{batch}"),
            ("  fraction", f"decode_b{batch}_fraction"),
            ("  torch's linears alone, ms", f"torch_linears_ms_b{batch}"),
        ]
    rows += [("16M, batch 1, ms a step", "step_ms_16m_b1")]
    for title, name in rows:
        print(f"  {title:36} {record.median(name):9.4g}  ({record.spread(name)})")
    print(f"  products {record.median('gemm_flop_s') / 1e9:.0f} GFLOP/s, memory {record.median('read_b_s') / 1e9:.1f} GB/s,")
    print(f"  weights of the linears {linears.num_bytes / 1e6:.0f} MB")
    for what, names in methods.items():
        print(f"  {what}: fastest by {', '.join(sorted(set(names)))}")


# ---- where a step's time goes -------------------------------------------------------------------


def profile(options: Options) -> dict[str, float]:
    """Print each part of the steps and return the host's share of each: all that is not the model's forward."""
    figures: dict[str, float] = {}
    for size, batches in (("110M", BATCHES), ("16M", (1, 8))):
        watch = Stopwatch()
        subject = _subject(size, options, max(batches), watch)
        with closing(subject.rig):
            cases: list[tuple[str, Callable[[int], Sample], int]] = [("prefill", subject.prefill, 0)]
            cases += [(f"b{batch}", partial(subject.decode, batch, options.steps), WARM_STEPS) for batch in batches]
            for name, take, warm in cases:
                take(0)
                watch.reset()
                sample = take(1)
                figures[f"host_share_{size}_{name}_{options.threads}t"] = _print_profile(f"{size} {name}", sample, warm, watch)
    return figures


def _print_profile(title: str, sample: Sample, warm: int, watch: Stopwatch) -> float:
    """One table of means, so that parts add up; returns the share of what is not forward."""
    steps, forwards = sample.steps[warm:], watch.forwards[warm:]
    total = statistics.mean(step.seconds for step in steps)
    forward = statistics.mean(each.ended - each.began for each in forwards)
    hops = [step.executing - step.device for step in steps]  # half of it before the work, half after
    before = statistics.mean(each.began - step.submitted - hop / 2 for step, each, hop in zip(steps, forwards, hops, strict=True))
    after = statistics.mean(
        step.submitted + step.executing - each.ended - hop / 2 for step, each, hop in zip(steps, forwards, hops, strict=True)
    )
    kernels = {name: statistics.mean(each.kernels[name] for each in forwards) for name in forwards[0].kernels}
    setup = statistics.mean(each.setup for each in forwards)
    rows = [
        ("plan", statistics.mean(step.planning for step in steps)),
        ("to the executor's thread and back", statistics.mean(hops)),
        ("attention's set-up", setup),
        ("row spans, tensors", before - setup),
        ("forward", forward),
        *((f"    {name}", value) for name, value in sorted(kernels.items(), key=lambda item: -item[1])),
        ("    what is left of it", forward - sum(kernels.values())),
        ("sample", after),
        ("commit", statistics.mean(step.committing for step in steps)),
    ]
    print(f"\n{title}: {1000 * total:.3f} ms a step, stopwatch included")
    for name, value in rows:
        print(f"  {name:36} {1e6 * value:10.1f} us {100 * value / total:6.1f} %")
    return round(1 - forward / total, 4)


# ---- inside -------------------------------------------------------------------------------------


def _subject(size: str, options: Options, max_batch: int, watch: Stopwatch | None = None) -> Subject:
    folder, draw = random_model(size), random.Random(1)
    bases = [[draw.randrange(100, 16_000) for _ in range(BASE_TOKENS)] for _ in range(NUM_BASES)]
    truth = Truth(folder, bases, CONTEXT, options.scratch / f"truth-{size}.pt")
    return Subject(Rig(folder, options.kernels, options.threads, bases, max_batch, watch), truth)


def _contexts(batch: int, mean: int, seed: int) -> list[tuple[int, int]]:
    """`batch` contexts (base, length), ragged around `mean` and with that mean, in random order."""
    draw = random.Random(seed)
    pairs = [draw.randint(1, SPREAD) for _ in range(batch // 2)]
    lengths = [mean] * (batch % 2) + [mean + part for shift in pairs for part in (shift, -shift)]
    draw.shuffle(lengths)
    return [(number % NUM_BASES, length) for number, length in enumerate(lengths)]


def _median_seconds(sample: Sample, warm: int = WARM_STEPS) -> float:
    return statistics.median(step.seconds for step in sample.steps[warm:])


def _mean_context_tokens(sample: Sample) -> float:
    """Tokens whose KV a timed step reads, all rows together."""
    timed: Sequence = sample.steps[WARM_STEPS:]
    return statistics.mean(sum(row.end for row in step.plan.rows) for step in timed)


if __name__ == "__main__":
    main()
