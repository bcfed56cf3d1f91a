"""From a YAML file to a frozen `Topology`, and back; and everything that Baton takes from the environment.

Every problem of a file is reported at once, each with file, line, key, value and what is allowed. No other
module reads the environment, and nothing here starts or connects to anything.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..core.errors import TopologyError
from ..core.slo import Slo
from ..core.topology import CPU, KvTransferSpec, ModelSpec, PoolSpec, RouterSpec, Topology
from ..core.view import Role
from .schema import PoolSection, TopologySection, label
from .yaml_marks import Document, KeyPath, Marks, YamlValue, read_document, write_document

KV_MEMORY_ON_CPU = 256 << 20  # bytes, of a pool that names no size
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class TopologyFile:
    """A topology and the places its keys were read from."""

    topology: Topology
    marks: Marks


def load_topology(path: Path) -> Topology:
    """The topology in the YAML file `path`. Raises TopologyError with every problem of the file."""
    return read_topology_file(path).topology


def read_topology_file(path: Path) -> TopologyFile:
    """As `load_topology`, keeping the line of every key. Raises TopologyError with every problem of the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TopologyError(f"{path}: there is no such file; needed: a topology file, such as examples/local.yaml") from None
    except IsADirectoryError:
        raise TopologyError(f"{path}: this is a folder; needed: a topology file, such as examples/local.yaml") from None
    except UnicodeDecodeError:
        raise TopologyError(f"{path}: this is not text; needed: a topology file, YAML in UTF-8") from None
    except OSError as error:
        raise TopologyError(f"{path}: cannot read this topology file: {error.strerror}") from None
    return parse_topology(text, str(path), path.resolve().parent)


def parse_topology(text: str, file: str, folder: Path) -> TopologyFile:
    """As `read_topology_file`, from `text`; relative model paths start at `folder`."""
    document = read_document(text, file)
    problems = list(document.duplicates)
    section: TopologySection | None = None
    if not isinstance(document.data, dict):
        problems.append(
            f"{file}:1: a topology is a mapping with at least {_required_keys()}; this file holds {_show(document.data)}"
        )
    else:
        try:
            section = TopologySection.model_validate(document.data)
        except ValidationError as error:
            problems += [_explain(details, document) for details in error.errors(include_url=False)]
        problems += _pool_problems(document.data.get("pools"), document.marks)
    if problems or section is None:
        raise TopologyError("\n".join(sorted(problems, key=_line_of)))
    return TopologyFile(_to_topology(section, folder), document.marks)


def dump_topology(topology: Topology) -> str:
    """`topology` as YAML that `load_topology` reads back to an equal one."""
    model = {
        "path": topology.model.path,
        "revision": topology.model.revision,
        "dtype": topology.model.dtype,
        "max_model_len": topology.model.max_model_len,
        "name": topology.model.name,
        "kernels": topology.model.kernels,
        "deterministic": topology.model.deterministic,
    }
    ray: dict[str, YamlValue] = {"placement": topology.ray_placement}
    if topology.ray_address is not None:
        ray["address"] = topology.ray_address
    document: dict[str, YamlValue] = {
        "cluster": topology.cluster,
        "model": {key: value for key, value in model.items() if value is not None},
        "slo": {"ttft": topology.slo.ttft, "tpot": topology.slo.tpot, "attainment": topology.slo.attainment},
        "pools": {str(pool.role): _dump_pool(pool) for pool in topology.pools},
        "kv_transfer": {
            "transport": topology.kv_transfer.transport,
            "lease": topology.kv_transfer.lease,
            "checksum": topology.kv_transfer.checksum,
        },
        "router": _dump_router(topology.router),
        "launcher": topology.launcher,
        "ray": ray,
        "labels": {**dict(topology.labels)},
    }
    return write_document(document)


def check_cluster_name(name: str) -> str:
    """`name` if a cluster may be called so. Raises TopologyError otherwise."""
    try:
        return label(name)
    except ValueError:
        allowed = TopologySection.model_fields["cluster"].description
        raise TopologyError(f"cluster: {name!r} is not allowed; allowed: {allowed}") from None


# ---- the environment ----------------------------------------------------------------------------


def state_folder() -> Path:
    """Where Baton keeps state files and logs: `$XDG_STATE_HOME/baton`, or `~/.local/state/baton`."""
    root = os.environ.get("XDG_STATE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".local" / "state") / "baton"


def prepare_ray_environment() -> None:
    """Settle what Ray would otherwise take from leftovers on this machine. Must run before `import ray`.

    Without RAY_AUTH_MODE a forgotten `~/.ray/auth_token` changes how a cluster starts. What the user has set stays.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


# ---- from sections to the topology --------------------------------------------------------------


def _to_topology(section: TopologySection, folder: Path) -> Topology:
    pools = {Role.PREFILL: section.pools.prefill, Role.DECODE: section.pools.decode, Role.MIXED: section.pools.mixed}
    return Topology(
        cluster=section.cluster,
        model=ModelSpec(
            _resolve_model(section.model.path, folder),
            section.model.revision,
            section.model.dtype,
            section.model.max_model_len,
            section.model.name,
            section.model.kernels,
            section.model.deterministic,
        ),
        pools=tuple(_to_pool(role, pool) for role, pool in pools.items() if pool is not None),
        slo=Slo(**section.slo.model_dump()),
        kv_transfer=KvTransferSpec(**section.kv_transfer.model_dump()),
        router=RouterSpec(**section.router.model_dump()),
        launcher=section.launcher,
        ray_address=section.ray.address,
        ray_placement=section.ray.placement,
        labels=tuple(section.labels.items()),
    )


def _to_pool(role: Role, section: PoolSection) -> PoolSpec:
    fields = section.model_dump()
    kv_memory = fields.pop("kv_memory")
    if kv_memory is None:
        kv_memory = KV_MEMORY_ON_CPU if section.accelerator == CPU else 0
    return PoolSpec(role=role, kv_memory_bytes=kv_memory, **fields)


def _dump_pool(pool: PoolSpec) -> dict[str, YamlValue]:
    fields: dict[str, YamlValue] = {
        "replicas": pool.replicas,
        "tensor_parallel": pool.tensor_parallel,
        "pipeline_parallel": pool.pipeline_parallel,
        "accelerator": pool.accelerator,
        "max_step_tokens": pool.max_step_tokens,
        "max_num_seqs": pool.max_num_seqs,
        "block_size": pool.block_size,
        "threads": pool.threads,
        "prefix_cache": pool.prefix_cache,
        "ordering": pool.ordering,
        "step_delay": pool.step_delay,
    }
    if pool.kv_memory_bytes:
        fields["kv_memory"] = _dump_size(pool.kv_memory_bytes)
    if pool.gpu_memory_fraction is not None:
        fields["gpu_memory_fraction"] = pool.gpu_memory_fraction
    return fields


def _dump_router(router: RouterSpec) -> dict[str, YamlValue]:
    fields: dict[str, YamlValue] = {
        "grpc": router.grpc,
        "http": router.http,
        "routing": router.routing,
        "admission": router.admission,
        "max_queue": router.max_queue,
        "local_prefill_tokens": router.local_prefill_tokens,
        "request_timeout": router.request_timeout,
        "replicas": router.replicas,
    }
    optional: dict[str, YamlValue] = {"seed": router.seed, "tape": router.tape}
    return fields | {key: value for key, value in optional.items() if value is not None}


def _dump_size(num_bytes: int) -> YamlValue:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes % size == 0:
            return f"{num_bytes // size}{unit}"
    return num_bytes


def _resolve_model(path: str, folder: Path) -> str:
    """An absolute folder, or a hub id as it stands. "org/name" is a hub id unless there is such a folder."""
    local = folder / Path(path).expanduser()
    if _HUB_ID.fullmatch(path) and not local.is_dir():
        return path
    return os.path.normpath(local)


# ---- problems -----------------------------------------------------------------------------------


def _explain(details: ErrorDetails, document: Document) -> str:
    """One problem as `file:line: key: what is wrong and what is allowed`."""
    path = tuple(details["loc"])
    marks = document.marks
    parent, allowed = _lookup(path)
    if details["type"] == "extra_forbidden":
        known = sorted(parent.model_fields) if parent else []
        close = difflib.get_close_matches(str(path[-1]), known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{marks.at(path)}: unknown key; {hint}allowed here: {', '.join(known)}"
    if details["type"] == "missing":
        return f"{marks.at(path)}: missing; needed: {allowed}"
    quoted = details["type"] in ("int_type", "float_type", "bool_type") and _plain_number(details["input"])
    hint = ", written without quotes" if quoted else ""
    return f"{marks.at(path)}: {_show(details['input'])} is not allowed; allowed: {allowed}{hint}"


def _plain_number(value: object) -> bool:
    """Whether it is a number (or true, false) in quotes."""
    return isinstance(value, str) and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?|true|false", value.strip()) is not None


def _lookup(path: KeyPath) -> tuple[type[BaseModel] | None, str]:
    """The section that holds the last key of `path`, and what that key allows."""
    section: type[BaseModel] | None = TopologySection
    allowed = "a topology"
    for key in path[:-1]:
        field = section.model_fields.get(str(key)) if section else None
        allowed = field.description or "" if field else allowed
        section = _section_of(field.annotation) if field else None
    field = section.model_fields.get(str(path[-1])) if section else None
    return section, (field.description or "" if field else allowed)


def _section_of(annotation: object) -> type[BaseModel] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _pool_problems(pools: YamlValue, marks: Marks) -> list[str]:
    """A cluster needs somebody who prefills and somebody who decodes."""
    if not isinstance(pools, dict):
        return []  # reported as missing or as a wrong type
    problems = [
        f"{marks.at(('pools', role))}: empty; allowed: a mapping of pool settings, {{}} for the defaults"
        for role in (str(role) for role in Role)
        if role in pools and pools[role] is None
    ]
    has_mixed, has_prefill, has_decode = "mixed" in pools, "prefill" in pools, "decode" in pools
    if has_prefill != has_decode and not has_mixed:
        where = marks.at(("pools",))
        missing, present = ("decode", "prefill") if has_prefill else ("prefill", "decode")
        problems.append(f"{where}: a {present} pool needs a {missing} pool beside it; add pools.{missing} or pools.mixed")
    elif not (has_mixed or has_prefill):
        problems.append(f"{marks.at(('pools',))}: no pool; needed: prefill and decode, or mixed")
    return problems


def _required_keys() -> str:
    return ", ".join(name for name, field in TopologySection.model_fields.items() if field.is_required())


def _show(value: object) -> str:
    words = {None: "nothing", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else "a mapping" if isinstance(value, dict) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _line_of(problem: str) -> int:
    match = re.search(r":(\d+):", problem)
    return int(match[1]) if match else 0
