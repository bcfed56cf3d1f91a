"""What simulated workers say to the router: the messages of the control stream that matter to a decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.request import Attempt, WorkerRef
from ..kv_transfer.ticket import Ticket


@dataclass(slots=True)  # made for many steps, and freezing it would cost as much again; nobody changes one
class TokenNews:
    """A sequence has `num_output` output tokens, those of earlier attempts among them.

    started, cached  set with the first tokens of an attempt: when a plan first contained it, and its prefix hit in tokens
    """

    attempt: Attempt
    num_output: int
    finished: bool = False
    started: float | None = None
    cached: int = 0


class RouterPort(Protocol):
    """The worker's end of the stream to the router. Every message arrives some time later, in order."""

    def tokens(self, worker: WorkerRef, news: Sequence[TokenNews]) -> None: ...

    def granted(self, worker: WorkerRef, ticket: Ticket) -> None: ...

    def adopted(self, worker: WorkerRef, attempt: Attempt) -> None: ...

    def handed_over(self, worker: WorkerRef, attempt: Attempt) -> None: ...

    def failed(self, worker: WorkerRef, attempt: Attempt, reason: str, retriable: bool) -> None: ...

    def preempted(self, worker: WorkerRef, attempt: Attempt, num_output: int) -> None:
        """`num_output` as in TokenNews: the router had them all."""
        ...
