"""Rotary positions: the angles of every position, after the scaling of long-context models.

Keys are stored turned, so a position's angles never change. That is why "dynamic" scaling, whose angles depend on
the length of the sequence, is the plain embedding here: it scales only sequences longer than the model was made
for (max_position_embeddings), and those are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .rope_config import RopeConfig


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """cos and sin of every position [P, D / 2]."""

    cos: Tensor
    sin: Tensor

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [T] -> cos and sin [T, D / 2]."""
        return self.cos[positions], self.sin[positions]


def rotary_table(
    rope: RopeConfig, head_dim: int, num_positions: int, dtype: torch.dtype, device: torch.device = torch.device("cpu")
) -> RotaryTable:
    """Computed in float32 on the CPU, the same bits for any device, then cast, as transformers does."""
    frequencies = inverse_frequencies(rope, head_dim)  # [D / 2]
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies  # [P, D / 2]
    factor = rope.attention_factor
    return RotaryTable((angles.cos() * factor).to(device, dtype), (angles.sin() * factor).to(device, dtype))


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position [D / 2], float32."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    match rope.kind:
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            return _llama3(rope, frequencies)
        case "yarn":
            return _yarn(rope, frequencies)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / frequencies
    longest = rope.original_max_position / rope.low_freq_factor
    shortest = rope.original_max_position / rope.high_freq_factor
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = torch.where(wavelength > longest, frequencies / rope.factor, frequencies)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), blended, scaled)


def _yarn(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """YaRN, section 3.2 (Peng et al. 2023): dimensions that turn often are kept, those that turn seldom are stretched."""
    num_pairs = frequencies.shape[0]

    def dimension(turns: float) -> float:
        """The pair that turns so often within the original positions."""
        return num_pairs * math.log(rope.original_max_position / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num_pairs - 1)
    ramp = (torch.arange(num_pairs, dtype=torch.float32) - low) / (high - low or 0.001)  # [D / 2]
    stretched = ramp.clamp(0, 1)
    return frequencies / rope.factor * stretched + frequencies * (1 - stretched)
