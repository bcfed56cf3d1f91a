"""What a topology becomes in simulation: blocks, nodes, costs, links, and what is said about one that cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from baton.core.errors import InvalidRequest, TopologyError
from baton.core.kv import KVLayout
from baton.core.slo import Slo
from baton.core.topology import KvTransferSpec, ModelSpec, PoolSpec, RouterSpec, Topology
from baton.core.view import Role
from baton.placement.cluster import Fabric
from baton.placement.hardware import find_accelerator
from baton.placement.model_shape import MODELS, ModelShape
from baton.placement.profile import MeasuredCost, Profile
from baton.placement.roofline import RooflineCost
from baton.placement.topology_setup import blocks_of, costs_of, fabric_of, num_devices, setup_of
from baton.simulator.cost import LinearCost

GIB = 1 << 30
SMALL = ModelShape("small", 4, 256, 576, 4, 2, 64, 4096, 1024)
LLAMA = MODELS["Llama-3.1-8B"]
COST = LinearCost(step=0.01, token=1e-4)
CPU_PROFILE = Profile(
    "small",
    SMALL.fingerprint,
    "cpu",
    "bfloat16",
    "native",
    1,
    16,
    0.002,
    {"shm": 9e9, "tcp": 3e9},
    (MeasuredCost(1, 1, COST, {}),),
)


def on_cpu(*pools: PoolSpec, **more: object) -> Topology:
    default = (PoolSpec(Role.PREFILL, block_size=16), PoolSpec(Role.DECODE, replicas=2, step_delay=0.01, block_size=16))
    return Topology("c", ModelSpec("small", max_model_len=512), pools or default, **more)  # type: ignore[arg-type]


def on_gpus(*pools: PoolSpec) -> Topology:
    return Topology("c", ModelSpec("llama", max_model_len=8192), pools)


def gpu(role: Role, name: str = "H100", **changes: object) -> PoolSpec:
    return replace(PoolSpec(role, accelerator=name, kv_memory_bytes=20 * GIB), **changes)  # type: ignore[arg-type]


def make(topology: Topology, shape: ModelShape = SMALL, *profiles: Profile):
    return setup_of(topology, shape, costs_of(topology, shape, profiles), fabric_of(topology, profiles), seed=7)


def test_everything_the_service_is_told_the_simulation_is_told() -> None:
    router = RouterSpec(routing="round_robin", admission="slo", max_queue=9, local_prefill_tokens=33, request_timeout=44.0)
    slo = Slo(0.1, 0.02, 0.95)
    pools = (
        PoolSpec(Role.PREFILL, 3, max_step_tokens=99, max_num_seqs=5, block_size=8, ordering="shortest_prompt_first"),
        PoolSpec(Role.DECODE, prefix_cache=False, step_delay=0.01, block_size=32),
    )
    setup = make(on_cpu(*pools, slo=slo, router=router, kv_transfer=KvTransferSpec(lease=5.0)))
    assert (setup.routing, setup.admission, setup.max_queue) == ("round_robin", "slo", 9)
    assert (setup.local_prefill_tokens, setup.request_timeout, setup.lease, setup.seed) == (33, 44.0, 5.0, 7)
    assert setup.slo == slo
    prefill, decode = setup.pools
    assert (prefill.role, prefill.replicas, prefill.max_step_tokens, prefill.max_num_seqs) == (Role.PREFILL, 3, 99, 5)
    assert (prefill.ordering, prefill.prefix_cache, prefill.block_size, prefill.max_model_len) == (
        "shortest_prompt_first", True, 8, 512,
    )  # fmt: skip
    assert (decode.prefix_cache, decode.overhead, decode.block_size) == (False, 0.01, 32)


def test_blocks_are_those_that_a_worker_makes_of_its_memory() -> None:
    pool = PoolSpec(Role.MIXED, kv_memory_bytes=64 << 20, block_size=16)
    layout = KVLayout(SMALL.num_layers, SMALL.num_kv_heads, SMALL.head_dim, 16, "bfloat16")
    assert blocks_of(on_cpu(pool), pool, SMALL) == (64 << 20) // layout.block_bytes
    split = gpu(Role.MIXED, tensor_parallel=4, pipeline_parallel=2)
    whole = gpu(Role.MIXED)
    assert blocks_of(on_gpus(split), split, LLAMA) == 8 * blocks_of(on_gpus(whole), whole, LLAMA)


def test_blocks_are_what_a_gpu_has_room_for_where_the_topology_names_no_size() -> None:
    alone, shared = (gpu(Role.MIXED, kv_memory_bytes=0, gpu_memory_fraction=share) for share in (None, 0.45))
    per_block = LLAMA.rank_kv_bytes_per_token(1, 1, "bfloat16") * alone.block_size
    taken = blocks_of(on_gpus(alone), alone, LLAMA) * per_block, blocks_of(on_gpus(shared), shared, LLAMA) * per_block
    memory = find_accelerator("H100").memory_bytes
    assert taken[0] - taken[1] == pytest.approx(0.45 * memory, rel=0.01)
    assert taken[0] < 0.9 * memory - LLAMA.rank_weight_bytes(1, 1, "bfloat16")


def test_measured_costs_are_used_where_there_are_some() -> None:
    costs = costs_of(on_cpu(), SMALL, [CPU_PROFILE])
    assert costs[Role.PREFILL].cost == COST
    assert costs[Role.PREFILL].overhead == 0.002
    assert costs[Role.PREFILL].source == "measured on 1 core of a CPU"
    setup = make(on_cpu(), SMALL, CPU_PROFILE)
    assert [pool.overhead for pool in setup.pools] == [0.002, pytest.approx(0.012)]


def test_without_a_profile_a_roofline_says_so() -> None:
    costs = costs_of(on_gpus(gpu(Role.PREFILL, tensor_parallel=2), gpu(Role.DECODE, "A100-80GB", pipeline_parallel=4)), LLAMA)
    assert costs[Role.PREFILL].source == "roofline of H100, not measured"
    assert isinstance(costs[Role.DECODE].cost, RooflineCost)
    assert costs[Role.DECODE].cost.stages == 4


def test_two_threads_are_not_priced_like_one() -> None:
    mixed = on_cpu(PoolSpec(Role.MIXED, threads=2))
    with pytest.raises(TopologyError, match="measured on cpu with 1 threads; the pools are mixed: 2 cores of a CPU"):
        costs_of(mixed, SMALL, [CPU_PROFILE])
    both = costs_of(mixed, SMALL, [replace(CPU_PROFILE, threads=2, costs=(MeasuredCost(1, 1, LinearCost(step=0.5), {}),))])
    assert both[Role.MIXED].cost == LinearCost(step=0.5)


def test_a_profile_of_another_model_or_parallelism_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="measured with small"):
        costs_of(on_cpu(), replace(SMALL, num_layers=5), [CPU_PROFILE])
    h100 = replace(CPU_PROFILE, accelerator="H100", threads=0, fingerprint=LLAMA.fingerprint)
    with pytest.raises(InvalidRequest, match="no step times for tensor_parallel 2"):
        costs_of(on_gpus(gpu(Role.MIXED, tensor_parallel=2)), LLAMA, [h100])


def test_links_are_measured_ones_or_those_of_the_data_sheet() -> None:
    assert fabric_of(on_cpu(), [CPU_PROFILE]).node_link == 9e9
    assert fabric_of(on_cpu(kv_transfer=KvTransferSpec(transport="tcp")), [CPU_PROFILE]).node_link == 3e9
    assert fabric_of(on_cpu(kv_transfer=KvTransferSpec(transport="grpc")), [CPU_PROFILE]) == fabric_of(on_cpu())
    mixed = fabric_of(on_gpus(gpu(Role.PREFILL, "H100"), gpu(Role.DECODE, "A100-80GB")))
    alone = fabric_of(on_gpus(gpu(Role.MIXED, "A100-80GB")))
    assert (mixed.node_link, mixed.network) == (alone.node_link, alone.network), "the slower end decides"
    setup = setup_of(on_cpu(), SMALL, costs_of(on_cpu(), SMALL), Fabric(5.0, 6.0, 7.0, 8.0))
    network = setup.network
    assert (network.node_bandwidth, network.bandwidth, network.latency, network.control) == (5.0, 6.0, 7.0, 8.0)
    assert network.kv_bytes_per_token == 2 * 4 * 2 * 64 * 2


def nodes(*pools: PoolSpec, shape: ModelShape = LLAMA) -> list[tuple[int, ...]]:
    return [pool.nodes for pool in make(on_gpus(*pools), shape).pools]


def test_workers_fill_nodes_one_after_the_other() -> None:
    # 8 devices a node: three workers of 2 leave room for one of 2, not for one of 4.
    assert nodes(gpu(Role.PREFILL, replicas=3, tensor_parallel=2), gpu(Role.DECODE, replicas=2, tensor_parallel=4)) == [
        (0, 0, 0), (1, 1),
    ]  # fmt: skip
    assert nodes(gpu(Role.PREFILL, replicas=3, tensor_parallel=2), gpu(Role.DECODE, replicas=2, tensor_parallel=2)) == [
        (0, 0, 0), (0, 1),
    ]  # fmt: skip


def test_kinds_of_device_do_not_share_a_node_and_a_big_worker_takes_several() -> None:
    assert nodes(gpu(Role.PREFILL), gpu(Role.DECODE, "A100-80GB")) == [(0,), (1,)]
    wide = gpu(Role.DECODE, replicas=2, tensor_parallel=8, pipeline_parallel=2)
    assert nodes(wide, gpu(Role.PREFILL)) == [(0, 2), (4,)]


def test_all_cpu_workers_are_on_this_machine() -> None:
    assert [pool.nodes for pool in make(on_cpu()).pools] == [(0,), (0, 0)]


def test_devices_are_counted() -> None:
    assert num_devices(on_gpus(gpu(Role.PREFILL, replicas=3, tensor_parallel=2), gpu(Role.DECODE, pipeline_parallel=4))) == 10
    assert num_devices(on_cpu(PoolSpec(Role.MIXED, replicas=2, threads=3))) == 6


@pytest.mark.parametrize(
    ("topology", "shape", "said"),
    [
        (
            on_gpus(gpu(Role.DECODE, kv_memory_bytes=GIB // 2)),
            LLAMA,
            "pools.decode.kv_memory: 0.5 GiB hold 4096 tokens; one sequence of 8192 tokens needs 1 GiB",
        ),
        (on_gpus(gpu(Role.DECODE, kv_memory_bytes=70 * GIB)), LLAMA, "70 GiB do not fit beside 15 GiB of weights"),
        (on_gpus(gpu(Role.DECODE)), MODELS["Llama-3.1-70B"], "do not fit beside 131 GiB of weights into the 80 GiB of H100"),
        (
            on_gpus(gpu(Role.DECODE, tensor_parallel=3)),
            LLAMA,
            "pools.decode.tensor_parallel: 3 does not split Llama-3.1-8B; use 1, 2",
        ),
        (on_gpus(gpu(Role.DECODE, pipeline_parallel=33)), LLAMA, "pools.decode.pipeline_parallel: 33 is more than the 32 layers"),
        (on_gpus(gpu(Role.DECODE)), MODELS["Llama-2-7B"], "model.max_model_len: 8192 is more than Llama-2-7B was made for"),
    ],
)
def test_what_cannot_be_is_refused_naming_the_key(topology: Topology, shape: ModelShape, said: str) -> None:
    costs = costs_of(on_gpus(gpu(Role.DECODE)), LLAMA)
    with pytest.raises(TopologyError) as raised:
        setup_of(topology, shape, costs)
    assert said in str(raised.value)


def test_all_problems_are_told_at_once() -> None:
    small = {"kv_memory_bytes": 1 << 20}
    topology = on_gpus(gpu(Role.PREFILL, **small), gpu(Role.DECODE, **small))
    with pytest.raises(TopologyError) as raised:
        setup_of(topology, LLAMA, costs_of(topology, LLAMA))
    assert "pools.prefill.kv_memory" in str(raised.value)
    assert "pools.decode.kv_memory" in str(raised.value)


def test_an_unknown_accelerator_names_those_that_are_known() -> None:
    with pytest.raises(InvalidRequest, match=r"accelerator 'X1' is not known; use one of A100-40GB"):
        costs_of(on_gpus(gpu(Role.MIXED, "X1")), LLAMA)
