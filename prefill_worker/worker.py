"""A prefill worker: computes the KV of prompts, samples the first token, and hands both over.

The KV of a prompt leaves chunk by chunk as soon as a ticket is there, while later chunks are still being
computed. Until the decode worker has acknowledged all of it, the blocks stay pinned here: when the decode
pool is full, this worker's memory is the buffer and nothing is computed twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import replace

import grpc

from ..core.clock import Clock
from ..core.errors import BatonError, TransferError, TransferRefused
from ..core.kv import Endpoint
from ..core.request import Attempt
from ..core.step import ComputedEvent, TokenEvent
from ..core.topology import WorkerConfig
from ..core.view import WorkerLoad
from ..kv_transfer import handoff as ho
from ..kv_transfer.plan import plan_copies
from ..kv_transfer.registry import choose
from ..kv_transfer.ticket import Ticket
from ..kv_transfer.transport import TransferStats, Transport
from ..kv_transfer.transports import make_transports
from ..proto import worker_pb2 as pb
from ..worker.build import Engine
from ..worker.core import WorkerCore
from ..worker.messages import attempt_from, attempt_to, attempts_from, spec_from, worker_from
from ..worker.sessions import Session, Sessions

logger = logging.getLogger("baton.prefill_worker")


class PrefillWorker(WorkerCore):
    """The sending end of every handoff, around the engine."""

    def __init__(self, config: WorkerConfig, engine: Engine, endpoint: Endpoint, sessions: Sessions, clock: Clock) -> None:
        super().__init__(engine, sessions, clock)
        self._config = config
        self._endpoint = endpoint
        self._sender = ho.Sender(endpoint.worker, config.kv_transfer.lease)
        self._transports = make_transports(endpoint, engine.memory, config.kv_transfer.checksum)
        self._tasks: set[asyncio.Task[None]] = set()
        self._first_token_at: dict[Attempt, float] = {}
        self._sent: dict[Attempt, list[TransferStats]] = {}

    # ---- Member --------------------------------------------------------------------------------

    def handle(self, session: Session, message: pb.RouterMessage) -> None:
        now = self.clock.now()
        match message.WhichOneof("body"):
            case "submit":
                self._submit(session, message.submit, now)
            case "grant":
                self._granted(message.grant, now)
            case "abort":
                self._abort(attempt_from(message.abort.attempt), now)
            case "renew":
                self._perform(self._sender.handle(ho.LeaseRenewed(now, attempts_from(message.renew.attempts))))
            case "gone":
                self._perform(self._sender.handle(ho.TargetGone(now, worker_from(message.gone.worker))))
            case other:
                logger.warning("a prefill worker has no use for a %s message", other)

    def router_gone(self, session: Session) -> None:
        now = self.clock.now()
        for attempt in sorted(session.attempts):
            self._abort(attempt, now)

    def tick(self, now: float) -> None:
        self._perform(self._sender.handle(ho.Tick(now)))

    def load(self) -> WorkerLoad:
        return replace(super().load(), tickets=self._sender.num_open)

    def add_services(self, server: grpc.aio.Server) -> None:
        """A prefill worker receives no KV."""

    async def run(self) -> None:
        await self.loop.run()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for transport in self._transports.values():
            await transport.close()

    # ---- commands ------------------------------------------------------------------------------

    def _submit(self, session: Session, message: pb.Submit, now: float) -> None:
        hand_over = message.HasField("target")
        spec = spec_from(message.sequence, now, hand_over)
        if self.add(spec, session) and hand_over:
            opened = ho.Opened(now, spec.attempt, worker_from(message.target), len(spec.known_tokens))
            self._perform(self._sender.handle(opened))

    def _granted(self, message: pb.Grant, now: float) -> None:
        try:
            ticket = Ticket.unpack(message.ticket)
        except TransferRefused as error:
            self._abort(attempt_from(message.attempt), now, reason=str(error))
            return
        self._perform(self._sender.handle(ho.Granted(now, ticket)))

    def _abort(self, attempt: Attempt, now: float, reason: str | None = None) -> None:
        if reason is not None:
            self.fail(attempt, reason, retriable=True)
        self._perform(self._sender.handle(ho.Cancelled(now, attempt)))
        self.abort(attempt)

    def forget(self, attempt: Attempt) -> None:
        super().forget(attempt)
        self._first_token_at.pop(attempt, None)
        self._sent.pop(attempt, None)

    # ---- the engine's events -------------------------------------------------------------------

    def on_computed(self, event: ComputedEvent) -> None:
        now = self.clock.now()
        self._perform(self._sender.handle(ho.Computed(now, event.attempt, event.num_tokens, event.blocks, event.last)))

    def on_tokens(self, event: TokenEvent) -> None:
        now = self.clock.now()
        if event.finish is not None:  # it ended with its first token: nothing to hand over
            self._perform(self._sender.handle(ho.Cancelled(now, event.attempt)))
        elif self._sender.is_open(event.attempt):
            self._first_token_at[event.attempt] = now
            self._perform(self._sender.handle(ho.FirstToken(now, event.attempt, event.tokens[0])))

    # ---- the handoff's actions -----------------------------------------------------------------

    def _perform(self, actions: Sequence[ho.SenderAction]) -> None:
        for action in actions:
            match action:
                case ho.Push(source_blocks=blocks):
                    # A reference of the push's own: the blocks stay what they are, whatever happens to the sequence.
                    self.engine.blocks.retain(blocks)
                    self._start(self._push(action))
                case ho.Unpin(attempt):
                    self.engine.scheduler.release(attempt)
                    self.loop.wake()
                case ho.HandedOver(attempt):
                    self._report_handed_over(attempt)
                    self.forget(attempt)
                case ho.Fail(attempt, reason, retriable):
                    self.fail(attempt, reason, retriable)
                    self.engine.scheduler.abort(attempt)
                case ho.SendStop(attempt, ticket):
                    self._start(self._stop(attempt, ticket))

    async def _push(self, action: ho.Push) -> None:
        """Run one push and give back the references it was started with."""
        ticket, note, blocks = action.ticket, action.note, action.source_blocks
        try:
            stats = await self._transfer(action)
        except Exception as error:  # whatever it was: an attempt whose push has no end would keep its blocks for ever
            if not isinstance(error, TransferError):
                logger.exception("a push of %s failed", ticket.attempt)
            retriable = isinstance(error, TransferError) or not isinstance(error, BatonError)
            reason = str(error) or type(error).__name__
            outcome: ho.SenderEvent = ho.PushFailed(self.clock.now(), ticket.attempt, reason, retriable)
        else:
            if self._sender.is_open(ticket.attempt):
                self._sent.setdefault(ticket.attempt, []).append(stats)
            outcome = ho.PushDone(self.clock.now(), ticket.attempt, note.first_block, note.num_blocks)
        finally:
            self.engine.blocks.release(blocks)
            self.loop.wake()  # somebody may wait for these blocks
        self._perform(self._sender.handle(outcome))

    async def _stop(self, attempt: Attempt, ticket: Ticket) -> None:
        try:
            await self._transport(ticket).stop(self._endpoint.worker, attempt, ticket.endpoints[0])
        except TransferError as error:  # then nothing was ever pushed there either
            logger.warning("no stop of %s to %s: %s", attempt, ticket.target, error)

    async def _transfer(self, action: ho.Push) -> TransferStats:
        ticket, note = action.ticket, action.note
        target_layouts = [endpoint.layout for endpoint in ticket.endpoints]
        copies = plan_copies(
            [self.engine.layout],
            target_layouts,
            action.source_blocks,
            ticket.blocks,
            num_tokens=ticket.num_tokens,
            first_block=note.first_block,
            num_blocks=note.num_blocks,
        )
        return await self._transport(ticket).push(copies, ticket, note)

    def _transport(self, ticket: Ticket) -> Transport:
        return choose(self._config.kv_transfer.transport, ticket.endpoints[0], self._transports)

    def _report_handed_over(self, attempt: Attempt) -> None:
        sent = self._sent.get(attempt, [])
        sampled = self._first_token_at.get(attempt)
        report = pb.HandedOver(
            attempt=attempt_to(attempt),
            bytes=sum(stats.num_bytes for stats in sent),
            seconds=sum(stats.seconds for stats in sent if stats.num_bytes),  # the rest only asked
            exposed=0.0 if sampled is None else self.clock.now() - sampled,
            transport=sent[-1].transport if sent else "",
        )
        self.sessions.send(attempt, pb.WorkerMessage(handed_over=report))

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
