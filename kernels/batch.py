"""What a kernel is told of a step: where each row's tokens stand in the packed batch, where their KV lives, how a layer attends,
and how a token is drawn.

Rows are packed one after the other: row i owns packed tokens [offset, offset + num_tokens).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowSpan:
    """One row of a step.

    offset       index of its first token in the packed batch
    num_tokens   tokens fed, at positions start, start + 1, ...
    start        position of the first of them; KV of positions [0, start) is in the cache
    block_table  blocks of positions [0, end), in order, no more than that
    clear_tail   whether the slots behind `end` in the last block may hold anything at all, NaN included,
                 because an earlier owner or a transfer left them so; the kernel must then not be misled by them
    """

    offset: int
    num_tokens: int
    start: int
    block_table: tuple[int, ...]
    clear_tail: bool = True

    @property
    def end(self) -> int:
        """Number of tokens in the cache after the step."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How one layer attends.

    scale    factor of the scores, 1 / sqrt(head_dim) in most models
    window   a query sees itself and the window - 1 positions before it; None sees all of them
    softcap  scores s become softcap * tanh(s / softcap), as in Gemma 2; None leaves them
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class DrawSpec:
    """How a row of logits becomes a token: temperature, min-p, top-k and top-p, each over what the one before it left,
    then a draw whose key is (seed, sequence_index, output_index); see `reference.draw`.

    temperature  above 0; kernels that take greedy rows beside others take 0 for those
    min_p, top_k 0 keeps all
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    sequence_index: int
    output_index: int
