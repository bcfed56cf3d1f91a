"""What rows ask of the sampler, packed and read back."""

from __future__ import annotations

import pytest
import torch
from baton.core.errors import InternalError
from baton.kernels.batch import DrawSpec
from baton.kernels.draw_words import NUM_FIELDS, pack, unpack

SPECS = [
    DrawSpec(0.0, 0, 1.0, 0.0, 0, 0, 0),
    DrawSpec(0.75, 1 << 20, 0.5, 0.0, (1 << 63) - 1, 3, (1 << 31) - 1),
    DrawSpec(1.5, 7, 0.25, 0.125, 1 << 40, 0, 12),
]


def test_what_is_packed_is_read_back() -> None:
    words = torch.full((NUM_FIELDS, 5), -1, dtype=torch.int32)
    pack(SPECS, words)
    found = unpack(words)
    assert found[:2] == SPECS[:2]
    assert found[2].min_p == pytest.approx(0.125, rel=1e-6)
    assert [spec.temperature for spec in found[3:]] == [0.0, 0.0]  # padding is greedy
    assert unpack(pack(())) == []


def test_a_tensor_that_cannot_hold_them_is_refused() -> None:
    with pytest.raises(InternalError, match="3 specs need an int32 tensor"):
        pack(SPECS, torch.zeros((NUM_FIELDS, 2), dtype=torch.int32))
