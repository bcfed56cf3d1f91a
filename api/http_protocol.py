"""HTTP connections that wait for nobody for ever: uvicorn's protocol with a limit on how long headers may take."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT = 20.0  # seconds from opening a connection, or from the first byte of a later request, to its last header


class ImpatientProtocol(H11Protocol):
    """Closes connections that open and say nothing, or send their headers a byte at a time."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn declares it
        super().connection_made(transport)
        self._waiting = self.loop.call_later(HEADER_TIMEOUT, self._give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:  # no whole header yet
            if self._waiting is None:
                self._waiting = self.loop.call_later(HEADER_TIMEOUT, self._give_up)
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        if not self.transport.is_closing():
            self.transport.close()
