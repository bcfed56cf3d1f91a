"""Token ids for simulated sequences: as few as the prefix cache can do with.

No simulated device reads a token. Only the prefix cache compares them: equal blocks of a trace become equal tokens,
and everything else of a prompt is the request's own.
"""

from __future__ import annotations

from ..core.request import SamplingParams
from .workload.planned import PlannedRequest

TRACE_BLOCK = 512  # tokens of one of a trace's block ids
SAMPLED = 0  # the token that every simulated step samples
_OWN = 1 << 31  # ids from here on are of one request alone; those below name a trace's blocks


class Tokens:
    """Prompts, outputs and sampling parameters. `by_content`: some worker has a prefix cache."""

    def __init__(self, by_content: bool) -> None:
        self._by_content = by_content
        self._same: tuple[int, ...] = (SAMPLED,) * 4096
        self._sampling: dict[int, SamplingParams] = {}

    def prompt(self, planned: PlannedRequest) -> tuple[int, ...]:
        if not self._by_content:
            return self.output(planned.input_tokens)
        tokens: list[int] = []
        for block in planned.block_ids[: -(-planned.input_tokens // TRACE_BLOCK)]:
            tokens += (1 + block % (_OWN - 1),) * TRACE_BLOCK
        tokens += (_OWN + planned.index % _OWN,) * (planned.input_tokens - len(tokens))
        return tuple(tokens[: planned.input_tokens])

    def output(self, num_tokens: int) -> tuple[int, ...]:
        """That many sampled tokens."""
        if num_tokens > len(self._same):
            self._same = (SAMPLED,) * (2 * num_tokens)
        return self._same[:num_tokens]

    def sampling(self, max_tokens: int) -> SamplingParams:
        """Ends by length alone. There are as many as there are lengths."""
        found = self._sampling.get(max_tokens)
        if found is None:
            found = self._sampling[max_tokens] = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        return found
