"""Routed experts as config.json describes them. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from .config_file import ConfigFile


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The routed MLPs of a model.

    num_experts, num_chosen   MLPs of a layer, and how many of them each token goes through
    inner_size       inner size of one expert
    normalized       the weights of a token's experts are scaled to a sum of 1
    dense_layers     layers that have a plain MLP instead
    """

    num_experts: int
    num_chosen: int
    inner_size: int
    normalized: bool
    dense_layers: frozenset[int] = frozenset()


def read_experts(
    file: ConfigFile, num_experts: str, default_experts: int, default_chosen: int, inner_size: int, normalized: bool
) -> ExpertsConfig:
    """What the routed families share; `num_experts` is the key, the defaults are those of a file without it."""
    key = num_experts if file.has(num_experts) else "num_local_experts"
    total = file.integer(key, default_experts)
    chosen = file.integer("num_experts_per_tok", default_chosen)
    if chosen > total:
        raise file.wrong("num_experts_per_tok", f"at most {key} ({total})")
    return ExpertsConfig(total, chosen, inner_size, normalized)
