"""What the faces hand to the router, and what they read back: one stream per request.

A stream buffers nothing of its own: it reads the token logs. News pile up merged while a slow client is
writing, so that neither memory nor the service depends on how fast clients are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import BatonError
from ..core.request import FinishReason, SamplingParams
from ..core.slo import Slo
from .sequence import Sequence, Update


@dataclass(frozen=True, slots=True)
class Submission:
    """A validated request on its way into the router.

    seed       None: the router draws one
    n          sequences; each becomes a request of its own in the lifecycle
    client_id  the client's name for the request, empty when it gave none
    timeout    seconds that the client is willing to wait, None for the router's limit
    internal   the router's own canary: not among the requests counted and logged (its tokens and attempts are)
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    seed: int | None = None
    n: int = 1
    client_id: str = ""
    tenant: str = ""
    priority: int = 0
    slo: Slo | None = None
    timeout: float | None = None
    internal: bool = False


class Stream:
    """Updates of all sequences of a request, in the order in which they have news. Created inside a running event loop.

    Iteration ends when every sequence has ended, and raises the error of `core.errors` that ended one of them.
    """

    def __init__(self, request_id: str, submission: Submission, stop: Callable[[Sequence, FinishReason | None], None]) -> None:
        self.id = request_id
        self.submission = submission
        self.sequences: list[Sequence] = []
        self.error: BatonError | None = None  # what ended the request before its time
        self.fresh = False  # something may have come since `poll` found nothing more
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        self._reader: asyncio.Future[None] | None = None  # who waits for news
        self._next = 0

    @property
    def client_id(self) -> str:
        """The client's name for the request, or the router's where the client gave none."""
        return self.submission.client_id or self.id

    @property
    def done(self) -> bool:
        sequences = self.sequences
        return sequences[0].done if len(sequences) == 1 else all(sequence.done for sequence in sequences)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Update:
        while True:
            update = self.poll()
            if update is not None:
                return update
            if self.done:
                raise StopAsyncIteration
            await self.news()

    def poll(self) -> Update | None:
        """What is new, if anything is. Raises the error that ended the request."""
        if self.error is not None:
            raise self.error
        if len(self.sequences) == 1:
            self.fresh = False
            sequence = self.sequences[0]
            return sequence.take() if sequence.has_news else None
        found = self._with_news()
        self.fresh = found is not None
        return None if found is None else found.take()

    def news(self) -> asyncio.Future[None]:
        """Done at the next news. One reader at a time; ask only when `poll` has none, and await it at once."""
        self._reader = self._loop.create_future()
        return self._reader

    def fail(self, error: BatonError) -> None:
        """One sequence ended with `error`: the request is over. Only the first error counts. Called by the service."""
        if self.error is None:
            self.error = error
            self.cancel()

    def wake(self) -> None:
        """There is something to read. Called by the service."""
        self.fresh = True
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)

    def finish(self, index: int) -> None:
        """The text of sequence `index` met a stop string: end it well, and read no more of it."""
        sequence = self.sequences[index]
        sequence.drop_news()
        if not sequence.done:
            self._stop(sequence, FinishReason.STOP)

    def cancel(self) -> None:
        """The client is gone: end whatever still runs. Harmless when nothing does."""
        for sequence in self.sequences:
            if not sequence.done:
                self._stop(sequence, None)

    def _with_news(self) -> Sequence | None:
        """Round robin, so that one busy sequence cannot hide another."""
        count = len(self.sequences)
        for offset in range(count):
            index = (self._next + offset) % count
            if self.sequences[index].has_news:
                self._next = (index + 1) % count
                return self.sequences[index]
        return None
