"""What a topology file may contain: one pydantic model per section, each field with a sentence of what is allowed.

The sentence (`description`) is what an error message shows, so it must be true and complete.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ..core.topology import CPU
from ..kv_transfer.registry import TRANSPORTS
from ..policy.admission import ADMISSION
from ..policy.ordering import ORDERING
from ..policy.routing import ROUTING

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power for suffix, base in (("iB", 1024), ("B", 1000)) for power, prefix in enumerate("KMGT", start=1)
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B|B)?")
_ACCELERATORS = "cpu, cuda (any NVIDIA GPU) or the name of a GPU such as H100"
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_PLACEMENTS = ("pack", "strict_pack", "spread", "strict_spread")
_LAUNCHERS = ("ray", "subprocess")
_DTYPES = ("float32", "bfloat16", "float16")
_KERNELS = ("auto", "native", "cpu", "triton", "reference")


def _one_of(names: tuple[str, ...]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in names:
            raise ValueError("not one of the names")
        return value

    return AfterValidator(check)


def _said(names: tuple[str, ...]) -> str:
    return "one of " + ", ".join(names)


def parse_size(value: object) -> object:
    """Bytes from 1073741824, "1GiB", "1.5GB"; anything else is returned as it is, for the type check to refuse."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(float(match[1]) * _UNITS[match[2] or ""]) if "." in match[1] else int(match[1]) * _UNITS[match[2] or ""]
    return value


def split_host_port(value: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port". Raises ValueError for anything else."""
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("not host:port")
    if (":" in host) != (host.startswith("[") and host.endswith("]")) or any(c.isspace() or c == "/" for c in host):
        raise ValueError("not host:port")
    return host.strip("[]"), int(port)


def _host_port(value: str) -> str:
    split_host_port(value)
    return value


def label(value: str) -> str:
    """`value` if it can name a cluster. Raises ValueError otherwise."""
    if not _LABEL.fullmatch(value):
        raise ValueError("not a label")
    return value


_ROUTING, _ADMISSION, _ORDERING = tuple(sorted(ROUTING)), tuple(sorted(ADMISSION)), tuple(sorted(ORDERING))
_TRANSPORTS = ("auto", *sorted(name for name in TRANSPORTS if name != "auto"))

_Text = Annotated[str, Field(min_length=1, description="a non-empty text")]
_Address = Annotated[str, AfterValidator(_host_port), Field(description='"host:port", port 0 for any free one')]
_Degree = Annotated[int, Field(ge=1, le=1024, description="a whole number from 1 to 1024")]
_Count = Annotated[int, Field(ge=1, le=1 << 24, description="a whole number from 1 to 16777216")]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False, description="a number of seconds above 0")]
_Switch = Annotated[bool, Field(description="true or false")]
_Size = Annotated[
    int,
    BeforeValidator(parse_size),
    Field(ge=1 << 12, le=1 << 50, description='a size of at least 4KiB, such as 268435456, "256MiB" or "60GiB"'),
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(_Section):
    path: Annotated[str, Field(min_length=1, description="a folder in Hugging Face format (relative to this file), or a hub id")]
    revision: _Text | None = Field(default=None, description="a non-empty text")
    dtype: Annotated[str, _one_of(_DTYPES), Field(description=_said(_DTYPES))] = "bfloat16"
    max_model_len: Annotated[int, Field(ge=2, le=1 << 24)] | None = Field(
        default=None, description="a whole number from 2 to 16777216"
    )
    name: _Text | None = Field(default=None, description="a non-empty text")
    kernels: Annotated[str, _one_of(_KERNELS), Field(description=_said(_KERNELS))] = "auto"
    deterministic: _Switch = False


class SloSection(_Section):
    ttft: _Seconds = 1.0
    tpot: _Seconds = 0.05
    attainment: Annotated[float, Field(gt=0, le=1, description="a share above 0 and at most 1")] = 0.9


class PoolSection(_Section):
    replicas: _Degree = 1
    tensor_parallel: _Degree = 1
    pipeline_parallel: _Degree = 1
    accelerator: Annotated[str, Field(min_length=1, description=_ACCELERATORS)] = CPU
    max_step_tokens: _Count = 2048
    max_num_seqs: _Count = 64
    block_size: Annotated[int, Field(ge=1, le=1024, description="a whole number from 1 to 1024")] = 32
    kv_memory: _Size | None = Field(default=None, description='a size of at least 4KiB, such as 268435456, "256MiB" or "60GiB"')
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="a share of one GPU's memory, above 0 and at most 1"
    )
    threads: _Degree = 1
    prefix_cache: _Switch = True
    ordering: Annotated[str, _one_of(_ORDERING), Field(description=_said(_ORDERING))] = "fcfs"
    step_delay: Annotated[float, Field(ge=0, le=3600, description="a number of seconds from 0 to 3600")] = 0.0


class PoolsSection(_Section):
    prefill: PoolSection | None = Field(default=None, description="a mapping of pool settings")
    decode: PoolSection | None = Field(default=None, description="a mapping of pool settings")
    mixed: PoolSection | None = Field(default=None, description="a mapping of pool settings")


class KvTransferSection(_Section):
    transport: Annotated[str, _one_of(_TRANSPORTS), Field(description=_said(_TRANSPORTS))] = "auto"
    lease: _Seconds = 3.0
    checksum: _Switch = True


class RouterSection(_Section):
    grpc: _Address = "127.0.0.1:8900"
    http: _Address = "127.0.0.1:8000"
    routing: Annotated[str, _one_of(_ROUTING), Field(description=_said(_ROUTING))] = "least_loaded"
    admission: Annotated[str, _one_of(_ADMISSION), Field(description=_said(_ADMISSION))] = "none"
    max_queue: _Count = 1024
    local_prefill_tokens: Annotated[int, Field(ge=0, le=1 << 24, description="a whole number from 0 to 16777216")] = 0
    request_timeout: _Seconds = 600.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = Field(
        default=None, description="a whole number from 0 to 9223372036854775807"
    )
    tape: _Text | None = Field(default=None, description="the path of a file (relative to where the router runs)")
    replicas: _Degree = 1


class RaySection(_Section):
    address: _Text | None = Field(default=None, description='"auto" or "host:port" of a Ray cluster')
    placement: Annotated[str, _one_of(_PLACEMENTS), Field(description=_said(_PLACEMENTS))] = "pack"


class TopologySection(_Section):
    """The whole file."""

    cluster: Annotated[
        str, AfterValidator(label), Field(description="a name of at most 63 small letters, digits and inner hyphens")
    ]
    model: ModelSection = Field(description="a mapping with at least `path`")
    pools: PoolsSection = Field(description="a mapping with `prefill` and `decode`, or `mixed`, or all three")
    slo: SloSection = Field(default=SloSection(), description="a mapping of objectives")
    kv_transfer: KvTransferSection = Field(default=KvTransferSection(), description="a mapping of transfer settings")
    router: RouterSection = Field(default=RouterSection(), description="a mapping of router settings")
    launcher: Annotated[str, _one_of(_LAUNCHERS), Field(description=_said(_LAUNCHERS))] = "ray"
    ray: RaySection = Field(default=RaySection(), description="a mapping of Ray settings")
    labels: dict[str, str] = Field(default={}, description="a mapping of texts to texts")
