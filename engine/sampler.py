"""From logits to tokens.

The order of operations is vLLM's: log probabilities are taken of the logits as they came; then logit bias,
penalties (repetition, frequency, presence), bans (bad words, stop tokens before min_tokens, whatever a grammar does not
allow: bans commute with the rest, a banned token stays banned); greedy rows take the argmax;
for the others temperature, min-p, top-k, top-p, each over what the one before it left, and the draw.

A draw is keyed by (seed, sequence index, output index, candidate token) alone: the same in any batch, after
any retry, on any worker. Greedy rows cost one argmax.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core.request import TokenLogprob
from ..core.step import RowOutput, StepRow
from ..kernels.batch import DrawSpec
from ..kernels.table import KERNELS, Kernels
from .grammar import Mask
from .shaping import Shaper, shape


def sample(
    logits: Tensor,
    rows: Sequence[StepRow],
    allowed: Mapping[int, Mask] | None = None,
    shapers: Mapping[int, Shaper] | None = None,
    kernels: Kernels = KERNELS["cpu"],
) -> list[RowOutput]:
    """One token per row: logits [R, V] of any float type, rows[i] asks for logits[i]. `logits` may be overwritten.

    allowed[i] are the tokens that the grammar of rows[i] allows, at least one; whatever else bans all of them loses.
    shapers[i] knows the tokens of rows[i] and what they do to its logits.

    Greedy rows take the argmax, the lowest id when tokens tie.
    """
    reported = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    drawn = [i for i, row in enumerate(rows) if not row.sampling.greedy]
    stopping = [i for i, row in enumerate(rows) if row.output_index < row.sampling.min_tokens and row.sampling.stop_token_ids]
    if not (reported or drawn or stopping or allowed or shapers):
        return [RowOutput((token,)) for token in kernels.argmax(logits).tolist()]
    wide = logits.float()  # [R, V]
    raw = torch.log_softmax(wide[reported], dim=-1) if reported else None  # [reported, V]
    if shapers:
        shape(wide, shapers)
    for i in stopping:
        _ban_stop_tokens(wide[i], rows[i])
    _ban_all_but(wide, allowed or {})
    tokens: list[int] = _choose(wide, rows, drawn, kernels).tolist()
    if raw is None:
        return [RowOutput((token,)) for token in tokens]
    reports = dict(zip(reported, raw, strict=True))
    return [
        RowOutput((token,), (_logprob(reports[i], token, row.sampling.logprobs or 0),) if i in reports else ())
        for i, (token, row) in enumerate(zip(tokens, rows, strict=True))
    ]


def prompt_logprobs(logits: Tensor, targets: Sequence[int], num_top: int) -> tuple[TokenLogprob, ...]:
    """logits [N, V]: row i foretells targets[i]. Their log probabilities, with the `num_top` likeliest alternatives."""
    raw = torch.log_softmax(logits.float(), dim=-1)  # [N, V]
    values = raw.gather(1, torch.tensor(targets).to(raw.device)[:, None])[:, 0].tolist()
    best, ids = raw.topk(min(num_top, raw.shape[1]), dim=-1)  # [N, num_top] each
    tops = [tuple(zip(*top, strict=True)) for top in zip(ids.tolist(), best.tolist(), strict=True)]
    return tuple(TokenLogprob(*entry) for entry in zip(targets, values, tops, strict=True))


def _ban_stop_tokens(logits: Tensor, row: StepRow) -> None:
    """logits [V]: stop tokens are impossible until min_tokens were sampled."""
    logits[[token for token in row.sampling.stop_token_ids if token < logits.shape[0]]] = -math.inf


def _ban_all_but(logits: Tensor, allowed: Mapping[int, Mask]) -> None:
    """Only the tokens of allowed[i] are possible in logits[i]. Comes after every other ban."""
    for i, mask in allowed.items():
        keep = torch.from_numpy(mask).to(logits.device, non_blocking=True)
        row = logits[i].masked_fill_(~keep, -math.inf)
        # Were all of them banned, they are equally likely now. The device decides it: an answer from it would cost a wait.
        row.masked_fill_(keep & ~(row > -math.inf).any(), 0.0)


def _choose(logits: Tensor, rows: Sequence[StepRow], drawn: Sequence[int], kernels: Kernels) -> Tensor:
    """The tokens of shaped logits [R, V], int64 [R]: argmax, but for the rows that are drawn."""
    specs = [draw_spec(rows[i]) for i in drawn]
    if len(drawn) == len(rows):
        return kernels.draw(logits, specs)
    chosen = kernels.argmax(logits)
    if drawn:
        chosen[drawn] = kernels.draw(logits[drawn], specs)
    return chosen


def draw_spec(row: StepRow) -> DrawSpec:
    """How the row's token is drawn."""
    params = row.sampling
    return DrawSpec(
        params.temperature, params.top_k, params.top_p, params.min_p, params.seed, params.sequence_index, row.output_index
    )


def _logprob(raw: Tensor, token: int, num_top: int) -> TokenLogprob:
    """raw [V]: log probabilities of one row."""
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, ids = raw.topk(min(num_top, raw.shape[0]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(raw[token]), top)
