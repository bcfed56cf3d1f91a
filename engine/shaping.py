"""What a sequence's own tokens and parameters do to its logits: logit bias, penalties, bad words.

The state of an attempt lives in the host's memory, on the executor's thread, because only there the tokens of plans in flight are
known. It is made from the history that the first sampling row brings and grows with every token sampled, so
that it never depends on where, or in how many attempts, the tokens were sampled.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..core.request import SamplingParams


class Shaper:
    """The state of one attempt.

    bias   (tokens int64 [B], what is added to their logits float32 [B]), or None
    seen   the tokens that penalties look at, or None
    """

    def __init__(self, params: SamplingParams, history: Sequence[int], num_output: int) -> None:
        """`history` is prompt and output, the last `num_output` tokens of it the output."""
        split = len(history) - num_output
        prompt, output = history[:split], history[split:]
        self.params = params
        self.bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            tokens, values = zip(*params.logit_bias, strict=True)
            self.bias = torch.tensor(tokens), torch.tensor(values, dtype=torch.float32)
        # The prompt counts for the repetition penalty only.
        looked_at = prompt if params.repetition_penalty != 1.0 else ()
        self.seen = SeenTokens(looked_at, output) if params.penalised else None
        self._bad_words = BadWords(params.bad_words, output)

    def append(self, token: int) -> None:
        """`token` was sampled."""
        if self.seen is not None:
            self.seen.append(token)
        self._bad_words.append(token)

    def banned(self) -> list[int]:
        """Tokens that would complete a bad word now."""
        return self._bad_words.completions()


class SeenTokens:
    """Distinct tokens of one sequence and how often each was sampled; the tensors grow by doubling.

    Sizes [S]: tokens int64, counts float32; a token of the prompt that was never sampled has count 0.
    """

    def __init__(self, prompt: Iterable[int], output: Iterable[int]) -> None:
        counts = dict.fromkeys(prompt, 0)
        for token in output:
            counts[token] = counts.get(token, 0) + 1
        self._slots = {token: slot for slot, token in enumerate(counts)}
        self._tokens = torch.tensor(list(counts), dtype=torch.int64)
        self._counts = torch.tensor(list(counts.values()), dtype=torch.float32)

    @property
    def tokens(self) -> Tensor:
        return self._tokens[: len(self._slots)]

    @property
    def counts(self) -> Tensor:
        return self._counts[: len(self._slots)]

    def append(self, token: int) -> None:
        """`token` was sampled."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._tokens):
            self._tokens = torch.cat((self._tokens, torch.zeros(slot + 16, dtype=torch.int64)))
            self._counts = torch.cat((self._counts, torch.zeros(slot + 16)))
        self._tokens[slot] = token
        self._counts[slot] += 1


class BadWords:
    """Which tokens would complete a bad word. A word counts when all its tokens are output, as vLLM has it."""

    def __init__(self, words: Sequence[tuple[int, ...]], output: Sequence[int]) -> None:
        self._always = [word[0] for word in words if len(word) == 1]
        self._after: dict[int, list[tuple[int, ...]]] = {}  # longer words, by their last token but one
        for word in words:
            if len(word) > 1:
                self._after.setdefault(word[-2], []).append(word)
        reach = max((len(word) - 1 for word in words), default=0)
        self._tail = deque(output[-reach:] if reach else (), maxlen=reach)

    def append(self, token: int) -> None:
        """`token` was sampled."""
        self._tail.append(token)

    def completions(self) -> list[int]:
        """The last tokens of the words that the output has entered."""
        candidates = self._after.get(self._tail[-1], ()) if self._tail else ()
        if not candidates:
            return self._always
        tail = tuple(self._tail)
        return self._always + [word[-1] for word in candidates if tail[1 - len(word) :] == word[:-1]]


def shape(logits: Tensor, shapers: Mapping[int, Shaper]) -> None:
    """Bias, penalties and bans of some rows of logits float32 [R, V] on any device, in place."""
    biased = [(row, *shaper.bias) for row, shaper in shapers.items() if shaper.bias is not None]
    if biased:
        where, tokens = _places([(row, tokens) for row, tokens, _ in biased], logits.device)
        logits[where, tokens] += torch.cat([values for _, _, values in biased]).to(logits.device, non_blocking=True)
    penalised = [(row, shaper.params, shaper.seen) for row, shaper in shapers.items() if shaper.seen is not None]
    if penalised:
        _penalise(logits, penalised)
    for row, shaper in shapers.items():
        banned = [token for token in shaper.banned() if token < logits.shape[1]]
        if banned:
            logits[row, banned] = -math.inf


def _penalise(logits: Tensor, rows: Sequence[tuple[int, SamplingParams, SeenTokens]]) -> None:
    """Repetition (Keskar et al. 2019), then frequency, then presence (OpenAI), of all rows at once."""
    where, tokens = _places([(row, seen.tokens) for row, _, seen in rows], logits.device)  # [S] each, S over all rows
    counts = torch.cat([seen.counts for _, _, seen in rows]).to(logits.device, non_blocking=True)  # [S]
    weights = torch.tensor([(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for _, p, _ in rows])
    sizes = torch.tensor([len(seen.tokens) for _, _, seen in rows])
    each = weights.repeat_interleave(sizes, dim=0, output_size=len(counts)).T.to(logits.device, non_blocking=True)  # [3, S]
    repetition, frequency, presence = each
    values = logits[where, tokens]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * counts
    values -= presence * (counts > 0)
    logits[where, tokens] = values


def _places(rows: Sequence[tuple[int, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of (row, each of its tokens) of several rows on a device, both int64 [sum of their sizes]."""
    sizes = torch.tensor([len(tokens) for _, tokens in rows])
    tokens = torch.cat([tokens for _, tokens in rows])
    where = torch.tensor([row for row, _ in rows]).repeat_interleave(sizes, output_size=len(tokens))
    return where.to(device, non_blocking=True), tokens.to(device, non_blocking=True)
