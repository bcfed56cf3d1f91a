"""Admission: which requests are shed before any work is done for them.

A refusal costs the client one round trip; a request that is let in although it will miss its objective costs
everybody behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..core.request import Request
from ..core.slo import Slo
from ..core.view import ClusterView, WorkerView

MIN_RETRY_AFTER = 0.1  # seconds; a client that is told less would hammer


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is shed, and after how many seconds a retry is sensible."""

    reason: str
    retry_after: float


AdmissionPolicy = Callable[[Request, ClusterView], Refusal | None]


def admit_all(max_queue: int, slo: Slo) -> AdmissionPolicy:
    """Everybody may come in."""
    return lambda request, view: None


def queue_length(max_queue: int, slo: Slo) -> AdmissionPolicy:
    """At most `max_queue` requests in flight or waiting."""

    def admit(request: Request, view: ClusterView) -> Refusal | None:
        if view.num_active < max_queue:
            return None
        return Refusal(f"{view.num_active} requests are being served or wait, the limit is {max_queue}", 1.0)

    return admit


def slo_predictive(max_queue: int, slo: Slo) -> AdmissionPolicy:
    """Only who is predicted to meet the TTFT objective (its own, or that of `slo`), and `queue_length`'s rule."""
    within_length = queue_length(max_queue, slo)

    def admit(request: Request, view: ClusterView) -> Refusal | None:
        refusal = within_length(request, view)
        if refusal is not None:
            return refusal
        predicted = predicted_ttft(request, view)
        objective = (request.slo or slo).ttft
        if predicted is None or predicted <= objective:
            return None
        excess = predicted - objective
        reason = f"the first token would come after {predicted:.2f} s, the objective is {objective:.2f} s"
        return Refusal(reason, max(MIN_RETRY_AFTER, excess))

    return admit


def predicted_ttft(request: Request, view: ClusterView) -> float | None:
    """Seconds until the first token at the least busy worker that could prefill; None when no rate is known.

    A full decode pool counts too: the KV of prompts it has no room for piles up at the prefill workers.
    """
    split = bool(view.prefill and view.decode)
    workers = (*view.prefill, *view.mixed) if split else (*view.prefill, *view.decode, *view.mixed)
    if not workers or any(worker.load.prefill_rate <= 0.0 for worker in workers):
        return None
    prefill = min((worker.pending_tokens + request.num_prompt_tokens) / worker.load.prefill_rate for worker in workers)
    wait = min(_wait_for_room(request, worker) for worker in view.decode) if split and not view.mixed else 0.0
    return prefill + wait


def _wait_for_room(request: Request, worker: WorkerView) -> float:
    """Seconds until a decode worker has blocks for the prompt.

    When it has none, sequences leave one by one. In a steady state of `num_running` sequences, each as long as
    this request may become, one leaves every decode_step * max_tokens / num_running seconds (Little's law).
    """
    load = worker.load
    needed = -(-request.num_prompt_tokens // worker.block_size)
    spoken_for = -(-worker.context_tokens // worker.block_size)
    if min(load.free_blocks, load.total_blocks - spoken_for) >= needed or load.num_running == 0:
        return 0.0
    return (load.num_waiting + 1) * load.decode_step * request.sampling.max_tokens / load.num_running


ADMISSION: dict[str, Callable[[int, Slo], AdmissionPolicy]] = {
    "none": admit_all,
    "queue_length": queue_length,
    "slo": slo_predictive,
}
