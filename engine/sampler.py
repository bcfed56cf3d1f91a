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

from ..core.request import SamplingParams, TokenLogprob
from ..core.step import RowOutput, StepRow
from ..kernels.cpu import exponential_noise, philox_words
from .grammar import Mask
from .shaping import Shaper, shape

FIRST_CANDIDATES = 256  # likeliest tokens looked at first when truncating; all of them only when those do not suffice


def sample(
    logits: Tensor,
    rows: Sequence[StepRow],
    allowed: Mapping[int, Mask] | None = None,
    shapers: Mapping[int, Shaper] | None = None,
) -> list[RowOutput]:
    """One token per row: logits [R, V] of any float type, rows[i] asks for logits[i]. `logits` may be overwritten.

    allowed[i] are the tokens that the grammar of rows[i] allows, at least one; whatever else bans all of them loses.
    shapers[i] knows the tokens of rows[i] and what they do to its logits.

    Greedy rows take the argmax, the lowest id when tokens tie.
    """
    wide = logits.float()  # [R, V]; argmax is also several times faster than in bfloat16
    reported = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    raw = torch.log_softmax(wide[reported], dim=-1) if reported else None  # [reported, V]
    if shapers:
        shape(wide, shapers)
    _ban_stop_tokens(wide, rows)
    _ban_all_but(wide, allowed or {})
    chosen = torch.argmax(wide, dim=-1)  # [R]
    drawn = [i for i, row in enumerate(rows) if not row.sampling.greedy]
    if drawn:
        chosen[drawn] = _draw(wide[drawn], [rows[i] for i in drawn])
    tokens: list[int] = chosen.tolist()
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
    values = raw.gather(1, torch.tensor(targets)[:, None])[:, 0].tolist()
    best, ids = raw.topk(min(num_top, raw.shape[1]), dim=-1)  # [N, num_top] each
    tops = [tuple(zip(*top, strict=True)) for top in zip(ids.tolist(), best.tolist(), strict=True)]
    return tuple(TokenLogprob(*entry) for entry in zip(targets, values, tops, strict=True))


def _ban_stop_tokens(logits: Tensor, rows: Sequence[StepRow]) -> None:
    """Stop tokens are impossible until min_tokens were sampled."""
    vocabulary = logits.shape[1]
    for i, row in enumerate(rows):
        if row.output_index < row.sampling.min_tokens and row.sampling.stop_token_ids:
            banned = [token for token in row.sampling.stop_token_ids if token < vocabulary]
            logits[i, banned] = -math.inf


def _ban_all_but(logits: Tensor, allowed: Mapping[int, Mask]) -> None:
    """Only the tokens of allowed[i] are possible in logits[i]. Comes after every other ban."""
    for i, mask in allowed.items():
        keep = torch.from_numpy(mask).to(logits.device)
        row = logits[i].masked_fill_(~keep, -math.inf)
        if not bool((row > -math.inf).any()):
            row[keep] = 0.0  # all were banned: they are equally likely now


def _draw(logits: Tensor, rows: Sequence[StepRow]) -> Tensor:
    """Gumbel-max over the truncated distribution: logits float32 [R, V] -> tokens int64 [R]."""
    params = [row.sampling for row in rows]
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32)[:, None]
    # The likeliest token stands at 0, so a tiny temperature cannot overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature)
    selective = [i for i, p in enumerate(params) if p.min_p > 0.0]
    if selective:
        least = torch.tensor([math.log(params[i].min_p) for i in selective], dtype=torch.float32)[:, None]
        likely = scaled[selective]  # the likeliest at 0, so logarithms of shares of its probability
        scaled[selective] = likely.masked_fill_(likely < least, -math.inf)
    truncated = [i for i, p in enumerate(params) if 0 < p.top_k < logits.shape[1] or p.top_p < 1.0]
    if truncated:
        scaled[truncated] = _truncate(scaled[truncated], [params[i] for i in truncated])
    words = philox_words(
        torch.tensor([p.seed for p in params]),
        torch.tensor([p.sequence_index for p in params]),
        torch.tensor([row.output_index for row in rows]),
        logits.shape[1],
    )
    # logit + g with g = -log(e) Gumbel and e exponential.
    return torch.argmax(scaled.sub_(exponential_noise(words).log_()), dim=-1)


def _truncate(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Top-k, then top-p over what is left: [R, V] -> [R, V] with -inf for what is dropped; see `reference.truncate`."""
    vocabulary = scaled.shape[1]
    top_k = torch.tensor([p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params])[:, None]  # [R, 1]
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float32)[:, None]
    largest_k = max((p.top_k for p in params if p.top_k < vocabulary), default=0)
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


def _logprob(raw: Tensor, token: int, num_top: int) -> TokenLogprob:
    """raw [V]: log probabilities of one row."""
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, ids = raw.topk(min(num_top, raw.shape[0]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(raw[token]), top)
