"""Rotary positions as config.json describes them, in both spellings: `rope_theta` + `rope_scaling`, and `rope_parameters`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config_file import ConfigFile

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions; the formulas are in `rotary`.

    kind              one of ROPE_KINDS; the fields after `theta` matter to some of the scaled kinds only
    factor            how much longer the context became, of every scaled kind
    low_freq_factor, high_freq_factor   of llama3
    original_max_position   positions before scaling, of llama3 and yarn
    attention_factor  factor of cos and sin, of yarn
    beta_fast, beta_slow    turns within the original positions above and below which yarn extrapolates and interpolates
    truncate          whether yarn widens that range to whole dimensions
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def read_rope(file: ConfigFile, theta: float = 10000.0) -> RopeConfig:
    """The one rotary embedding of a model; theta is what the family takes when the file is silent."""
    name = "rope_parameters" if file.has("rope_parameters") else "rope_scaling"
    fields = file.section(name)
    if nested := fields.sections():
        raise file.wrong(name, f"one object of plain values for all layers; it has one for {nested[0]!r}")
    return read_rope_section(file, fields, fields.number("rope_theta", file.number("rope_theta", theta)))


def read_rope_section(file: ConfigFile, fields: ConfigFile, theta: float) -> RopeConfig:
    """What `fields`, an object of `file`, says of rotary positions."""
    for section in (file, fields):
        if section.number("partial_rotary_factor", 1.0) != 1.0:
            raise section.wrong("partial_rotary_factor", "1.0 or absent")
    key = "rope_type" if fields.has("rope_type") else "type"
    kind = fields.text(key, "default")
    if kind not in ROPE_KINDS:
        raise fields.wrong(key, f"one of {', '.join(ROPE_KINDS)}")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind in ("linear", "dynamic"):
        return RopeConfig(kind, theta, fields.number("factor"))
    inner = fields.integer("original_max_position_embeddings", _max_position(file))
    original = file.integer("original_max_position_embeddings", inner)
    if kind == "yarn":
        return _read_yarn(fields, theta, fields.number("factor", _max_position(file) / original), original)
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if low >= high:
        raise fields.wrong("low_freq_factor", f"less than high_freq_factor ({high})")
    return RopeConfig(kind, theta, fields.number("factor"), low, high, original)


def _read_yarn(fields: ConfigFile, theta: float, factor: float, original: int) -> RopeConfig:
    fast, slow = fields.number("beta_fast", 32.0), fields.number("beta_slow", 1.0)
    if fast <= slow:
        raise fields.wrong("beta_fast", f"more than beta_slow ({slow})")
    attention = _mscale(factor, 1.0)
    if fields.has("mscale") and fields.has("mscale_all_dim"):
        attention = _mscale(factor, fields.number("mscale")) / _mscale(factor, fields.number("mscale_all_dim"))
    return RopeConfig(
        "yarn",
        theta,
        factor,
        original_max_position=original,
        attention_factor=fields.number("attention_factor", attention),
        beta_fast=fast,
        beta_slow=slow,
        truncate=fields.flag("truncate", default=True),
    )


def _mscale(factor: float, weight: float) -> float:
    """YaRN, section 3.4 (Peng et al. 2023)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _max_position(file: ConfigFile) -> int:
    return file.integer("max_position_embeddings", 2048)
