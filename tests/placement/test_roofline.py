"""The prior: never faster than the device, monotone, exact over many decode steps, and right about what binds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from baton.core.errors import InvalidRequest
from baton.core.shape import StepShape
from baton.placement.efficiency import EFFICIENCIES, Efficiency, efficiency_of
from baton.placement.hardware import ACCELERATORS, find_accelerator
from baton.placement.model_shape import MODELS
from baton.placement.roofline import RooflineCost, kv_capacity, roofline_cost
from hypothesis import given
from hypothesis import strategies as st

PERFECT = Efficiency(1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1e-9, 0)
H100, A100 = find_accelerator("H100"), find_accelerator("A100")
LLAMA, MOE = MODELS["Llama-3.1-8B"], MODELS["Qwen3-30B-A3B"]


def prompt(length: int) -> StepShape:
    return StepShape(1, length, length * (length + 1) // 2, length, sampled=1)


def decode(rows: int, context: int) -> StepShape:
    return StepShape(decode_rows=rows, decode_context=context, sampled=rows)


def test_one_token_takes_the_time_of_reading_the_weights_and_the_kv():
    cost = roofline_cost(LLAMA, H100, efficiency=PERFECT)
    streamed = 2 * LLAMA.active_params + LLAMA.kv_bytes_per_token() * 1000
    assert cost.seconds(decode(1, 1000)) == pytest.approx(streamed / H100.bandwidth, rel=0.01)


def test_a_long_prompt_takes_the_time_of_its_flops():
    cost = roofline_cost(LLAMA, H100, efficiency=PERFECT)
    layers = 2 * (LLAMA.active_params - LLAMA.vocab_size * LLAMA.hidden_size) * 8192
    flops = layers + LLAMA.flops_per_pair * 8192 * 8193 / 2
    assert cost.seconds(prompt(8192)) == pytest.approx(flops / H100.flops_16, rel=0.01)


def test_narrower_weights_are_streamed_faster():
    wide, narrow = (roofline_cost(LLAMA, H100, dtype=dtype, efficiency=PERFECT) for dtype in ("bfloat16", "fp8"))
    assert narrow.seconds(decode(1, 1)) == pytest.approx(wide.seconds(decode(1, 1)) / 2, rel=0.01)


def mixed(one: StepShape, other: StepShape) -> StepShape:
    return StepShape(
        one.prefill_rows,
        one.prefill_tokens,
        one.prefill_pairs,
        one.prefill_context,
        other.decode_rows,
        other.decode_context,
        one.sampled + other.sampled,
    )


def test_rows_beside_a_long_prompt_pay_for_their_flops_and_their_kv():
    """Where FLOPs bind, the weights are read anyway: nothing else of a decode row comes for free."""
    cost = roofline_cost(LLAMA, H100, efficiency=PERFECT)
    alone = cost.seconds(prompt(4096))
    extra = cost.seconds(mixed(prompt(4096), decode(256, 256_000))) - alone
    flops = 2 * (LLAMA.active_params - LLAMA.vocab_size * LLAMA.hidden_size) * 256
    head = 2 * LLAMA.vocab_size * LLAMA.hidden_size * 256 / H100.flops_16  # more than reading it, from 256 rows on
    read = 2 * LLAMA.vocab_size * LLAMA.hidden_size / H100.bandwidth  # what the prompt alone paid for its one row
    attention = LLAMA.kv_bytes_per_token() * 256_000 / H100.bandwidth
    assert extra == pytest.approx(flops / H100.flops_16 + attention + max(0.0, head - read), rel=0.02)


def test_a_small_chunk_shares_the_reading_of_the_weights_and_nothing_else():
    """Where bytes bind, the chunk's products are hidden behind the weights; its attention and its host work are not."""
    cost = roofline_cost(LLAMA, A100)
    chunk, rows = StepShape(1, 32, 32 * 2000 + 32 * 33 // 2, 2032), decode(16, 32_000)
    both = cost.seconds(mixed(chunk, rows))
    attention = cost.layers * max(cost.pair_seconds * chunk.prefill_pairs, cost.context_seconds * chunk.prefill_context)
    activations = cost.layers * cost.token_seconds * 32
    assert both >= cost.seconds(rows) + attention + activations + cost.row_seconds
    weights = 2 * (LLAMA.active_params - LLAMA.vocab_size * LLAMA.hidden_size) / cost.bandwidth
    saved = cost.seconds(chunk) + cost.seconds(rows) - both
    assert saved == pytest.approx(weights + cost.layers * cost.layer_seconds + cost.step_seconds, rel=0.02)


def test_splitting_tensors_divides_the_work_and_adds_all_reduces():
    alone = roofline_cost(LLAMA, H100, efficiency=PERFECT)
    split = roofline_cost(LLAMA, H100, 4, efficiency=PERFECT)
    reduced = 2 * LLAMA.num_layers * 2 * (3 / 4) * 8192 * LLAMA.hidden_size * 2 / H100.link
    assert split.seconds(prompt(8192)) == pytest.approx(alone.seconds(prompt(8192)) / 4 + reduced, rel=0.02)
    across = roofline_cost(LLAMA, replace(H100, devices_per_node=2), 4, efficiency=PERFECT)
    assert across.seconds(prompt(8192)) > split.seconds(prompt(8192))


def test_stages_share_the_layers():
    alone, staged = (roofline_cost(LLAMA, H100, 1, stages, efficiency=PERFECT) for stages in (1, 4))
    assert staged.stages == 4
    assert alone.seconds(prompt(2048)) / 4 < staged.seconds(prompt(2048)) < alone.seconds(prompt(2048)) / 4 * 1.05


def test_few_tokens_read_few_experts():
    cost = roofline_cost(MOE, H100, efficiency=PERFECT)
    one, many = cost.seconds(decode(1, 1)), cost.seconds(decode(64, 64))
    assert one == pytest.approx(2 * MOE.active_params / H100.bandwidth, rel=0.02)
    assert many == pytest.approx(2 * MOE.num_params / H100.bandwidth, rel=0.1)


@pytest.mark.parametrize("shape", [LLAMA, MOE, MODELS["OPT-66B"]])
@given(
    rows=st.integers(1, 256), context=st.integers(1, 200_000), steps=st.integers(0, 200),
    tensor=st.sampled_from((1, 2, 4)), stages=st.sampled_from((1, 2)),
)  # fmt: skip
def test_many_decode_steps_cost_the_sum_of_them(shape, rows: int, context: int, steps: int, tensor: int, stages: int):
    cost = roofline_cost(shape, A100, tensor, stages)
    one_by_one = math.fsum(cost.seconds(decode(rows, context + i * rows)) for i in range(steps))
    assert cost.decode_seconds(rows, context, steps) == pytest.approx(one_by_one, rel=1e-11)


@given(st.integers(1, 4096), st.integers(1, 128), st.integers(1, 100_000))
def test_more_work_never_costs_less(tokens: int, rows: int, context: int):
    cost = roofline_cost(LLAMA, H100)
    mixed = StepShape(1, tokens, tokens * (tokens + 1) // 2, tokens, rows, context, rows + 1)
    assert cost.seconds(mixed) >= max(cost.seconds(prompt(tokens)), cost.seconds(decode(rows, context)))
    assert cost.seconds(mixed) < cost.seconds(prompt(tokens)) + cost.seconds(decode(rows, context))


@pytest.mark.parametrize("device", ACCELERATORS.values(), ids=ACCELERATORS)
def test_every_device_has_efficiencies_below_its_peaks(device):
    reached = efficiency_of(device.family)
    for share in (reached.gemm_flops, reached.gemm_bytes, reached.attention_flops, reached.attention_bytes):
        assert 0.05 < share <= 1.0
    assert roofline_cost(MODELS["Llama-3.2-1B"], device).seconds(prompt(512)) > 0


def test_families_without_measurements_take_the_default():
    assert efficiency_of("nobody's") is EFFICIENCIES["default"]


def test_kv_fits_beside_the_weights():
    assert kv_capacity(MODELS["OPT-66B"], A100) == 0
    tokens = kv_capacity(MODELS["OPT-13B"], A100)
    room = 0.9 * A100.memory_bytes - 2e9 - MODELS["OPT-13B"].weight_bytes()
    assert tokens == int(room / MODELS["OPT-13B"].kv_bytes_per_token())
    assert kv_capacity(LLAMA, H100, 2) > 2 * kv_capacity(LLAMA, H100)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(InvalidRequest, match=r"tensor_parallel is 3"):
        roofline_cost(LLAMA, H100, 3)
    with pytest.raises(InvalidRequest, match=r"dtype 'fp3'"):
        roofline_cost(LLAMA, H100, dtype="fp3")
    assert isinstance(roofline_cost(LLAMA, H100), RooflineCost)
