"""A decode worker: reserves blocks, receives KV into them, and runs sequences to their end.

It can also serve whole requests (short prompts, or when no prefill worker is alive); a worker of a `mixed`
pool does nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import grpc

from ..core.clock import Clock
from ..core.errors import BatonError
from ..core.kv import Endpoint
from ..core.request import Attempt, WorkerRef
from ..core.step import SequenceEvent
from ..core.topology import WorkerConfig
from ..core.view import WorkerLoad
from ..kv_transfer import handoff as ho
from ..kv_transfer.peer import add_peer_service
from ..kv_transfer.transport import Header
from ..proto import worker_pb2 as pb
from ..worker.build import Engine
from ..worker.core import WorkerCore
from ..worker.messages import attempt_from, attempt_to, attempts_from, spec_from, worker_from
from ..worker.sessions import Session, Sessions

HEAD_ROOM = 1  # blocks reserved beyond the prompt's, so that a fresh sequence does not at once need another

logger = logging.getLogger("baton.decode_worker")


class DecodeWorker(WorkerCore):
    """The receiving end of every handoff, around the engine."""

    def __init__(self, config: WorkerConfig, engine: Engine, endpoint: Endpoint, sessions: Sessions, clock: Clock) -> None:
        super().__init__(engine, sessions, clock)
        self._config = config
        self._endpoint = endpoint
        self._receiver = ho.Receiver(
            endpoint.worker, engine.blocks, config.pool.block_size, (endpoint,), config.kv_transfer.lease, HEAD_ROOM
        )

    # ---- Member --------------------------------------------------------------------------------

    def handle(self, session: Session, message: pb.RouterMessage) -> None:
        now = self.clock.now()
        match message.WhichOneof("body"):
            case "submit":
                self.add(spec_from(message.submit.sequence, now, hand_over=False), session)
            case "reserve":
                spec = spec_from(message.reserve.sequence, now, hand_over=False)
                self.sessions.own(spec.attempt, session, len(spec.known_tokens), to_prefill=False)
                self.prepare(spec)
                source = worker_from(message.reserve.source)
                self._perform(self._receiver.handle(ho.ReserveAsked(now, spec, source)))
            case "abort":
                self._abort(attempt_from(message.abort.attempt), now)
            case "renew":
                self._perform(self._receiver.handle(ho.LeaseRenewed(now, attempts_from(message.renew.attempts))))
            case "gone":
                self._perform(self._receiver.handle(ho.SourceGone(now, worker_from(message.gone.worker))))
            case other:
                logger.warning("a decode worker has no use for a %s message", other)
        self._room_freed()

    def router_gone(self, session: Session) -> None:
        now = self.clock.now()
        for attempt in sorted(session.attempts):
            self._abort(attempt, now)
        self._room_freed()

    def tick(self, now: float) -> None:
        self._perform(self._receiver.handle(ho.Tick(now)))
        self._room_freed()

    def load(self) -> WorkerLoad:
        load = super().load()
        waiting = load.num_waiting + self._receiver.num_waiting
        return replace(load, tickets=self._receiver.num_tickets, num_waiting=waiting)

    def add_services(self, server: grpc.aio.Server) -> None:
        add_peer_service(server, self.engine.memory, self._endpoint.worker, self, self._config.kv_transfer.checksum)

    async def run(self) -> None:
        await self.loop.run()

    async def close(self) -> None:
        """Nothing but the engine to close."""

    # ---- Sink: what the peer server reports -----------------------------------------------------

    def check(self, header: Header) -> None:
        self._receiver.check(header)

    def landed(self, header: Header) -> None:
        self._receiver.check(header)
        self._perform(self._receiver.handle(ho.Landed(self.clock.now(), header)))

    def damaged(self, header: Header, reason: str) -> None:
        self._perform(self._receiver.handle(ho.Damaged(self.clock.now(), header, reason)))

    def stopped(self, source: WorkerRef, attempt: Attempt) -> None:
        self._perform(self._receiver.handle(ho.SourceStopped(self.clock.now(), source, attempt)))
        self._room_freed()

    # ---- inside --------------------------------------------------------------------------------

    def on_events(self, step: int, events: list[SequenceEvent]) -> None:
        super().on_events(step, events)
        self._room_freed()

    def _abort(self, attempt: Attempt, now: float) -> None:
        self._perform(self._receiver.handle(ho.Cancelled(now, attempt)))
        self.abort(attempt)

    def _room_freed(self) -> None:
        """Blocks may have become free: reservations and local sequences that wait for some may go on."""
        if self._receiver.num_waiting:
            self._perform(self._receiver.handle(ho.RoomFreed(self.clock.now())))
        if self.engine.scheduler.num_waiting:
            self.loop.wake()

    def _perform(self, actions: Sequence[ho.ReceiverAction]) -> None:
        for action in actions:
            match action:
                case ho.Grant(ticket):
                    granted = pb.Granted(attempt=attempt_to(ticket.attempt), ticket=ticket.pack())
                    self.sessions.send(ticket.attempt, pb.WorkerMessage(granted=granted))
                case ho.Adopt():
                    self._adopt(action)
                case ho.Fail(attempt, reason, retriable):
                    self.fail(attempt, reason, retriable)

    def _adopt(self, action: ho.Adopt) -> None:
        attempt = action.spec.attempt
        try:
            self.engine.scheduler.adopt(action.spec, action.blocks, action.first_token, self.clock.now())
        except BatonError as error:
            self.engine.blocks.release(action.blocks)
            self.fail(attempt, str(error), retriable=False)
            return
        adopted = pb.Adopted(attempt=attempt_to(attempt), held_blocks=action.num_held)
        self.sessions.send(attempt, pb.WorkerMessage(adopted=adopted))
        self.loop.wake()
