"""Which processes a topology asks for, and what each is told at its start. Starts nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from ..core.topology import RouterConfig, Topology, WorkerConfig
from ..core.view import Role
from .gpus import assign_gpus
from .launcher import MemberSpec
from .schema import split_host_port

ENTRY_POINTS = {
    Role.PREFILL: "baton.prefill_worker.server",
    Role.DECODE: "baton.decode_worker.server",
    Role.MIXED: "baton.decode_worker.server",
}
ROUTER_ENTRY_POINT = "baton.deploy.router_process"

_WORKER_CONFIG = TypeAdapter(WorkerConfig)
_ROUTER_CONFIG = TypeAdapter(RouterConfig)


def member_specs(topology: Topology, controller: str, logs: Path) -> tuple[MemberSpec, ...]:
    """One spec per worker of every pool and one per router. `controller` is host:port; `logs` a folder."""
    specs: list[MemberSpec] = []
    # Ray shows every worker the GPU that it gave it and no other: there the number is always 0.
    gpus = None if topology.launcher == "ray" else assign_gpus(topology.pools)
    for pool in topology.pools:
        for index in range(pool.replicas):
            gpu = 0 if gpus is None else gpus[len(specs)]
            config = WorkerConfig(
                f"{pool.role}-{index}", topology.cluster, topology.model, pool, topology.kv_transfer, controller, gpu=gpu
            )
            specs.append(_worker_spec(config, logs, bundle=len(specs)))
    specs += [_router_spec(topology, index, controller, logs) for index in range(topology.router.replicas)]
    return tuple(specs)


def pin_router_ports(config_json: str, grpc: str, http: str) -> str:
    """The router's configuration with "any free port" replaced by the ports that it now has."""
    config = _ROUTER_CONFIG.validate_json(config_json)
    router = config.topology.router
    router = replace(router, grpc=_pin(router.grpc, grpc), http=_pin(router.http, http))
    return _ROUTER_CONFIG.dump_json(replace(config, topology=replace(config.topology, router=router))).decode()


def _worker_spec(config: WorkerConfig, logs: Path, bundle: int) -> MemberSpec:
    pool = config.pool
    return MemberSpec(
        member_id=config.worker_id,
        cluster=config.cluster,
        role=pool.role.value,
        module=ENTRY_POINTS[pool.role],
        config_json=_WORKER_CONFIG.dump_json(config).decode(),
        log_path=str(logs / f"{config.worker_id}.log"),
        num_cpus=1.0 if pool.on_gpu else float(pool.threads),
        num_gpus=pool.gpu_share,
        bundle=bundle,
    )


def _router_spec(topology: Topology, index: int, controller: str, logs: Path) -> MemberSpec:
    router_id = f"router-{index}"
    config = RouterConfig(router_id, _own_part(topology, index), controller)
    return MemberSpec(
        member_id=router_id,
        cluster=topology.cluster,
        role="router",
        module=ROUTER_ENTRY_POINT,
        config_json=_ROUTER_CONFIG.dump_json(config).decode(),
        log_path=str(logs / f"{router_id}.log"),
    )


def _own_part(topology: Topology, index: int) -> Topology:
    """Of several routers each draws numbers of its own and writes a tape of its own, named after it."""
    router = topology.router
    if router.replicas == 1:
        return topology
    seed = None if router.seed is None else (router.seed + index) % (1 << 63)
    tape = None if router.tape is None else f"{router.tape}.{index}"
    return replace(topology, router=replace(router, seed=seed, tape=tape))


def _pin(wanted: str, actual: str) -> str:
    if not actual or split_host_port(wanted)[1] != 0:
        return wanted
    return f"{wanted.rpartition(':')[0]}:{split_host_port(actual)[1]}"
