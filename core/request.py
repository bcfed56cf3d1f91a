"""What a client asks for, and the names by which the house speaks of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from .slo import Slo


class FinishReason(StrEnum):
    """Why a sequence ended. `stop`: a stop token or stop string; `length`: max_tokens or the model's limit."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, order=True)
class Attempt:
    """One try at serving a request. Every message and ticket names its attempt, so stale ones can be dropped.

    Request ids carry the router's name and epoch, so an attempt is unique over router restarts.
    """

    request_id: str
    number: int

    def __str__(self) -> str:
        return f"{self.request_id}#{self.number}"


@dataclass(frozen=True, slots=True, order=True)
class WorkerRef:
    """One life of a worker. A worker that restarts draws a new epoch; messages that name the old one are refused."""

    worker_id: str
    epoch: int

    def __str__(self) -> str:
        return f"{self.worker_id}@{self.epoch:x}"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when a sequence ends.

    temperature  0 is greedy
    top_k        keep the k likeliest tokens; 0 keeps all
    top_p        keep the smallest set of likeliest tokens whose probability reaches p
    seed         key of the counter-based generator, 0 <= seed < 2**63; the router draws a missing one
    sequence_index  which of the n sequences of the request this is (part of the generator's key)
    max_tokens   sampled tokens at most (>= 1)
    min_tokens   stop tokens are banned before this many tokens were sampled
    stop_token_ids  end the sequence; the token is part of the output, its text is not. The faces put the
                 model's EOS ids here unless the client asked to ignore them
    logprobs     None, or how many of the likeliest alternatives to report with the sampled token (0..20)
    min_p        drop tokens less likely than this share of the likeliest one's probability; 0 keeps all
    presence_penalty, frequency_penalty  taken off the logit of a token that was sampled before: once, and for each time
    repetition_penalty  divides the positive logits of tokens of the prompt and the output, multiplies negative ones
    logit_bias   (token, added to its logit) pairs
    bad_words    token sequences that the output must not contain
    prompt_logprobs  None, or how many of the likeliest alternatives to report with every prompt token (0..20)
    grammar      what the output must match, as the grammar library (llguidance) writes it; None: anything. Stop tokens
                 are banned until it matches, and nothing else is allowed once it can only end
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    sequence_index: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    prompt_logprobs: int | None = None
    grammar: str | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether logits depend on which tokens came before, and how often."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    @property
    def shaped(self) -> bool:
        """Whether logits are changed by something that the executor keeps for the attempt (`core.step.RowNeeds`)."""
        return self.penalised or bool(self.logit_bias or self.bad_words)


@dataclass(frozen=True, slots=True)
class Request:
    """A validated request as the router knows it. Times are readings of the router's clock, in seconds."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    arrival: float
    slo: Slo | None = None
    tenant: str = ""
    priority: int = 0
    deadline: float | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def max_total_tokens(self) -> int:
        return len(self.prompt) + self.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """What a worker is told of a sequence.

    output    tokens sampled by earlier attempts, which the client already has: they are prefilled
              like a prompt, and the next token sampled is number len(output)
    hand_over True when this worker only prefills and samples one token; the KV then leaves for another worker
    arrival   reading of the *receiving* worker's clock
    """

    attempt: Attempt
    prompt: tuple[int, ...]
    sampling: SamplingParams
    output: tuple[int, ...] = ()
    priority: int = 0
    arrival: float = 0.0
    hand_over: bool = False

    @property
    def known_tokens(self) -> tuple[int, ...]:
        return self.prompt + self.output


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of the sampled token and of the likeliest alternatives, before temperature and truncation."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = field(default=())
