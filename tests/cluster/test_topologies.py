"""Whatever the topology, the text is that of one mixed worker, token for token: greedy and seeded, new and known prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from baton.core.slo import Slo
from baton.core.topology import KvTransferSpec, PoolSpec, Topology
from baton.core.view import Role
from baton.tests.cluster.live_cluster import LiveCluster, live, topology
from baton.tests.cluster.solo import Solo

pytestmark = [pytest.mark.cluster]

SEEDED = {"temperature": 0.9, "top_p": 0.95}
SMALL = PoolSpec(Role.MIXED, block_size=16, kv_memory_bytes=24 << 20, max_num_seqs=32)


@pytest.fixture(scope="module")
def solo() -> Iterator[Solo]:
    solo = Solo()
    yield solo
    solo.close()


def pool(role: Role, **changes: object) -> PoolSpec:
    return replace(SMALL, role=role, **changes)  # type: ignore[arg-type]


def prompt(index: int, length: int) -> list[int]:
    return [5 + (index * 31 + i * 7 + i * i) % 3000 for i in range(length)]


def asked(name: str, *pools: PoolSpec, transfer: KvTransferSpec = KvTransferSpec(), **router: object) -> Topology:
    return replace(topology(name, pools=pools, **router), kv_transfer=transfer)


async def check_exact(cluster: LiveCluster, solo: Solo, lengths: Sequence[int], max_tokens: int = 24) -> None:
    """Every prompt twice, greedy and seeded; the second time it is a prefix hit somewhere. Then everything is at rest."""

    async def one(index: int, length: int, sampling: dict[str, float]) -> None:
        tokens = prompt(index, length)
        options = {"temperature": 0.0, **sampling, "max_tokens": max_tokens}
        (completion,) = await cluster.client.generate(tokens, ignore_eos=True, **options)
        assert completion.token_ids == solo.tokens(tokens, **options), f"prompt {index} of {length} tokens, {sampling}"

    for _ in range(2):
        plans = [(i, length, s) for i, length in enumerate(lengths) for s in ({}, {**SEEDED, "seed": 7 + i})]
        await asyncio.gather(*(one(*plan) for plan in plans))
    await cluster.baseline(members=len(await cluster.load()))


LENGTHS = (1, 15, 16, 17, 33, 100, 257, 600)

TOPOLOGIES = {
    "two-mixed": asked("two-mixed", pool(Role.MIXED, replicas=2, max_step_tokens=128), routing="round_robin"),
    "two-and-two-small-chunks": asked(
        "2p2d",
        *(pool(role, replicas=2, max_step_tokens=16) for role in (Role.PREFILL, Role.DECODE)),
        routing="random",
    ),
    "all-three-pools": asked(
        "all-three",
        *(pool(role) for role in Role),
        routing="join_shortest_queue",
        admission="slo",
        local_prefill_tokens=64,
    ),
    "blocks-of-16-to-32-over-grpc": asked(
        "b1632",
        pool(Role.PREFILL, max_step_tokens=24),
        pool(Role.DECODE, block_size=32),
        transfer=KvTransferSpec("grpc"),
        admission="queue_length",
    ),
    "blocks-of-32-to-16-without-prefix-cache": asked(
        "b3216",
        pool(Role.PREFILL, block_size=32, max_step_tokens=100, ordering="shortest_prompt_first", prefix_cache=False),
        pool(Role.DECODE, prefix_cache=False),
    ),
}


@pytest.mark.parametrize("name", TOPOLOGIES)
async def test_text_is_exact(name: str, solo: Solo, tmp_path: Path) -> None:
    patient = replace(TOPOLOGIES[name], slo=Slo(ttft=60.0, tpot=1.0, attainment=0.9))  # so that admission sheds nobody
    async with live(patient, tmp_path) as cluster:
        await check_exact(cluster, solo, LENGTHS)
