"""What a handoff costs: its exposed time under load, and the rate at which each transport moves KV.

    .venv/bin/python benchmarks/handoff.py [--quick] [--requests 60]

exposed_ms_p50   from the first token at the router to "all KV has landed, the decode worker has adopted the sequence"; the
                 running decode step, for whose end the sequence then waits, is not in it. 512-token prompts of the
                 110M Llama (bf16) at half of what the prefill worker can do, over shm
shm_gb_s, grpc_gb_s, memcpy_gb_s   two processes, 16 MiB pushes, checksums on, beside a plain copy in the same run

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from pathlib import Path

from baton.bench.prompts import PromptSource
from baton.client.client import AsyncClient
from baton.client.types import Stages
from baton.simulator.workload.lengths import Length
from baton.simulator.workload.planned import PlannedRequest
from baton.simulator.workload.synthetic import poisson_workload
from clusters import median_ms, one_prefill_one_decode, serving

INPUT, OUTPUT = 512, 32


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 requests, shorter transfers")
    parser.add_argument("--requests", type=int, default=60)
    arguments = parser.parse_args()
    figures = _transports(arguments.quick)
    figures |= await _exposed(20 if arguments.quick else arguments.requests)
    print(json.dumps(figures))


async def _exposed(num_requests: int) -> dict[str, float]:
    prompts = PromptSource(seed=5, vocab_size=16_384)
    async with serving(one_prefill_one_decode("shm")) as cluster, AsyncClient(cluster.grpc) as client:

        async def ask(planned: PlannedRequest) -> Stages:
            await asyncio.sleep(planned.at)
            (completion,) = await client.generate(
                prompts.token_ids(planned), max_tokens=planned.output_tokens, temperature=0.0, ignore_eos=True
            )
            return completion.stages

        lone = [await ask(PlannedRequest(1_000_000 + i, 0.0, INPUT, 2)) for i in range(5)]
        prefill = statistics.median(stages.prefill for stages in lone)
        workload = poisson_workload(
            0.5 / prefill, Length("fixed", INPUT, INPUT), Length("fixed", OUTPUT, OUTPUT), num_requests=num_requests, seed=5
        )
        done = await asyncio.gather(*(ask(planned) for planned in workload))
    exposed = sorted(stages.handoff for stages in done)
    return {
        "exposed_ms_p50": median_ms(exposed),
        "exposed_ms_p90": round(1000 * exposed[int(0.9 * (len(exposed) - 1))], 2),
        "first_decode_ms_p50": median_ms([stages.first_decode for stages in done]),
        "lone_prefill_ms_p50": round(1000 * prefill, 1),
    }


def _transports(quick: bool) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).with_name("transport.py")), *(["--quick"] if quick else [])]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return {name: figures[name] for name in ("shm_gb_s", "grpc_gb_s", "memcpy_gb_s")}


if __name__ == "__main__":
    asyncio.run(main())
