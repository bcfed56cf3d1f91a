"""The engine alone, held against what torch and the memory of the same machine reach in the same minutes.

    .venv/bin/python benchmarks/engine.py [--quick] [--threads 2 1] [--kernels auto] [--profile]

Everything goes through the scheduler and the executor of a worker, one step at a time: plan, execute, sample, commit. Random
weights in bfloat16, blocks of 32 tokens in random order, 512-token prompts, decode contexts within 512 +- 96 tokens with that
mean. 110M is 768 wide, 12 layers, 12 heads, 4 KV heads, FFN 2,304; 16M is 256 wide, 8 layers, 4 heads, 2 KV heads, FFN 1,024;
both have a vocabulary of 16,384 and a head of its own. Each number of threads runs in a process of its own on as many cores.

prefill_512_tok_s_2t       512 / seconds of the step that prefills one prompt and samples its first token
decode_bN_tok_s_2t         N / seconds of a step with N decode rows
step_ms_16m_b1             a decode step of the 16M model with one row
prefill_fraction           seconds of the products that this prefill cannot do without, run alone / seconds of its step. Those are
                           all linears over 512 tokens, but in the last layer only keys, values and queries, and the rest of
                           it and the head over one token; measured in the model's order with weights of their own, by the
                           faster of torch's linear and oneDNN with packed weights
decode_b1_fraction         (bytes of the linears' weights + KV of the context) / read bandwidth / seconds of a step
decode_b8_fraction,        the same with the KV of all contexts, and the operations of the linears at the rate of the products
decode_b32_fraction        above added: bytes / bandwidth + operations / rate, as if the two could not overlap
gemm_gflop_s_2t            that rate
read_gb_s_2t               the bandwidth: 256 MiB read by the fastest of several torch reductions

Attention's own operations, norms, sampling and all host work are in no bound. Figures of one thread end in _1t, fractions of
two threads in nothing. Bounds are measured right before and after what they bound; fractions are medians over rounds of the
ratio within a round. Every token and the last layer's new KV of every step are compared with a float32 run of the plain torch
kernels over the same tokens; the run ends with an error when they differ by more than rounding.

--profile prints where the time of a step goes instead, and its figures are shares of the time spent outside the model.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few steps")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="one run each (default: 2 1)")
    parser.add_argument("--kernels", default="auto", help="a backend of kernels/table.py (default: auto, the fastest to be had)")
    parser.add_argument("--rounds", type=int, help="turns of everything (default: 7, quick 1)")
    parser.add_argument("--steps", type=int, help="timed steps of each decode sample (default: 24, quick 8)")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes, and measure nothing else")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (1 if arguments.quick else 7)
    steps = arguments.steps or (8 if arguments.quick else 24)
    options = ["--kernels", arguments.kernels, "--rounds", str(rounds), "--steps", str(steps)]
    options += ["--profile"] if arguments.profile else []
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="baton-benchmark-") as scratch:
        for threads in arguments.threads:
            figures |= _run(threads, [*options, "--scratch", scratch])
    print(json.dumps(figures))


def _run(threads: int, options: list[str]) -> dict[str, float]:
    """The figures of one number of threads, from a process that may use as many cores; passes on what it prints."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    if len(cores) < threads:
        raise SystemExit(f"--threads: {threads} threads need as many cores; this process may use {len(cores)}")
    command = [sys.executable, str(Path(__file__).with_name("engine_run.py")), "--threads", str(threads), *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=partial(os.sched_setaffinity, 0, cores)
    ) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            if last:
                print(last, end="", flush=True)
            last = line
    if process.returncode != 0:
        raise SystemExit(process.returncode)
    figures: dict[str, float] = json.loads(last)
    return figures


if __name__ == "__main__":
    main()
