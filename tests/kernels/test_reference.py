"""The oracle itself: against published vectors, and against formulas written another way."""

from __future__ import annotations

import math

import pytest
import torch
from baton.kernels import reference
from baton.kernels.batch import AttentionSpec, RowSpan
from torch.nn import functional


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # Known answers published with Random123 (kat_vectors, philox4x32 10).
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]) -> None:
    assert reference.philox4x32(counter, key) == words


def test_random_word_takes_its_lane_of_the_counter() -> None:
    words = reference.philox4x32((5, 7, 2, 0), (0x89ABCDEF, 0x01234567))
    assert [reference.random_word(0x0123456789ABCDEF, 2, 7, token) for token in range(20, 24)] == list(words)


def test_attention_is_causal_attention_over_the_written_cache() -> None:
    torch.manual_seed(0)
    kv = torch.full((6, 2, 2, 2, 4, 8), math.nan)  # [N, L, 2, K, S, D]
    keys, values, query = torch.randn(11, 2, 8), torch.randn(11, 2, 8), torch.randn(11, 6, 8)
    table = (5, 0, 3)
    outputs = []
    for start, length in ((0, 5), (5, 1), (6, 5)):
        row = RowSpan(0, length, start, table)
        tokens = slice(start, start + length)
        reference.write_kv(kv, 1, row, keys[tokens], values[tokens])
        outputs.append(reference.attention(query[tokens], kv, 1, row, AttentionSpec(8**-0.5)))
    expected = functional.scaled_dot_product_attention(
        query.transpose(0, 1),
        keys.repeat_interleave(3, 1).transpose(0, 1),
        values.repeat_interleave(3, 1).transpose(0, 1),
        is_causal=True,
    ).transpose(0, 1)
    torch.testing.assert_close(torch.cat(outputs), expected)
    assert kv[:, 0].isnan().all()
    assert kv[[1, 2, 4]].isnan().all()


def test_attention_sees_a_window_and_bounds_its_scores() -> None:
    torch.manual_seed(0)
    kv = torch.full((4, 1, 2, 2, 4, 8), math.nan)  # [N, L, 2, K, S, D]
    keys, values, query = torch.randn(11, 2, 8), torch.randn(11, 2, 8), torch.randn(11, 4, 8)
    row = RowSpan(0, 11, 0, (2, 0, 3))
    reference.write_kv(kv, 0, row, keys, values)
    got = reference.attention(query, kv, 0, row, AttentionSpec(1.7, window=3, softcap=0.9))
    scores = torch.einsum("qhd,khd->hqk", query * 1.7, keys.repeat_interleave(2, 1))
    distance = torch.arange(11)[:, None] - torch.arange(11)
    hidden = (distance < 0) | (distance > 2)  # a token sees itself and the two before it
    weights = torch.softmax((0.9 * torch.tanh(scores / 0.9)).masked_fill(hidden, -math.inf), dim=-1)
    torch.testing.assert_close(got, torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(2, 1)))


def test_read_kv_returns_what_was_written() -> None:
    kv = torch.zeros(4, 1, 2, 2, 4, 8)
    keys, values = torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    reference.write_kv(kv, 0, RowSpan(0, 6, 0, (3, 1)), keys, values)
    read_keys, read_values = reference.read_kv(kv, 0, (3, 1), 6)
    assert torch.equal(read_keys, keys)
    assert torch.equal(read_values, values)
    assert torch.equal(kv[1, 0, 0, :, 1], keys[5])


def test_rotary_turns_pairs_by_their_angle() -> None:
    x = torch.randn(3, 2, 8)
    angles = torch.rand(3, 4) * 6
    turned = reference.rotary(x, angles.cos(), angles.sin())
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles)[:, None]
    torch.testing.assert_close(turned, torch.cat((pairs.real, pairs.imag), -1))


def test_norm_and_swiglu() -> None:
    x, weight = torch.randn(3, 16), torch.randn(16)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), functional.rms_norm(x, (16,), weight, 1e-5))
    torch.testing.assert_close(reference.silu_mul(x), functional.silu(x[:, :8]) * x[:, 8:])
    torch.testing.assert_close(reference.gelu_mul(x), functional.gelu(x[:, :8], approximate="tanh") * x[:, 8:])
    total, normed = reference.add_rms_norm(x, x * 0.5, weight, 1e-5)
    torch.testing.assert_close(total, x * 1.5)
    torch.testing.assert_close(normed, functional.rms_norm(x * 1.5, (16,), weight, 1e-5))


def test_truncation() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, 1.0, -1.0])
    assert reference.truncate(logits, 1.0, 2, 1.0).isfinite().tolist() == [True, False, True, True, False]  # a tie at the border
    probabilities = torch.softmax(logits / 0.5, 0)
    mass = float(probabilities[0])
    assert reference.truncate(logits, 0.5, 0, mass - 1e-3).isfinite().tolist() == [True, False, False, False, False]
    assert reference.truncate(logits, 0.5, 0, mass + 1e-3).isfinite().tolist() == [True, False, True, True, False]
    assert reference.truncate(logits, 1.0, 0, 0.0).isfinite().sum() == 1
    assert reference.truncate(logits, 1.0, 0, 1.0).isfinite().all()


def test_noise_is_exponential_and_finite() -> None:
    noise = reference.exponential_noise(torch.tensor([0, 1 << 31, 0xFFFFFFFF]))
    assert noise.isfinite().all()
    assert float(noise[0]) == pytest.approx(2.0**-33)
    assert float(noise[1]) == pytest.approx(math.log(2))
    assert (noise > 0).all()
