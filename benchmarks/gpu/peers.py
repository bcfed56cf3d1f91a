"""What other code reaches on the same GPU, with the same shapes: transformers and torch's own attention.

    python benchmarks/gpu/peers.py [--model llama-3.1-8b] [--quick]
    python benchmarks/gpu/peers.py --device cpu     # no GPU: proves the script on a tiny shape, times nothing real

transformers_bN_ms      a decode step of transformers with a static cache, compiled, at context 1,024
sdpa_prefill_share      torch's scaled_dot_product_attention on a prompt of 8,192 tokens: share of the rate of a large product
sdpa_decode_b64_share   and on 64 rows at context 4,096, the keys and values contiguous: share of the bandwidth of a plain copy
flex_prefill_share      FlexAttention, compiled, causal, on the same prompt

Random weights, bfloat16. The last line is JSON. Without a GPU the script says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial

import torch
from baton.engine.random_config import config_json
from baton.engine.rope_config import RopeConfig
from baton.kernels.device import CudaDevice, Device, HostDevice
from models import KINDS, Kind
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from engine import copy_rate, product_rate, seconds_of


@dataclass(frozen=True)
class Sizes:
    """What is run."""

    batches: tuple[int, ...]
    context: int
    prompt: int
    rows: int
    long_context: int
    product: int
    copied: int
    compiled: bool


FULL = Sizes((1, 64), 1024, 8192, 64, 4096, 8192, 2 << 30, True)
QUICK = Sizes((1,), 1024, 8192, 64, 4096, 8192, 1 << 30, True)
TINY = Sizes((1, 2), 16, 64, 2, 32, 64, 1 << 16, False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(KINDS))
    parser.add_argument("--quick", action="store_true", help="batch 1 alone")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu proves the script", file=sys.stderr)
        return 2
    device: Device = HostDevice() if on_cpu else CudaDevice()
    name, sizes = ("tiny", TINY) if on_cpu else (options.model, QUICK if options.quick else FULL)
    with torch.inference_mode():
        figures = attention(device, KINDS[name], sizes) | transformers_steps(device, KINDS[name], sizes)
    print(json.dumps({"device": device.name, "model": name} | figures))
    return 0


def attention(device: Device, kind: Kind, sizes: Sizes) -> dict[str, float]:
    dtype, where = torch.bfloat16, device.torch_device
    copy, product = copy_rate(device, sizes.copied), product_rate(device, sizes.product, dtype)
    heads, kv_heads, size = kind.shape.num_heads, kind.shape.num_kv_heads, kind.shape.head_dim

    def drawn(rows: int, count: int, length: int) -> torch.Tensor:
        return torch.randn((rows, count, length, size), device=where).to(dtype)

    q, k, v = drawn(1, heads, sizes.prompt), drawn(1, kv_heads, sizes.prompt), drawn(1, kv_heads, sizes.prompt)
    work = 2 * heads * size * sizes.prompt**2  # causal: half of the pairs, twice, two operations each
    seconds = seconds_of(device, lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    figures = {"sdpa_prefill_share": round(work / seconds / product, 3)}
    if sizes.compiled:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, sizes.prompt, sizes.prompt, device=where)
        flex = torch.compile(flex_attention)
        seconds = seconds_of(device, lambda: flex(q, k, v, block_mask=mask, enable_gqa=True))
        figures["flex_prefill_share"] = round(work / seconds / product, 3)
    q, k, v = (
        drawn(sizes.rows, heads, 1),
        drawn(sizes.rows, kv_heads, sizes.long_context),
        drawn(sizes.rows, kv_heads, sizes.long_context),
    )
    seconds = seconds_of(device, lambda: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    figures[f"sdpa_decode_b{sizes.rows}_share"] = round(2 * k.numel() * dtype.itemsize / seconds / copy, 3)
    return figures


def transformers_steps(device: Device, kind: Kind, sizes: Sizes) -> dict[str, float]:
    fields = config_json(kind.family, kind.shape, kind.max_model_len, RopeConfig(theta=500000.0))
    config = AutoConfig.for_model(**{key: value for key, value in fields.items() if key != "architectures"})
    with device.torch_device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True) if sizes.compiled else model
    figures = {}
    for batch in sizes.batches:
        cache = StaticCache(config=config, max_cache_len=sizes.context + 16)
        prompt = torch.randint(0, kind.shape.vocab_size, (batch, sizes.context), device=device.torch_device)
        model(prompt, past_key_values=cache, use_cache=True)
        token, place = prompt[:, :1].clone(), torch.tensor([sizes.context], device=device.torch_device)
        run = partial(step, token, past_key_values=cache, use_cache=True, cache_position=place)
        seconds = seconds_of(device, run, repeats=5)
        figures[f"transformers_b{batch}_ms"] = round(1e3 * seconds, 3)
    return figures


if __name__ == "__main__":
    sys.exit(main())
