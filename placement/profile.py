"""What was measured of one model on one kind of device, as a small YAML file: step costs by parallelism, links, host overhead.

Reading refuses what it does not understand, naming file, key, value and what is allowed; using a profile refuses another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from ..core.errors import InvalidRequest
from ..simulator.cost import LinearCost
from .model_shape import ModelShape

VERSION = 1
_HEADER = """\
# Step times measured by `baton profile`, in seconds; rates are bytes per second.
# A step costs step + token * max(tokens, floor_tokens) + pair * prefill pairs + ...: see baton/simulator/cost.py.
"""


@dataclass(frozen=True, slots=True)
class Residual:
    """How far the fitted cost is from what was measured, as shares of the measured seconds."""

    median: float
    largest: float
    samples: int


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """The cost at one parallelism; `residuals` by kind of step ("prefill", "decode", "mixed")."""

    tensor_parallel: int
    pipeline_parallel: int
    cost: LinearCost
    residuals: Mapping[str, Residual]


@dataclass(frozen=True, slots=True)
class Profile:
    """One model on one kind of device.

    fingerprint    of the model's sizes (`ModelShape.fingerprint`)
    threads        of one rank on a CPU; 0 on GPUs
    block_size     tokens of a KV block
    host_overhead  seconds between two steps in which the device waits for the host
    links          bytes/s by transport, between two workers
    """

    model: str
    fingerprint: str
    accelerator: str
    dtype: str
    kernels: str
    threads: int
    block_size: int
    host_overhead: float
    links: Mapping[str, float]
    costs: tuple[MeasuredCost, ...]

    def check_model(self, shape: ModelShape) -> None:
        """Raise InvalidRequest, naming both, when this was measured with a model of other sizes."""
        if shape.fingerprint != self.fingerprint:
            raise InvalidRequest(
                f"the profile was measured with {self.model} (sizes {self.fingerprint}) and says nothing of {shape.name} "
                f"(sizes {shape.fingerprint}); measure that with `baton profile`",
                "profile",
            )

    def cost(self, shape: ModelShape, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> LinearCost:
        """What was measured of `shape` split so. Raises InvalidRequest for another model and for what was not measured."""
        self.check_model(shape)
        for measured in self.costs:
            if (measured.tensor_parallel, measured.pipeline_parallel) == (tensor_parallel, pipeline_parallel):
                return measured.cost
        known = ", ".join(f"{m.tensor_parallel} x {m.pipeline_parallel}" for m in self.costs)
        raise InvalidRequest(
            f"the profile of {self.model} on {self.accelerator} has no step times for tensor_parallel {tensor_parallel} x "
            f"pipeline_parallel {pipeline_parallel}; it has {known}",
            "profile",
        )

    def measured(self, tensor_parallel: int, pipeline_parallel: int) -> bool:
        """Whether step times of this parallelism are here."""
        return any((m.tensor_parallel, m.pipeline_parallel) == (tensor_parallel, pipeline_parallel) for m in self.costs)


def write_profile(profile: Profile, file: Path) -> None:
    """Replace `file` at once: a reader sees the old one or the new one. Raises InvalidRequest when it cannot be written."""
    half = file.with_name(f".{file.name}.new")
    try:
        half.write_text(dump_profile(profile), encoding="utf-8")
        half.replace(file)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise InvalidRequest(f"{file} cannot be written: {error.strerror}") from error


def dump_profile(profile: Profile) -> str:
    """The text of a profile file."""
    document = {
        "profile": VERSION,
        "model": {"name": profile.model, "fingerprint": profile.fingerprint},
        "accelerator": profile.accelerator,
        "dtype": profile.dtype,
        "kernels": profile.kernels,
        "threads": profile.threads,
        "block_size": profile.block_size,
        "host_overhead": _rounded(profile.host_overhead),
        "links": {name: _rounded(rate) for name, rate in profile.links.items()},
        "costs": [
            {
                "tensor_parallel": measured.tensor_parallel,
                "pipeline_parallel": measured.pipeline_parallel,
                "coefficients": {
                    field.name: _rounded(getattr(measured.cost, field.name))
                    for field in fields(LinearCost)
                    if field.name != "stages"
                },
                "residuals": {
                    kind: {key: _rounded(value) for key, value in asdict(residual).items()}
                    for kind, residual in measured.residuals.items()
                },
            }
            for measured in profile.costs
        ],
    }
    return _HEADER + yaml.safe_dump(document, sort_keys=False)


def read_profile(file: Path) -> Profile:
    """Read a profile file. Raises InvalidRequest naming the file and every key that is wrong, its value and what is allowed."""
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidRequest(
            f"{file}: a profile cannot be read here: {why}; write one with `baton profile`", "profile"
        ) from error
    except yaml.YAMLError as error:
        raise InvalidRequest(f"{file} is not YAML: {error}", "profile") from error
    if not isinstance(document, dict):
        raise InvalidRequest(f"{file} is no profile: it holds no keys; write one with `baton profile`", "profile")
    try:
        section = _ProfileSection.model_validate(document)
    except ValidationError as error:
        problems = "\n  ".join(_explain(details) for details in error.errors())
        raise InvalidRequest(f"{file} is no profile that can be used:\n  {problems}", "profile") from error
    return _to_profile(section)


# ---- the file's sections: each field with a sentence of what is allowed ---------------------------

_Text = Annotated[str, Field(min_length=1, description="a non-empty text")]
_Degree = Annotated[int, Field(ge=1, le=1024, description="a whole number from 1 to 1024")]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False, description="a number of seconds of at least 0")]
_Share = Annotated[float, Field(ge=0, allow_inf_nan=False, description="a share of at least 0")]
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False, description="a number of bytes per second above 0")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _ModelSection(_Section):
    name: _Text
    fingerprint: _Text


class _CoefficientsSection(_Section):
    step: Annotated[float, Field(gt=0, allow_inf_nan=False, description="a number of seconds above 0")]
    token: _Seconds = 0.0
    floor_tokens: Annotated[float, Field(ge=0, allow_inf_nan=False, description="a number of tokens of at least 0")] = 0.0
    pair: _Seconds = 0.0
    prefill_context: _Seconds = 0.0
    prefill_row: _Seconds = 0.0
    decode_context: _Seconds = 0.0
    decode_row: _Seconds = 0.0
    sampled: _Seconds = 0.0


class _ResidualSection(_Section):
    median: _Share
    largest: _Share
    samples: Annotated[int, Field(ge=0, description="a whole number of at least 0")]


class _CostSection(_Section):
    tensor_parallel: _Degree
    pipeline_parallel: _Degree
    coefficients: _CoefficientsSection
    residuals: dict[str, _ResidualSection] = {}


class _ProfileSection(_Section):
    profile: Annotated[Literal[1], Field(description="1, the version of this format")]
    model: _ModelSection
    accelerator: _Text
    dtype: _Text
    kernels: _Text
    threads: Annotated[int, Field(ge=0, description="a whole number of at least 0")]
    block_size: Annotated[int, Field(ge=1, description="a whole number of at least 1")]
    host_overhead: _Seconds
    links: dict[str, _Rate]
    costs: Annotated[list[_CostSection], Field(min_length=1, description="a list of at least one parallelism")]


def _to_profile(section: _ProfileSection) -> Profile:
    return Profile(
        model=section.model.name,
        fingerprint=section.model.fingerprint,
        accelerator=section.accelerator,
        dtype=section.dtype,
        kernels=section.kernels,
        threads=section.threads,
        block_size=section.block_size,
        host_overhead=section.host_overhead,
        links=dict(section.links),
        costs=tuple(
            MeasuredCost(
                each.tensor_parallel,
                each.pipeline_parallel,
                LinearCost(**each.coefficients.model_dump(), stages=each.pipeline_parallel),
                {kind: Residual(r.median, r.largest, r.samples) for kind, r in each.residuals.items()},
            )
            for each in section.costs
        ),
    )


def _explain(details: ErrorDetails) -> str:
    """`key is value; it must be what is allowed`."""
    key = ".".join(map(str, details["loc"]))
    if details["type"] == "extra_forbidden":
        return f"{key} is no key of a profile"
    if details["type"] == "missing":
        return f"{key} is missing; it must be {_allowed(details['loc'])}"
    return f"{key} is {details['input']!r}; it must be {_allowed(details['loc'])}"


def _allowed(location: tuple[int | str, ...]) -> str:
    """The sentence of the field at `location`."""
    names = [part for part in location if isinstance(part, str)]
    for section in (_ProfileSection, _ModelSection, _CostSection, _CoefficientsSection, _ResidualSection):
        field = section.model_fields.get(names[-1]) if names else None
        if field is not None:
            return field.description or "a section"
    return "a number of bytes per second above 0" if "links" in names else "a section"


def _rounded(value: float) -> float:
    """Six digits: more is noise."""
    return value if isinstance(value, int) else float(f"{value:.6g}")
