"""What the client library gives back. Plain frozen data, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of a sampled token and of the likeliest alternatives, as (token, log probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one sequence."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Stages:
    """Where the time of one sequence went, in seconds. queue + prefill = TTFT at the router."""

    queue: float
    prefill: float
    handoff: float
    first_decode: float
    total: float
    attempts: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is new for one sequence. `finish_reason`, `usage` and `stages` come with its last chunk only.

    `prompt_logprobs` come with its first chunk, where they were asked for: of every prompt token but the first.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    usage: Usage | None
    stages: Stages | None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sequence. `finish_reason` is `stop` or `length`.

    `prompt_logprobs` are those of every prompt token but the first, where they were asked for.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    usage: Usage
    stages: Stages
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """The served model."""

    name: str
    max_model_len: int
    vocab_size: int
    dtype: str
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The router. `uptime` in seconds."""

    version: str
    cluster: str
    router_id: str
    ready: bool
    not_ready_reason: str
    uptime: float


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker as the router sees it. `state` is `ready`, `draining` or `connecting`."""

    worker_id: str
    epoch: int
    role: str
    state: str
    pid: int
    assigned: int
    waiting: int
    running: int
    free_blocks: int
    total_blocks: int
    quarantined_blocks: int
    tickets: int
    step: int


@dataclass(frozen=True, slots=True)
class Load:
    """What routing decides on."""

    workers: tuple[Worker, ...]
    active_requests: int
    pending_requests: int
