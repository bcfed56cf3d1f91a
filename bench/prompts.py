"""Made-up prompts of a wanted length, the same for the same seed on every machine.

Each request's prompt is its own, so that prefix caches do not help a server, except where a trace says that
prompts share blocks: an equal block id gives an equal run of 512 tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..simulator.workload.planned import PlannedRequest
from ..simulator.workload.traces import BLOCK_TOKENS

# Common words that most tokenizers hold as one token with the space before them.
_WORD_LIST = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city name team minute idea body back parent face other level office door health person art
war history party result change morning reason research girl guy moment air teacher force
"""
WORDS = tuple(_WORD_LIST.split())

_OWN, _SHARED = 0, 1


class PromptSource:
    """Prompts keyed by (seed, request index) and (seed, block id).

    Token ids are drawn from `[first, vocab_size)`; the default range exists in every tokenizer, and its low ids,
    often control tokens, are left out.
    """

    def __init__(self, seed: int = 0, vocab_size: int = 1000) -> None:
        self.seed = seed
        self.vocab_size = vocab_size
        self._first = min(100, vocab_size // 4)

    def token_ids(self, planned: PlannedRequest) -> list[int]:
        """Exactly `planned.input_tokens` ids."""
        runs = [self._run(_SHARED, block_id, BLOCK_TOKENS) for block_id in planned.block_ids]
        own = planned.input_tokens - BLOCK_TOKENS * len(runs)
        if own > 0:
            runs.append(self._run(_OWN, planned.index, own))
        ids: list[int] = np.concatenate(runs)[: planned.input_tokens].tolist()
        return ids

    def text(self, planned: PlannedRequest) -> str:
        """The request's own text, or about `planned.input_tokens` tokens of common words (one word a token)."""
        if planned.prompt is not None:
            return planned.prompt
        return " ".join(WORDS[token % len(WORDS)] for token in self.token_ids(planned))

    def _run(self, kind: int, key: int, length: int) -> npt.NDArray[np.uint64]:
        # random_raw is the generator's own stream, which numpy promises not to change; the methods above it may.
        raw = np.random.PCG64([self.seed, kind, key]).random_raw(length)
        return raw % np.uint64(self.vocab_size - self._first) + np.uint64(self._first)
