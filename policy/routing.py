"""Routing: which workers serve a request.

A policy here *picks one worker* out of candidates for a job; `_routing` makes a route of such picks and knows
about pools: split when both pools live, whole on a mixed worker, whole on any survivor when a pool is empty.
A new policy is one `Pick` and one row in `ROUTING`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType

from ..core.request import Request
from ..core.view import ClusterView, Route, Split, Whole, WorkerView

RoutingPolicy = Callable[[Request, ClusterView], Route | None]


class Job(Enum):
    """What a worker is picked for: prefill and hand over, decode what another worker prefilled, or both."""

    PREFILL = "prefill"
    DECODE = "decode"
    WHOLE = "whole"


Pick = Callable[[Sequence[WorkerView], Job, ClusterView], WorkerView]


def round_robin(workers: Sequence[WorkerView], job: Job, view: ClusterView) -> WorkerView:
    """One after the other, whatever they have to do."""
    return workers[view.sequence_number % len(workers)]


def random(workers: Sequence[WorkerView], job: Job, view: ClusterView) -> WorkerView:
    """Any of them, uniformly by the decision's draw."""
    return _drawn(workers, view)


def least_loaded(workers: Sequence[WorkerView], job: Job, view: ClusterView) -> WorkerView:
    """The one with the least token-work for this job; ties are drawn."""
    return _least(workers, _TOKEN_WORK[job], view)


def join_shortest_queue(workers: Sequence[WorkerView], job: Job, view: ClusterView) -> WorkerView:
    """The one with the fewest requests; ties are drawn."""
    return _least(workers, lambda worker: (worker.num_assigned,), view)


def token_work(worker: WorkerView, job: Job) -> tuple[float, ...]:
    """How much work stands before a new request, smaller is better.

    Prefill is bound by arithmetic: prompt tokens that are still to be computed, then tokens whose KV waits for
    room elsewhere. Decode is bound by memory: the share of the KV pool that is spoken for. A worker that does
    both is judged by both.
    """
    return _TOKEN_WORK[job](worker)


def _prefill_work(worker: WorkerView) -> tuple[float, ...]:
    return (worker.pending_tokens, worker.context_tokens)


def _decode_work(worker: WorkerView) -> tuple[float, ...]:
    slots = worker.load.total_blocks * worker.block_size
    return (worker.context_tokens / slots if slots else float(worker.context_tokens), worker.num_assigned)


def _whole_work(worker: WorkerView) -> tuple[float, ...]:
    return (worker.pending_tokens, *_decode_work(worker))


_TOKEN_WORK: Mapping[Job, Callable[[WorkerView], tuple[float, ...]]] = MappingProxyType(
    {Job.PREFILL: _prefill_work, Job.DECODE: _decode_work, Job.WHOLE: _whole_work}
)


def _routing(pick: Pick) -> RoutingPolicy:
    """Make routes of single picks."""

    def route(request: Request, view: ClusterView) -> Route | None:
        if not (view.prefill and view.decode):
            survivors = (*view.mixed, *view.prefill, *view.decode)
            return Whole(pick(survivors, Job.WHOLE, view).ref) if survivors else None
        prefill = pick(view.prefill, Job.PREFILL, view)
        decode = pick(view.decode, Job.DECODE, view)
        if view.mixed:
            mixed = pick(view.mixed, Job.WHOLE, view)
            if _work(mixed) < _work(prefill, decode):
                return Whole(mixed.ref)
        return Split(prefill.ref, decode.ref)

    return route


def _work(*workers: WorkerView) -> tuple[int, int]:
    """Token-work of a route: prompt tokens to wait for, then tokens to decode beside."""
    return sum(worker.pending_tokens for worker in workers), workers[-1].context_tokens


def _least(workers: Sequence[WorkerView], cost: Callable[[WorkerView], tuple[float, ...]], view: ClusterView) -> WorkerView:
    costs = [cost(worker) for worker in workers]
    least = min(costs)
    return _drawn([worker for worker, its in zip(workers, costs, strict=True) if its == least], view)


def _drawn(workers: Sequence[WorkerView], view: ClusterView) -> WorkerView:
    return workers[int(view.draw * len(workers))]


ROUTING: dict[str, RoutingPolicy] = {
    "round_robin": _routing(round_robin),
    "random": _routing(random),
    "least_loaded": _routing(least_loaded),
    "join_shortest_queue": _routing(join_shortest_queue),
}
