"""A paged pool full of NaN, rows with shuffled blocks, and what attention over them must give."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from baton.kernels.batch import AttentionSpec, RowSpan
from torch import Tensor

NAN = float("nan")
Shapes = Sequence[tuple[int, int]]  # start and num_tokens of each row


@dataclass(frozen=True)
class Problem:
    """A step of one layer among two. `scales` are those of a float8 pool, [2, 2, K]."""

    shapes: Shapes
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    spec: AttentionSpec = AttentionSpec(0.15)
    turned: bool = True
    scales: Tensor | None = None
    device: str = "cpu"
    seed: int = 0
    spare_blocks: int = 3
    layer: int = 1

    def rows(self) -> tuple[list[RowSpan], int]:
        """Rows with shuffled blocks, and the number of blocks of a pool that holds some more."""
        counts = [-(-(start + n) // self.block_size) for start, n in self.shapes]
        blocks = list(range(sum(counts) + self.spare_blocks))
        random.Random(self.seed).shuffle(blocks)
        rows, offset = [], 0
        for (start, n), count in zip(self.shapes, counts, strict=True):
            rows.append(RowSpan(offset, n, start, tuple(blocks.pop() for _ in range(count))))
            offset += n
        return rows, sum(counts) + self.spare_blocks

    def pool(self, rows: Sequence[RowSpan], num_blocks: int) -> Tensor:
        """kv[N, 2, 2, K, S, D], NaN but for the positions that a row sees before its start."""
        torch.manual_seed(self.seed)
        kv = torch.full((num_blocks, 2, 2, self.kv_heads, self.block_size, self.head_dim), NAN, device=self.device)
        for row in rows:
            first = 0 if self.spec.window is None else max(0, row.start + 1 - self.spec.window)
            at = torch.arange(first, row.start, device=self.device)
            blocks = torch.tensor(row.block_table, device=self.device)[at // self.block_size]
            numbers = torch.randn((len(at), 2, 2, self.kv_heads, self.head_dim), device=self.device)
            kv[blocks, :, :, :, at % self.block_size] = numbers
        if self.scales is None:
            return kv.to(self.dtype)
        return (kv / self.scales[None, :, :, :, None, None]).clamp(-448, 448).to(torch.float8_e4m3fn)

    def inputs(self) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """qkv [T, H + 2K, D], and cos and sin [T, D / 2]."""
        torch.manual_seed(self.seed + 1)
        num_tokens = sum(n for _, n in self.shapes)
        qkv = torch.randn((num_tokens, (self.group + 2) * self.kv_heads, self.head_dim), device=self.device).to(self.dtype)
        angles = torch.rand((num_tokens, self.head_dim // 2), device=self.device) * 6
        return qkv, (angles.cos().to(self.dtype), angles.sin().to(self.dtype)) if self.turned else None

    def seen_by(self, kv: Tensor) -> Tensor:
        """The numbers that a pool stands for, in float32."""
        return kv.float() if self.scales is None else kv.float() * self.scales[None, :, :, :, None, None]

    def expected(self, kv: Tensor, rows: Sequence[RowSpan], qkv: Tensor) -> Tensor:
        """`reference.attention` of every row in float64, many heads at once: kv has all keys, qkv the turned queries."""
        heads = self.group * self.kv_heads
        out = torch.empty((len(qkv), heads, self.head_dim), dtype=torch.float64, device=self.device)
        wide = self.seen_by(kv)[:, self.layer]
        for row in rows:
            at = torch.arange(row.end, device=self.device)
            blocks = torch.tensor(row.block_table, device=self.device)[at // self.block_size]
            kept = wide[blocks, :, :, at % self.block_size].double()  # [C, 2, K, D]
            keys, values = (kept[:, part].repeat_interleave(self.group, 1) for part in (0, 1))  # [C, H, D]
            positions = at[row.start :, None]
            hidden = at > positions
            if self.spec.window is not None:
                hidden |= at <= positions - self.spec.window
            unseen = hidden.all(0)[:, None, None]
            keys, values = keys.masked_fill(unseen, 0), values.masked_fill(unseen, 0)  # what nobody sees may be NaN
            query = qkv[row.offset : row.offset + row.num_tokens, :heads].double()
            scores = torch.einsum("qhd,chd->hqc", query, keys) * self.spec.scale
            if self.spec.softcap is not None:
                scores = self.spec.softcap * torch.tanh(scores / self.spec.softcap)
            weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
            out[row.offset : row.offset + row.num_tokens] = torch.einsum("hqc,chd->qhd", weights, values)
        return out.flatten(1)
