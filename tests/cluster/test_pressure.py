"""Pools with room for hardly more than one sequence: reservations wait, sequences are preempted, and everything still ends."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from baton.core.topology import PoolSpec
from baton.core.view import Role
from baton.tests.cluster.live_cluster import live, topology
from baton.tests.cluster.solo import Solo

pytestmark = [pytest.mark.cluster]

MODEL_LEN = 128
BLOCK_BYTES = 64 << 10  # of 16 tokens, in float32


async def test_full_pools_neither_lock_up_nor_starve_anybody(tmp_path: Path) -> None:
    """Short and urgent prompts overtake at the prefill workers, while decode workers grant in order of arrival."""
    small = {"replicas": 2, "block_size": 16, "ordering": "shortest_prompt_first"}
    pools = (
        PoolSpec(Role.PREFILL, kv_memory_bytes=10 * BLOCK_BYTES, max_step_tokens=32, **small),  # type: ignore[arg-type]
        PoolSpec(Role.DECODE, kv_memory_bytes=12 * BLOCK_BYTES, step_delay=0.002, **small),  # type: ignore[arg-type]
    )
    asked = topology("pressure", pools=pools, local_prefill_tokens=10)
    asked = replace(asked, model=replace(asked.model, max_model_len=MODEL_LEN))
    draw, solo, attempts = random.Random(1), Solo(), Counter[int]()

    async with live(asked, tmp_path) as cluster:

        async def one(index: int) -> None:
            length = draw.choice([1, 10, 20, 40, 60, 90])
            prompt = [5 + (index * 31 + i * 7 + i * i) % 3000 for i in range(length)]
            sampling = {"temperature": 0.9, "top_p": 0.95, "seed": index} if index % 2 else {"temperature": 0.0}
            options = {**sampling, "max_tokens": draw.randint(2, MODEL_LEN - length)}
            (completion,) = await cluster.client.generate(prompt, ignore_eos=True, priority=index % 3, timeout=50.0, **options)
            assert completion.token_ids == solo.tokens(prompt, **options)  # type: ignore[arg-type]
            attempts[completion.stages.attempts] += 1

        await asyncio.gather(*(one(index) for index in range(60)))
        await cluster.baseline(members=4)
    assert sum(count for number, count in attempts.items() if number > 1) > 5, f"hardly anybody was preempted: {attempts}"
    solo.close()
