"""The noise of a draw on a GPU: the bits of `reference.random_word`, and Gumbel noise within 1e-6 of the CPU's."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def random_words(
    first: tl.tensor, output_index: tl.tensor, sequence_index: tl.tensor, low: tl.tensor, high: tl.tensor
) -> tl.tensor:
    """The words of tokens 4 * first, ... under a key of two words: first uint32 [N], scalars uint32 -> uint32 [4 * N].

    Philox4x32-10 (Salmon et al. 2011) of the counters (first, output_index, sequence_index, 0).
    """
    x0 = first
    x1 = tl.zeros_like(first) + output_index
    x2 = tl.zeros_like(first) + sequence_index
    x3 = tl.zeros_like(first)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(x0, 0xD2511F53), x0 * 0xD2511F53
        high1, low1 = tl.umulhi(x2, 0xCD9E8D57), x2 * 0xCD9E8D57
        x0, x1, x2, x3 = high1 ^ x1 ^ low, low1, high0 ^ x3 ^ high, low0
        low += 0x9E3779B9
        high += 0xBB67AE85
    # Joined so that the words of one counter are neighbours, and stay with the thread that made them.
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [4 * first.shape[0]])


@triton.jit
def gumbel_noise(words: tl.tensor) -> tl.tensor:
    """uint32 [N] -> float32 [N]: -log of exponential draws, as `reference.exponential_noise` makes them."""
    uniform = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # log(1 - u) by way of the rounding of 1 - u (Kahan): a device has no log1p of its own.
    rest = 1.0 - uniform
    exponential = tl.where(rest == 1.0, uniform, -tl.log(rest) * (uniform / (1.0 - rest)))
    return -tl.log(exponential)
