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


def test_a_free_port_once_found_is_kept():
    config = TypeAdapter(RouterConfig).dump_json(RouterConfig("router-0", TOPOLOGY, "127.0.0.1:5")).decode()
    pinned = TypeAdapter(RouterConfig).validate_json(pin_router_ports(config, "127.0.0.1:4242", "127.0.0.1:8000"))
    router = replace(TOPOLOGY.router, grpc="0.0.0.0:4242")
    assert pinned == RouterConfig("router-0", replace(TOPOLOGY, router=router), "127.0.0.1:5")
