"""The oracle of every kernel, and what a reader reads first: plain, slow and obviously right.

Faster kernels are tested against these functions. Nothing here may be optimised.

Letters used for shapes: T packed tokens of a step, H query heads, K KV heads, G = H / K query heads per KV
head, D head dimension, S slots per block, N blocks, L layers, V vocabulary.
The pool is `kv[N, L, 2, K, S, D]`; index 0 of the third axis is keys, 1 is values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .batch import AttentionSpec, DrawSpec, RowSpan

_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
FP8_MAX = 448.0  # the largest number of float8_e4m3fn
LARGEST_UNIFORM = 1.0 - 2.0**-24  # the float32 below 1: keeps -log(1 - u) finite


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, E], weight [E] -> [T, E]. In float32, cast back before the weight (Zhang and Sennrich 2019)."""
    wide = x.float()  # [T, E]
    mean_square = wide.pow(2).mean(-1, keepdim=True)  # [T, 1]
    return weight * (wide * torch.rsqrt(mean_square + eps)).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D], cos and sin [T, D / 2] -> [T, heads, D].

    Dimension i is paired with i + D / 2 and turned by the angle of its token (Su et al. 2021, in the
    half-split order of the Hugging Face models).
    """
    low, high = x.chunk(2, dim=-1)  # [T, heads, D / 2] each
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, D / 2]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, delta [T, E] -> x + delta and its norm, both [T, E]: the end of one half of a layer and the start of the next."""
    total = x + delta
    return total, rms_norm(total, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F], gate first -> silu(gate) * up [T, F] (SwiGLU, Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)  # [T, F] each
    return gate * torch.sigmoid(gate.float()).to(gate.dtype) * up


def gelu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F], gate first -> gelu(gate) * up [T, F], with the tanh form of gelu (GEGLU, Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)  # [T, F] each
    return functional.gelu(gate.float(), approximate="tanh").to(gate.dtype) * up


GATES = {"silu": silu_mul, "gelu_tanh": gelu_mul}


@dataclass(frozen=True, slots=True)
class ReferenceLinear:
    """y = x W' + b: weight [outputs, inputs], bias [outputs] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, inputs] -> [T, outputs]."""
        return functional.linear(x, self.weight, self.bias)

    def gated(self, activation: str, x: Tensor) -> Tensor:
        """x [T, inputs] -> [T, outputs / 2]."""
        return GATES[activation](self(x))

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight: index int64 [T] -> [T, inputs]."""
        return self.weight[index]


def write_kv(kv: Tensor, layer: int, row: RowSpan, keys: Tensor, values: Tensor) -> None:
    """Store keys and values [row.num_tokens, K, D] at positions [start, end) of the row's blocks."""
    block_size = kv.shape[4]
    for i in range(row.num_tokens):
        position = row.start + i
        block, slot = row.block_table[position // block_size], position % block_size
        kv[block, layer, 0, :, slot] = keys[i]
        kv[block, layer, 1, :, slot] = values[i]


def read_kv(kv: Tensor, layer: int, block_table: Sequence[int], num_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values [num_tokens, K, D] of the first positions of a block table."""
    block_size = kv.shape[4]
    slots = [kv[block_table[p // block_size], layer, :, :, p % block_size] for p in range(num_tokens)]  # [2, K, D] each
    stacked = torch.stack(slots, dim=1)  # [2, num_tokens, K, D]
    return stacked[0], stacked[1]


def attention(query: Tensor, kv: Tensor, layer: int, row: RowSpan, spec: AttentionSpec) -> Tensor:
    """Causal attention of one row over its cache: query [row.num_tokens, H, D] -> [row.num_tokens, H, D].

    The token at position p sees the positions [0, p], or the last `spec.window` of them. In float32 throughout.
    """
    keys, values = read_kv(kv, layer, row.block_table, row.end)  # [end, K, D]
    group = query.shape[1] // keys.shape[1]
    out = torch.empty_like(query)
    for i in range(row.num_tokens):
        end = row.start + i + 1
        begin = 0 if spec.window is None else max(0, end - spec.window)
        for head in range(query.shape[1]):
            k = keys[begin:end, head // group].float()  # [visible, D]
            v = values[begin:end, head // group].float()  # [visible, D]
            scores = k @ query[i, head].float() * spec.scale  # [visible]
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            weights = torch.softmax(scores, dim=0)
            out[i, head] = (weights @ v).to(query.dtype)
    return out


def convert(x: Tensor, dtype: torch.dtype, scales: Tensor) -> Tensor:
    """x as another type. An 8-bit number times its scale is what it stands for: `scales` broadcasts to x, and is used only
    where one of the two types has 8 bits. What 8 bits cannot hold becomes their largest number."""
    if x.dtype == dtype:
        return x
    if dtype == torch.float8_e4m3fn:
        return (x.float() / scales).clamp(-FP8_MAX, FP8_MAX).to(dtype)
    if x.dtype == torch.float8_e4m3fn:
        return (x.float() * scales).to(dtype)
    return x.to(dtype)


def gather_blocks(kv: Tensor, blocks: Sequence[int], layers: range, heads: range, dtype: torch.dtype, scales: Tensor) -> Tensor:
    """Parts of some blocks of kv[N, L, 2, K, S, D], packed: [blocks, layers, 2, heads, S, D] of `dtype`.

    scales  float32 [L, 2, K], of stored numbers; see `convert`
    """
    cut = (slice(layers.start, layers.stop), slice(None), slice(heads.start, heads.stop))
    return convert(kv[list(blocks)][:, *cut], dtype, scales[cut][..., None, None])


def scatter_blocks(kv: Tensor, blocks: Sequence[int], staged: Tensor, layers: range, heads: range, scales: Tensor) -> None:
    """The way back: staged[blocks, layers, 2, heads, S, D] into the same parts of some blocks of kv[N, L, 2, K, S, D]."""
    cut = (slice(layers.start, layers.stop), slice(None), slice(heads.start, heads.stop))
    for block, part in zip(blocks, staged, strict=True):
        kv[block][cut] = convert(part, kv.dtype, scales[cut][..., None, None])


class ReferenceAttention:
    """One step's attention, row by row. Has the face of every attention backend: see `table.PagedAttention`."""

    def __init__(self, kv: Tensor, rows: Sequence[RowSpan]) -> None:
        self._kv = kv  # [N, L, 2, K, S, D]
        self._rows = rows

    def run(self, layer: int, qkv: Tensor, spec: AttentionSpec, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """qkv [T, H + 2K, D], turn cos and sin [T, D / 2] or None; returns [T, H * D]."""
        kv_heads = self._kv.shape[3]
        heads = qkv.shape[1] - 2 * kv_heads
        if turn is not None:
            qkv = torch.cat((rotary(qkv[:, : heads + kv_heads], *turn), qkv[:, heads + kv_heads :]), dim=1)
        out = qkv.new_empty((qkv.shape[0], heads * qkv.shape[2]))  # [T, H * D]
        for row in self._rows:
            tokens = slice(row.offset, row.offset + row.num_tokens)
            query, keys, values = torch.split(qkv[tokens], [heads, kv_heads, kv_heads], dim=1)
            write_kv(self._kv, layer, row, keys, values)
            out[tokens] = attention(query, self._kv, layer, row, spec).flatten(1)
        return out


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit words of a 128-bit counter under a 64-bit key (Salmon et al., SC 2011)."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _PHILOX_M0 * x0, _PHILOX_M1 * x2  # 64-bit products
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 & _MASK, (p0 >> 32) ^ x3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _PHILOX_W0) & _MASK, (k1 + _PHILOX_W1) & _MASK
    return x0, x1, x2, x3


def random_word(seed: int, sequence_index: int, output_index: int, token: int) -> int:
    """The 32 random bits that belong to one candidate token at one place of one sequence.

    A draw depends on nothing else, so it is the same in any batch, on any worker, after any retry.
    """
    key = (seed & _MASK, seed >> 32)
    return philox4x32((token // 4, output_index, sequence_index, 0), key)[token % 4]


def exponential_noise(words: Tensor) -> Tensor:
    """32-bit words as int64 [...] -> float32 draws of the exponential distribution [...].

    u = (word + 0.5) / 2**32 and e = -log(1 - u): small e, which decide the draw, come from small u, where
    float32 is fine-grained.
    """
    uniform = ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=LARGEST_UNIFORM)
    return -torch.log1p(-uniform)


def gumbel_sample(logits: Tensor, seed: int, sequence_index: int, output_index: int) -> int:
    """Draw one token from softmax(logits), logits [V] (-inf bans a token).

    The Gumbel-max trick: argmax of logit + g with g = -log(e), e exponential.
    """
    words = [random_word(seed, sequence_index, output_index, token) for token in range(logits.shape[0])]
    noise = -torch.log(exponential_noise(torch.tensor(words)))  # [V]
    return int(torch.argmax(logits.float() + noise))


def argmax(logits: Tensor) -> Tensor:
    """The likeliest token of every row, the lowest of equals: [R, V] -> int64 [R]."""
    return torch.argmax(logits.float(), dim=-1)


def draw(logits: Tensor, specs: Sequence[DrawSpec]) -> Tensor:
    """A token for every row of logits: float32 [R, V] -> int64 [R]. A token at -inf is impossible."""
    kept = [truncate(row, spec.temperature, spec.top_k, spec.top_p, spec.min_p) for row, spec in zip(logits, specs, strict=True)]
    keys = [(spec.seed, spec.sequence_index, spec.output_index) for spec in specs]
    return torch.tensor([gumbel_sample(row, *key) for row, key in zip(kept, keys, strict=True)], dtype=torch.int64)


def truncate(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """Scale and truncate logits [V]: temperature, then min-p, top-k and top-p; dropped tokens become -inf.

    Tokens that tie with the last one kept are kept too, so the result does not depend on a sort's order.
    """
    scaled = (logits.float() - logits.float().max()) / temperature  # [V], the likeliest at 0
    if min_p > 0.0:
        scaled = scaled.masked_fill(scaled < math.log(min_p), -math.inf)
    if 0 < top_k < scaled.shape[0]:
        scaled = scaled.masked_fill(scaled < scaled.sort(descending=True).values[top_k - 1], -math.inf)
    if top_p < 1.0:
        ordered = scaled.sort(descending=True).values  # [V]
        probabilities = torch.softmax(ordered, dim=0)
        before = probabilities.cumsum(0) - probabilities  # mass of the likelier tokens
        num_kept = max(1, int((before < top_p).sum()))
        scaled = scaled.masked_fill(scaled < ordered[num_kept - 1], -math.inf)
    return scaled
