"""One sequence as its worker's scheduler knows it, and the sorted lists that scheduling walks."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from ..core.errors import InternalError
from ..core.request import Attempt, FinishReason, SequenceSpec, TokenLogprob
from ..policy.ordering import SortKey
from .blocks import HashChain


class Phase(Enum):
    """Where a sequence stands.

    waiting  holds no blocks
    running  holds blocks; every plan may contain it
    leaving  preempted while a plan was in flight: its rows still count, its blocks go when they have committed
    held     prefilled and to be handed over: holds blocks, is not planned
    ended    has left the scheduler; rows that are still in flight are discarded, blocks go when they have committed
    """

    WAITING = "waiting"
    RUNNING = "running"
    LEAVING = "leaving"
    HELD = "held"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class SequenceInfo:
    """What a worker reports of a sequence besides its tokens.

    num_computed     tokens whose KV is in the cache (committed steps only)
    cached_tokens    leading tokens that came from the prefix cache when it was first scheduled
    added            when the scheduler was given it
    first_scheduled  when a plan first contained it; None before
    """

    num_computed: int
    cached_tokens: int
    added: float
    first_scheduled: float | None


@dataclass(slots=True, eq=False)
class SequenceState:
    """Mutable state of one sequence. Invariant: num_computed <= num_planned <= len(tokens) + num_placeholders.

    limit             total number of tokens at which the sequence ends by length
    age_key           least first: who is served first, and last in line to be preempted
    queue_key         least first: place in the waiting queue; its last part numbers the sequences as they came
    overtaken         a younger sequence to be handed over has started before this one
    tokens            prompt and output so far, without placeholders
    num_computed      KV of tokens [0, num_computed) is in the cache
    num_planned       the same, once every uncommitted plan has run
    num_placeholders  tokens that uncommitted plans will sample
    num_in_flight     uncommitted plans with a row of this sequence
    last_sampled_step the last plan that samples for this sequence; before there is one, the last plan before it was adopted
    place             its row in that plan, if it decoded; -1 before
    num_published     leading blocks that the prefix cache has been told of
    has_needs         whether rows may carry `RowNeeds` or the output: a plain sequence is not looked at again
    num_given         tokens that it came with, prompt and output: what follows was sampled here (or handed over with it)
    history_given     whether a row has told the executor of the tokens since the sequence started (over)
    prompt_logprobs   of the prompt tokens that are computed, until they leave with the first token
    """

    spec: SequenceSpec
    limit: int
    age_key: SortKey
    queue_key: SortKey
    chain: HashChain
    tokens: list[int]
    added: float
    phase: Phase = Phase.WAITING
    overtaken: bool = False
    blocks: tuple[int, ...] = ()
    num_computed: int = 0
    num_planned: int = 0
    num_placeholders: int = 0
    num_in_flight: int = 0
    last_sampled_step: int = 0
    place: int = -1
    num_published: int = 0
    cached_tokens: int = 0
    first_scheduled: float | None = None
    has_needs: bool = False
    num_given: int = 0
    history_given: bool = False
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def attempt(self) -> Attempt:
        return self.spec.attempt

    @property
    def num_output(self) -> int:
        """Tokens sampled so far, by earlier attempts too."""
        return len(self.tokens) - len(self.spec.prompt)

    @property
    def output(self) -> list[int]:
        """Those tokens."""
        return self.tokens[len(self.spec.prompt) :]

    @property
    def num_remaining(self) -> int:
        """Tokens, placeholders among them, that no plan has fed yet."""
        return len(self.tokens) + self.num_placeholders - self.num_planned

    @property
    def reports_prompt(self) -> bool:
        """Whether the log probabilities of the prompt are still to be reported: only with output token 0."""
        return self.spec.sampling.prompt_logprobs is not None and self.num_output + self.num_placeholders == 0

    @property
    def info(self) -> SequenceInfo:
        return SequenceInfo(self.num_computed, self.cached_tokens, self.added, self.first_scheduled)

    def hashes(self, num_blocks: int) -> list[bytes]:
        """Chained hashes of the first `num_blocks` full blocks of the tokens."""
        return self.chain.first(num_blocks, self.tokens)

    def start_over(self) -> None:
        """The blocks are gone: everything has to be computed again. The tokens stay."""
        self.blocks = ()
        self.num_computed = self.num_planned = self.num_published = 0
        self.history_given = False
        self.prompt_logprobs.clear()

    def append(self, token: int) -> FinishReason | None:
        """Take one sampled token; returns why it ended the sequence, if it did. The stop token is part of the output."""
        self.tokens.append(token)
        sampling = self.spec.sampling
        if token in sampling.stop_token_ids and self.num_output >= sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.limit else None


class SortedSequences:
    """Sequences in ascending order of one of their keys. Keys are unique: their last part numbers the sequences."""

    def __init__(self, key: Callable[[SequenceState], SortKey]) -> None:
        self._key = key
        self._sequences: list[SequenceState] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[SequenceState]:
        """Over a copy: sequences may come and go meanwhile."""
        return iter(tuple(self._sequences))

    def __reversed__(self) -> Iterator[SequenceState]:
        return reversed(tuple(self._sequences))

    @property
    def first(self) -> SequenceState | None:
        return self._sequences[0] if self._sequences else None

    def insert(self, sequence: SequenceState) -> None:
        insort(self._sequences, sequence, key=self._key)

    def remove(self, sequence: SequenceState) -> None:
        index = bisect_left(self._sequences, self._key(sequence), key=self._key)
        if index == len(self._sequences) or self._sequences[index] is not sequence:
            raise InternalError(f"{sequence.attempt} is {sequence.phase.value}, but not in the list for that")
        del self._sequences[index]
