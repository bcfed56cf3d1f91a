"""The fast plain path on a CPU: a few large torch calls per layer, no Python work per token.

What was measured (one core, bfloat16): gathering whole blocks and two batched products beat
`scaled_dot_product_attention` 2-3x, in prefill and decode; the query heads that share a KV head are folded
into the query length, which is worth far more. In half precision the scores are rounded to the model's type
before the softmax, as in the eager attention of transformers; the softmax itself works in float32.

Shapes use the letters of `reference`; B rows of a group, C tokens of context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from .batch import AttentionSpec, DrawSpec, RowSpan
from .reference import ReferenceLinear

QUERY_TILE = 128  # queries per tile of prefill attention: bounds the scores in memory and skips what causality hides
GROUP_BYTES = 4 << 20  # KV gathered at once for decode rows: bounds padding, and what leaves the core's cache
FIRST_CANDIDATES = 256  # likeliest tokens looked at first when truncating; all of them only when those do not suffice
LARGEST_UNIFORM = 1.0 - 2.0**-24  # the float32 below 1: keeps -log(1 - u) finite

_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, E], weight [E] -> [T, E]."""
    if x.dtype == torch.float32:
        return functional.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))  # [T, 1]
    return wide.mul_(inverse).to(x.dtype).mul_(weight)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D], cos and sin [T, D / 2] -> [T, heads, D]."""
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    out = torch.empty_like(x)
    torch.mul(low, cos, out=out[..., :half]).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=out[..., half:]).addcmul_(low, sin)
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, delta [T, E] -> x + delta and its norm, both [T, E]."""
    total = x + delta
    return total, rms_norm(total, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F], gate first -> [T, F]."""
    half = gate_up.shape[-1] // 2
    return functional.silu(gate_up[:, :half]).mul_(gate_up[:, half:])


def gelu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F], gate first -> [T, F]."""
    half = gate_up.shape[-1] // 2
    return functional.gelu(gate_up[:, :half], approximate="tanh").mul_(gate_up[:, half:])


GATES = {"silu": silu_mul, "gelu_tanh": gelu_mul}


class CpuLinear(ReferenceLinear):
    """torch's own product is the fastest that torch has."""

    __slots__ = ()

    def gated(self, activation: str, x: Tensor) -> Tensor:
        """x [T, inputs] -> [T, outputs / 2]."""
        return GATES[activation](self(x))


class CpuAttention:
    """Writes and attends for one step. All index tensors are built once for all layers that see as far back."""

    def __init__(self, kv: Tensor, rows: Sequence[RowSpan]) -> None:
        num_blocks, num_layers, _, kv_heads, block_size, head_dim = kv.shape
        self._kv_heads = kv_heads
        self._head_dim = head_dim
        self._dtype = kv.dtype
        # A run is what one KV head keeps of one block in one layer, keys or values.
        self._runs = kv.view(num_blocks * num_layers * 2 * kv_heads, block_size * head_dim)
        self._slots = kv.view(-1, head_dim)
        self._layer_runs = 2 * kv_heads
        self._layer_slots = 2 * kv_heads * block_size
        self._num_layers = num_layers
        self._block_size = block_size
        self._write_at = _slot_index(rows, num_layers, kv_heads, block_size)  # [T * 2K], layer 0
        for row in rows:
            if row.clear_tail and row.end % block_size:
                kv[row.block_table[-1], :, :, :, row.end % block_size :].zero_()
        self._rows = rows
        self._longest = max((row.end for row in rows), default=0)
        self._batches: dict[int | None, _Batch] = {}  # by window
        tile = min(QUERY_TILE, max((row.num_tokens for row in rows), default=0))
        self._hidden = torch.full((tile, tile), -math.inf, dtype=kv.dtype)
        self._causal = self._hidden.triu(1)

    def run(self, layer: int, qkv: Tensor, spec: AttentionSpec, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """See `table.PagedAttention`."""
        heads = qkv.shape[1] - 2 * self._kv_heads
        if turn is not None:
            turned = qkv[:, : -self._kv_heads]
            turned.copy_(rotary(turned, *turn))
        self._slots.index_copy_(0, self._write_at + layer * self._layer_slots, qkv[:, heads:].reshape(-1, self._head_dim))
        query = qkv[:, :heads] * spec.scale  # [T, H, D]
        batch = self._batch(spec.window)
        if len(batch.groups) == 1 and not batch.chunks:
            # It is the whole batch in packed order: nothing has to be picked or put back.
            return self._decode(layer, query, batch.groups[0], spec).flatten(1)
        out = torch.empty_like(query)
        for chunk in batch.chunks:
            tokens = slice(chunk.row.offset, chunk.row.offset + chunk.row.num_tokens)
            out[tokens] = self._prefill(layer, query[tokens], qkv[tokens, heads:], chunk, spec)
        for group in batch.groups:
            out[group.tokens] = self._decode(layer, query[group.tokens], group, spec)
        return out.flatten(1)

    def _batch(self, window: int | None) -> _Batch:
        """The rows as layers of this window see them. Blocks that are behind a row's window are left out."""
        if window is not None and window >= self._longest:
            window = None
        found = self._batches.get(window)
        if found is None:
            rows = [_seen(row, window, self._block_size) for row in self._rows]
            run_blocks = GROUP_BYTES // (self._layer_slots * self._head_dim * self._slots.element_size())
            groups = group_rows([row for row in rows if row.num_tokens == 1], run_blocks)
            chunks = [self._chunk(row) for row in rows if row.num_tokens > 1]
            found = self._batches[window] = _Batch(chunks, [self._group(group, window) for group in groups])
        return found

    def _gather(self, layer: int, runs: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values [batch * K, C, D] of the blocks behind `runs` (index of layer 0)."""
        gathered = self._runs.index_select(0, runs + layer * self._layer_runs)
        keys, values = gathered.view(2, batch * self._kv_heads, -1, self._head_dim)
        return keys, values

    def _prefill(self, layer: int, query: Tensor, new_kv: Tensor, chunk: _Chunk, spec: AttentionSpec) -> Tensor:
        """query [n, H, D], new_kv [n, 2K, D] -> [n, H, D]."""
        row = chunk.row
        if chunk.runs is None:
            fresh = new_kv.transpose(0, 1).contiguous()  # [2K, n, D]
            keys, values = fresh[: self._kv_heads], fresh[self._kv_heads :]
        else:
            keys, values = self._gather(layer, chunk.runs, 1)
        group = query.shape[1] // self._kv_heads
        by_kv_head = query.view(row.num_tokens, self._kv_heads, group, self._head_dim)
        folded = by_kv_head.permute(1, 2, 0, 3)  # [K, G, n, D]
        out = torch.empty_like(by_kv_head)
        for begin in range(0, row.num_tokens, QUERY_TILE):
            end = min(row.num_tokens, begin + QUERY_TILE)
            num_queries = end - begin
            seen = slice(_first_seen(row.start + begin, spec.window), row.start + end)  # C positions
            causal = self._causal[:num_queries, :num_queries]
            left = self._left_behind(num_queries, row.start + begin, spec.window)
            for head in range(self._kv_heads):  # plain products: batched ones are slow on slices of the context
                tile = folded[head, :, begin:end].reshape(group * num_queries, -1)
                scores = _soft_capped(torch.mm(tile, keys[head, seen].t()), spec.softcap)  # [G * q, C]
                by_query = scores.view(group, num_queries, -1)
                by_query[..., -num_queries:].add_(causal)
                if left is not None:
                    by_query[..., :num_queries].add_(left)
                mixed = torch.mm(torch.softmax(scores, dim=-1), values[head, seen])  # [G * q, D]
                out[begin:end, head] = mixed.view(group, num_queries, -1).transpose(0, 1)
        return out.flatten(1, 2)

    def _left_behind(self, num_queries: int, position: int, window: int | None) -> Tensor | None:
        """What a tile's later queries see no more of what its first one, at `position`, does: 0 or -inf [q, q].

        The first column is the first position that is seen at all; None when all is seen.
        """
        # Query i sees what is behind position + i - window, column c of its row is _first_seen + c.
        if window is None or position + num_queries <= window:
            return None
        diagonal = position - window - _first_seen(position, window)
        return self._hidden[:num_queries, :num_queries].tril(diagonal)

    def _decode(self, layer: int, query: Tensor, group: _Group, spec: AttentionSpec) -> Tensor:
        """query [B, H, D] -> [B, H, D]."""
        # Whole blocks and a mask, not a slice: batched products of sliced operands are 5x slower.
        keys, values = self._gather(layer, group.runs, query.shape[0])  # [B * K, C, D]
        if group.unseen is not None:
            for part in (keys, values):
                part.view(query.shape[0], self._kv_heads, -1, self._head_dim).masked_fill_(group.unseen, 0)
        folded = query.reshape(keys.shape[0], -1, self._head_dim)  # [B * K, G, D]
        scores = _soft_capped(torch.bmm(folded, keys.transpose(1, 2)), spec.softcap)  # [B * K, G, C]
        if group.mask is not None:
            scores.view(query.shape[0], query.shape[1], -1).add_(group.mask)
        return torch.bmm(torch.softmax(scores, dim=-1), values).view(query.shape)

    def _chunk(self, row: RowSpan) -> _Chunk:
        if row.start == 0:
            return _Chunk(row, None)
        return _Chunk(row, _run_index(torch.tensor([row.block_table]), self._num_layers, self._kv_heads))

    def _group(self, rows: Sequence[RowSpan], window: int | None) -> _Group:
        longest = max(len(row.block_table) for row in rows)
        # Padding repeats a row's own first block: its content is finite, so masked scores stay -inf and not NaN.
        tables = [row.block_table + row.block_table[:1] * (longest - len(row.block_table)) for row in rows]
        context = longest * self._block_size
        places = torch.arange(context)
        hidden = places >= torch.tensor([row.end for row in rows])[:, None]  # [B, C]
        unseen = None
        if window is not None:
            hidden |= places < torch.tensor([_first_seen(row.start, window) for row in rows])[:, None]
            # What a window has passed may be anything, NaN too, and -inf does not hide that.
            unseen = hidden[:, None, :, None]
        mask = None
        if bool(hidden.any()):
            mask = torch.zeros((len(rows), 1, context), dtype=self._dtype).masked_fill_(hidden[:, None], -math.inf)
        runs = _run_index(torch.tensor(tables), self._num_layers, self._kv_heads)
        return _Group(torch.tensor([row.offset for row in rows]), runs, mask, unseen)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A prefill row. `runs` is None when it starts at 0: nothing of it has to be read back."""

    row: RowSpan
    runs: Tensor | None


@dataclass(frozen=True, slots=True)
class _Group:
    """Decode rows that are attended together.

    tokens   their packed tokens [B]
    runs     index of their blocks' runs in layer 0, [2 * B * K * blocks]
    mask     [B, 1, C], 0 or -inf; None when all have C tokens. C is a whole number of blocks
    unseen   [B, 1, C, 1], true where the mask hides what may be anything; None when what is hidden is finite
    """

    tokens: Tensor
    runs: Tensor
    mask: Tensor | None
    unseen: Tensor | None


@dataclass(frozen=True, slots=True)
class _Batch:
    """A step's rows as layers of one window see them."""

    chunks: list[_Chunk]
    groups: list[_Group]


def _seen(row: RowSpan, window: int | None, block_size: int) -> RowSpan:
    """The row without the blocks that are behind its window, positions counted from the first block that is left."""
    passed = _first_seen(row.start, window) // block_size
    return replace(row, start=row.start - passed * block_size, block_table=row.block_table[passed:]) if passed else row


def _first_seen(position: int, window: int | None) -> int:
    """The first position that the token at `position` sees."""
    return 0 if window is None else max(0, position + 1 - window)


def _soft_capped(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def group_rows(rows: Sequence[RowSpan], max_blocks: int) -> list[list[RowSpan]]:
    """Split decode rows into groups of at most `max_blocks` padded blocks (but at least one row each).

    No row is padded to more than twice its blocks. Rows stay in packed order when one group takes all.
    """
    ordered = sorted(rows, key=lambda row: len(row.block_table), reverse=True)
    groups: list[list[RowSpan]] = []
    for row in ordered:
        if groups:
            longest = len(groups[-1][0].block_table)
            if (len(groups[-1]) + 1) * longest <= max_blocks and 2 * len(row.block_table) >= longest:
                groups[-1].append(row)
                continue
        groups.append([row])
    return [list(rows)] if len(groups) == 1 else groups


def _slot_index(rows: Sequence[RowSpan], num_layers: int, kv_heads: int, block_size: int) -> Tensor:
    """Where the new keys and values of layer 0 go in the pool seen as [N * L * 2 * K * S, D]: [T * 2K]."""
    blocks: list[int] = []
    slots: list[int] = []
    for row in rows:
        position = row.start
        while position < row.end:
            until = min(row.end, position - position % block_size + block_size)
            blocks += [row.block_table[position // block_size]] * (until - position)
            slots += range(position % block_size, position % block_size + until - position)
            position = until
    block, slot = torch.tensor(blocks)[:, None], torch.tensor(slots)[:, None]  # [T, 1]
    runs = block * (num_layers * 2 * kv_heads) + torch.arange(2 * kv_heads)  # [T, 2K]
    return (runs * block_size + slot).flatten()


def _run_index(tables: Tensor, num_layers: int, kv_heads: int) -> Tensor:
    """tables [B, blocks] -> index of layer 0 into the pool seen as runs, ordered [2, B, K, blocks] and flattened."""
    first = tables[None, :, None, :] * (num_layers * 2 * kv_heads)
    which = torch.arange(2)[:, None, None, None] * kv_heads
    head = torch.arange(kv_heads)[None, None, :, None]
    return (first + which + head).flatten()


def draw(logits: Tensor, specs: Sequence[DrawSpec]) -> Tensor:
    """Gumbel-max over the truncated distribution: float32 [R, V] -> int64 [R]; see `reference.draw`."""
    temperature = torch.tensor([spec.temperature for spec in specs], dtype=torch.float32)[:, None]
    # The likeliest token stands at 0, so a tiny temperature cannot overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature)
    selective = [i for i, spec in enumerate(specs) if spec.min_p > 0.0]
    if selective:
        least = torch.tensor([math.log(specs[i].min_p) for i in selective], dtype=torch.float32)[:, None]
        likely = scaled[selective]  # the likeliest at 0, so logarithms of shares of its probability
        scaled[selective] = likely.masked_fill_(likely < least, -math.inf)
    truncated = [i for i, spec in enumerate(specs) if 0 < spec.top_k < logits.shape[1] or spec.top_p < 1.0]
    if truncated:
        scaled[truncated] = _truncate(scaled[truncated], [specs[i] for i in truncated])
    words = philox_words(
        torch.tensor([spec.seed for spec in specs]),
        torch.tensor([spec.sequence_index for spec in specs]),
        torch.tensor([spec.output_index for spec in specs]),
        logits.shape[1],
    )
    # logit + g with g = -log(e) Gumbel and e exponential.
    return torch.argmax(scaled.sub_(exponential_noise(words).log_()), dim=-1)


def _truncate(scaled: Tensor, specs: Sequence[DrawSpec]) -> Tensor:
    """Top-k, then top-p over what is left: [R, V] -> [R, V] with -inf for what is dropped; see `reference.truncate`."""
    vocabulary = scaled.shape[1]
    top_k = torch.tensor([p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in specs])[:, None]  # [R, 1]
    top_p = torch.tensor([p.top_p for p in specs], dtype=torch.float32)[:, None]
    largest_k = max((p.top_k for p in specs if p.top_k < vocabulary), default=0)
    num_candidates = min(vocabulary, max(FIRST_CANDIDATES, largest_k))
    threshold = _threshold(scaled, top_k, top_p, num_candidates)
    if threshold is None:
        threshold = _threshold(scaled, top_k, top_p, vocabulary)
    return scaled if threshold is None else scaled.masked_fill_(scaled < threshold, -math.inf)


def _threshold(scaled: Tensor, top_k: Tensor, top_p: Tensor, num_candidates: int) -> Tensor | None:
    """The smallest logit kept in each row [R, 1], or None when it is not among the `num_candidates` likeliest."""
    vocabulary = scaled.shape[1]
    ordered = scaled.topk(num_candidates, dim=-1).values  # [R, num_candidates], falling
    kth = ordered.gather(1, (top_k - 1).clamp(max=num_candidates - 1))  # [R, 1]
    kth = torch.where(top_k < vocabulary, kth, -math.inf)
    # The mass that top-p divides: all tokens of at least the k-th logit.
    total = torch.where(scaled >= kth, scaled, -math.inf).logsumexp(-1, keepdim=True)  # [R, 1]
    probabilities = (ordered - total).exp_().masked_fill_(ordered < kth, 0.0)
    before = probabilities.cumsum(-1) - probabilities  # mass of the likelier tokens
    kept = ((before < top_p) & (ordered >= kth)).sum(-1, keepdim=True).clamp_(min=1)  # [R, 1]
    undecided = (kept == num_candidates) & (top_p < 1.0) & (ordered[:, -1:] > kth)
    if num_candidates < vocabulary and bool(undecided.any()):
        return None
    last = ordered.gather(1, kept - 1)
    return torch.where(top_p < 1.0, torch.maximum(last, kth), kth)


def philox_words(seeds: Tensor, sequence_index: Tensor, output_index: Tensor, num_tokens: int) -> Tensor:
    """The random words of all candidate tokens: three int64 [R] -> int64 [R, num_tokens], each word 32 bits.

    Word t of a row is `reference.random_word(seed, sequence_index, output_index, t)`. Products of 32-bit
    numbers wrap in int64, which keeps all 64 bits; the shift carries the sign, so the mask comes last.
    """
    k0, k1 = (seeds & _MASK)[:, None], (seeds >> 32)[:, None]  # [R, 1]
    x0 = torch.arange(-(-num_tokens // 4))[None, :]  # [1, ceil(V / 4)]
    x1, x2 = output_index[:, None], sequence_index[:, None]  # [R, 1]
    x3 = torch.zeros_like(x1)
    for _ in range(10):
        p0, p1 = x0 * _PHILOX_M0, x2 * _PHILOX_M1
        x0 = ((p1 >> 32) ^ (x1 ^ k0)) & _MASK
        x2 = ((p0 >> 32) ^ (x3 ^ k1)) & _MASK
        x1, x3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _PHILOX_W0) & _MASK, (k1 + _PHILOX_W1) & _MASK
    return torch.stack((x0, x1, x2, x3), dim=-1).flatten(1)[:, :num_tokens]


def exponential_noise(words: Tensor) -> Tensor:
    """32-bit words as int64 [...] -> float32 draws of the exponential distribution [...]."""
    uniform = words.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST_UNIFORM)
    return uniform.neg_().log1p_().neg_()
