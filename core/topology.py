"""A deployment as frozen data. Read from YAML by `deploy.settings`; nothing here reads a file."""

from __future__ import annotations

from dataclasses import dataclass, field

from .slo import Slo
from .view import Role

CPU, ANY_GPU = "cpu", "cuda"  # accelerators that are no model's name
GPU_MEMORY_FRACTION = 0.9  # of a GPU that a worker has to itself: the rest is for the driver, libraries and fragments


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What is served.

    path           a Hugging Face directory, or a hub id (then `revision` applies)
    max_model_len  None takes the model's own limit
    kernels        `auto` (the fastest to be had) or the name of a backend
    deterministic  results of a request do not depend on what runs beside it, nor on interruptions; slower
    """

    path: str
    revision: str | None = None
    dtype: str = "bfloat16"
    max_model_len: int | None = None
    name: str | None = None
    kernels: str = "auto"
    deterministic: bool = False

    @property
    def served_name(self) -> str:
        """The name clients use: `name`, or the last part of the path."""
        return self.name or self.path.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """One pool of equal workers.

    accelerator      `cpu`, `cuda` for any NVIDIA GPU, or the name of a GPU in the hardware catalogue
    max_step_tokens  token budget of a step (chunked prefill)
    max_num_seqs     sequences in one step at most
    kv_memory_bytes  size of the KV pool per rank; 0, on a GPU only: whatever is left of the worker's share of its memory
    gpu_memory_fraction  share of one GPU's memory that a rank may fill, everything counted: workers may share a GPU whose
                     shares add up to at most 1. None: a GPU of its own, of which it fills GPU_MEMORY_FRACTION
    threads          torch threads of one rank on CPU
    step_delay       seconds added to every step; for tests and demonstrations of slow hardware
    """

    role: Role
    replicas: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    accelerator: str = CPU
    max_step_tokens: int = 2048
    max_num_seqs: int = 64
    block_size: int = 32
    kv_memory_bytes: int = 256 << 20
    threads: int = 1
    prefix_cache: bool = True
    ordering: str = "fcfs"
    step_delay: float = 0.0
    gpu_memory_fraction: float | None = None

    @property
    def on_gpu(self) -> bool:
        return self.accelerator != CPU

    @property
    def gpu_share(self) -> float:
        """How much of one GPU a rank takes away from others; 0 on the CPU."""
        return (self.gpu_memory_fraction or 1.0) if self.on_gpu else 0.0

    @property
    def gpu_memory_limit(self) -> float:
        """The share of its GPU's memory that a rank may fill; 0 on the CPU."""
        return (self.gpu_memory_fraction or GPU_MEMORY_FRACTION) if self.on_gpu else 0.0


@dataclass(frozen=True, slots=True)
class KvTransferSpec:
    """transport is `auto` (the best that reaches a peer) or the name of one. lease in seconds."""

    transport: str = "auto"
    lease: float = 3.0
    checksum: bool = True


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """grpc and http are host:port, port 0 means any free port.

    max_queue             admission `queue_length` and `slo`: requests in flight or waiting at most, in each router; each of n
                          sequences counts
    local_prefill_tokens  prompts up to this length are prefilled on the decode worker
    request_timeout       seconds after which a request without a deadline of its own is given up
    seed                  of the router's random draws; None draws one
    tape                  file that records every event the router's lifecycle sees, with its answers (see `router.tape`);
                          several routers write one each, `.0`, `.1`, ... behind its name
    replicas              router processes, which share both ports when there are several
    """

    grpc: str = "127.0.0.1:8900"
    http: str = "127.0.0.1:8000"
    routing: str = "least_loaded"
    admission: str = "none"
    max_queue: int = 1024
    local_prefill_tokens: int = 0
    request_timeout: float = 600.0
    seed: int | None = None
    tape: str | None = None
    replicas: int = 1


@dataclass(frozen=True, slots=True)
class Topology:
    """Everything `baton up` needs. launcher is `ray` or `subprocess`; ray_address None starts a local Ray.

    ray_placement is the strategy of the placement group: `pack`, `strict_pack`, `spread` or `strict_spread`.
    """

    cluster: str
    model: ModelSpec
    pools: tuple[PoolSpec, ...]
    slo: Slo = Slo()
    kv_transfer: KvTransferSpec = KvTransferSpec()
    router: RouterSpec = RouterSpec()
    launcher: str = "ray"
    ray_address: str | None = None
    labels: tuple[tuple[str, str], ...] = field(default=())
    ray_placement: str = "pack"

    def pool(self, role: Role) -> PoolSpec | None:
        """The pool of one role, or None."""
        return next((pool for pool in self.pools if pool.role is role), None)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What the process of one worker is started with.

    controller    host:port of the controller it registers with
    bind_host     address its servers listen on (and announce)
    orphan_grace  seconds it goes on serving without a controller before it ends itself
    gpu           number of its GPU among those that its process sees
    """

    worker_id: str
    cluster: str
    model: ModelSpec
    pool: PoolSpec
    kv_transfer: KvTransferSpec
    controller: str
    bind_host: str = "127.0.0.1"
    orphan_grace: float = 60.0
    gpu: int = 0


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """What the process of one router is started with.

    bind_host     what it announces for a wildcard, and where one of several listens for those who mean it alone
    orphan_grace  as in `WorkerConfig`
    """

    router_id: str
    topology: Topology
    controller: str
    bind_host: str = "127.0.0.1"
    orphan_grace: float = 60.0
