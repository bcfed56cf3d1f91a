"""Which router asked for what, and the message queue back to each.

A session is one router life (its id and epoch) connected by one control stream. When the stream breaks the
router treats every attempt it had here as lost, so nothing of the old stream is ever sent again: the worker
drops the session's attempts when the router dials again, or after a grace period if it never does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..core.request import Attempt
from ..core.view import WorkerLoad
from ..proto import worker_pb2 as pb

MAX_MORE = 64  # messages that travel with another one


@dataclass(slots=True, eq=False)
class Session:
    """One control stream of one router.

    attempts    what it asked for and is here still, each with the tokens that were known of it when it came
    to_prefill  those whose known tokens are still to be prefilled here
    """

    router_id: str
    router_epoch: int
    outgoing: asyncio.Queue[pb.WorkerMessage] = field(default_factory=asyncio.Queue)
    attempts: dict[Attempt, int] = field(default_factory=dict)
    to_prefill: set[Attempt] = field(default_factory=set)
    broken_at: float | None = None

    def send(self, message: pb.WorkerMessage) -> None:
        if self.broken_at is None:
            self.outgoing.put_nowait(message)

    async def next_message(self) -> pb.WorkerMessage:
        """What is to be sent next: everything that waits, in one message, which costs little more than one alone."""
        message = await self.outgoing.get()
        await asyncio.sleep(0)  # for what else is said in this turn of the loop
        while not self.outgoing.empty() and len(message.more) < MAX_MORE:
            message.more.append(self.outgoing.get_nowait())
        return message


class Sessions:
    """All sessions of a worker and the owner of each attempt."""

    def __init__(self) -> None:
        self._owner: dict[Attempt, Session] = {}
        self._sessions: list[Session] = []

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions)

    def open(self, router_id: str, router_epoch: int) -> tuple[Session, list[Session]]:
        """A new session, and the sessions of the same router that it replaces."""
        replaced = [session for session in self._sessions if session.router_id == router_id]
        session = Session(router_id, router_epoch)
        self._sessions.append(session)
        return session, replaced

    def close(self, session: Session) -> list[Attempt]:
        """Forget a session; return the attempts that it leaves behind."""
        if session in self._sessions:
            self._sessions.remove(session)
        left = sorted(session.attempts)
        for attempt in left:
            self._owner.pop(attempt, None)
        session.attempts.clear()
        session.to_prefill.clear()
        return left

    def expired(self, now: float, grace: float) -> list[Session]:
        """Sessions whose stream broke more than `grace` seconds ago."""
        return [s for s in self._sessions if s.broken_at is not None and now - s.broken_at >= grace]

    def own(self, attempt: Attempt, session: Session, num_tokens: int, to_prefill: bool) -> None:
        """`session` asked for `attempt`, of which `num_tokens` tokens are known; `to_prefill` when that happens here."""
        self._owner[attempt] = session
        session.attempts[attempt] = num_tokens
        if to_prefill:
            session.to_prefill.add(attempt)

    def prefilled(self, attempt: Attempt) -> None:
        """The known tokens of the attempt are prefilled."""
        session = self._owner.get(attempt)
        if session is not None:
            session.to_prefill.discard(attempt)

    def disown(self, attempt: Attempt) -> None:
        """The attempt has left this worker."""
        session = self._owner.pop(attempt, None)
        if session is not None:
            session.attempts.pop(attempt, None)
            session.to_prefill.discard(attempt)

    def owner(self, attempt: Attempt) -> Session | None:
        return self._owner.get(attempt)

    def send(self, attempt: Attempt, message: pb.WorkerMessage) -> None:
        """To the router that asked for `attempt`; dropped when it is gone."""
        session = self._owner.get(attempt)
        if session is not None:
            session.send(message)

    def beside(self, router_id: str, load: WorkerLoad) -> WorkerLoad:
        """`load` as router `router_id` is told of it: with what all the others have here."""
        others = [session for session in self._sessions if session.router_id != router_id and session.attempts]
        if not others:
            return load
        return replace(
            load,
            others_assigned=sum(len(session.attempts) for session in others),
            others_pending_tokens=sum(session.attempts[attempt] for session in others for attempt in session.to_prefill),
            others_context_tokens=sum(sum(session.attempts.values()) for session in others),
        )
