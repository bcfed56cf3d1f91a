"""The frozen snapshot of the cluster that a policy reads."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .request import WorkerRef


class Role(StrEnum):
    """What a worker's pool is for."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker reports of itself with every heartbeat.

    step            number of the last step started; `in_step` says whether it is still running
    predicted_step  seconds the worker expects the running (or next) step to take
    prefill_rate    tokens per second of its recent prefill work, 0 when unknown
    decode_step     seconds of a recent decode step, 0 when unknown
    num_waiting     sequences (and reservations) that hold no blocks yet
    free_blocks, total_blocks   of the KV pool; cached blocks that can be evicted count as free
    tickets         tickets that are alive at this worker, at either end
    others_assigned, others_pending_tokens, others_context_tokens   what other routers than the one that is told have placed
                    here, counted as in `WorkerView`; 0 where one router serves alone
    """

    step: int = 0
    in_step: bool = False
    predicted_step: float = 0.0
    prefill_rate: float = 0.0
    decode_step: float = 0.0
    num_waiting: int = 0
    num_running: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    quarantined_blocks: int = 0
    tickets: int = 0
    others_assigned: int = 0
    others_pending_tokens: int = 0
    others_context_tokens: int = 0


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One live worker as the router sees it: its own share to the moment, that of other routers by the latest heartbeat.

    num_assigned      attempts that were placed on it and that have not left it
    pending_tokens    prompt tokens placed on it whose prefill has not finished (token-work)
    context_tokens    tokens whose KV it holds or will hold for requests
    """

    ref: WorkerRef
    role: Role
    block_size: int
    load: WorkerLoad = WorkerLoad()
    num_assigned: int = 0
    pending_tokens: int = 0
    context_tokens: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All live workers that take new work, ordered by worker id.

    sequence_number  grows by one with every routing decision (round robin counts with it)
    draw             a seeded random number in [0, 1) for this decision
    num_pending      requests that wait for a worker to exist
    num_active       requests that have not ended, those included; each of n sequences counts
    """

    now: float
    prefill: tuple[WorkerView, ...] = ()
    decode: tuple[WorkerView, ...] = ()
    mixed: tuple[WorkerView, ...] = ()
    num_pending: int = 0
    num_active: int = 0
    sequence_number: int = 0
    draw: float = 0.0


@dataclass(frozen=True, slots=True)
class Split:
    """Route: prefill on one worker, decode on another."""

    prefill: WorkerRef
    decode: WorkerRef


@dataclass(frozen=True, slots=True)
class Whole:
    """Route: the whole request on one worker (mixed pool, short prompt, or a pool that is empty)."""

    worker: WorkerRef


Route = Split | Whole
