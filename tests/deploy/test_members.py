"""Which processes a topology asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from baton.core.topology import ModelSpec, PoolSpec, RouterConfig, RouterSpec, Topology, WorkerConfig
from baton.core.view import Role
from baton.deploy.members import member_specs, pin_router_ports
from pydantic import TypeAdapter

TOPOLOGY = Topology(
    "chat",
    ModelSpec("/models/m"),
    (PoolSpec(Role.PREFILL, replicas=2), PoolSpec(Role.DECODE, threads=3), PoolSpec(Role.MIXED, accelerator="H100")),
    router=RouterSpec(grpc="0.0.0.0:0", http="127.0.0.1:8000"),
)


def test_one_process_per_replica_and_one_router():
    specs = member_specs(TOPOLOGY, "127.0.0.1:5", Path("/logs"))
    assert [(s.member_id, s.role, s.module, s.bundle) for s in specs] == [
        ("prefill-0", "prefill", "baton.prefill_worker.server", 0),
        ("prefill-1", "prefill", "baton.prefill_worker.server", 1),
        ("decode-0", "decode", "baton.decode_worker.server", 2),
        ("mixed-0", "mixed", "baton.decode_worker.server", 3),
        ("router-0", "router", "baton.deploy.router_process", None),
    ]
    assert [(s.num_cpus, s.num_gpus) for s in specs] == [(1, 0), (1, 0), (3, 0), (1, 1), (0, 0)]
    assert {s.log_path for s in specs} == {f"/logs/{s.member_id}.log" for s in specs}


def test_each_is_told_its_own_part():
    specs = member_specs(TOPOLOGY, "127.0.0.1:5", Path("/logs"))
    worker = TypeAdapter(WorkerConfig).validate_json(specs[2].config_json)
    assert worker == WorkerConfig("decode-0", "chat", TOPOLOGY.model, TOPOLOGY.pools[1], TOPOLOGY.kv_transfer, "127.0.0.1:5")
    assert TypeAdapter(RouterConfig).validate_json(specs[4].config_json) == RouterConfig("router-0", TOPOLOGY, "127.0.0.1:5")


def test_workers_that_share_a_gpu_are_told_its_number_or_ask_ray_for_a_part_of_one():
    pools = (
        PoolSpec(Role.PREFILL, accelerator="cuda", gpu_memory_fraction=0.4),
        PoolSpec(Role.DECODE, replicas=2, accelerator="cuda", gpu_memory_fraction=0.6),
    )
    for launcher, numbers in (("subprocess", [0, 0, 1]), ("ray", [0, 0, 0])):
        specs = member_specs(replace(TOPOLOGY, pools=pools, launcher=launcher), "127.0.0.1:5", Path("/logs"))[:3]
        assert [spec.num_gpus for spec in specs] == [0.4, 0.6, 0.6]
        assert [TypeAdapter(WorkerConfig).validate_json(spec.config_json).gpu for spec in specs] == numbers


def test_several_routers_share_everything_but_their_draws_and_tapes():
    router = replace(TOPOLOGY.router, grpc="0.0.0.0:8900", replicas=3, seed=2**63 - 2, tape="/tapes/chat")
    specs = member_specs(replace(TOPOLOGY, router=router), "127.0.0.1:5", Path("/logs"))[4:]
    assert [(s.member_id, s.role, s.log_path) for s in specs] == [
        (f"router-{index}", "router", f"/logs/router-{index}.log") for index in range(3)
    ]
    configs = [TypeAdapter(RouterConfig).validate_json(spec.config_json) for spec in specs]
    assert [config.router_id for config in configs] == ["router-0", "router-1", "router-2"]
    assert [config.topology.router.seed for config in configs] == [2**63 - 2, 2**63 - 1, 0]
    assert [config.topology.router.tape for config in configs] == ["/tapes/chat.0", "/tapes/chat.1", "/tapes/chat.2"]
    same = {replace(config.topology.router, seed=None, tape=None) for config in configs}
    assert same == {replace(router, seed=None, tape=None)}
    unseeded = member_specs(replace(TOPOLOGY, router=replace(router, seed=None, tape=None)), "127.0.0.1:5", Path("/logs"))[4:]
    routers = [TypeAdapter(RouterConfig).validate_json(spec.config_json).topology.router for spec in unseeded]
    assert {(each.seed, each.tape) for each in routers} == {(None, None)}


def test_a_free_port_once_found_is_kept():
    config = TypeAdapter(RouterConfig).dump_json(RouterConfig("router-0", TOPOLOGY, "127.0.0.1:5")).decode()
    pinned = TypeAdapter(RouterConfig).validate_json(pin_router_ports(config, "127.0.0.1:4242", "127.0.0.1:8000"))
    router = replace(TOPOLOGY.router, grpc="0.0.0.0:4242")
    assert pinned == RouterConfig("router-0", replace(TOPOLOGY, router=router), "127.0.0.1:5")
