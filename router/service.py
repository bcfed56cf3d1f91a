"""The live driver of the lifecycle: it performs its actions, feeds it events, and keeps the tokens.

One asyncio loop, one clock. Every decision is the lifecycle's; this module must never take one. Tokens are
logged here, put in order, and read by the faces through `Stream`s. A client that reads slowly delays nobody.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from ..core.clock import Clock
from ..core.errors import Cancelled, InvalidRequest, Unavailable
from ..core.request import Attempt, FinishReason, Request, WorkerRef
from ..observability.logs import log_request
from ..observability.metrics import Metrics
from ..observability.records import Place
from ..proto import worker_pb2 as pb
from . import events as ev
from .intake import TokenIntake
from .membership import Membership
from .outcome import error_of, finish_of, record_of
from .peers import Peers, id_prefix
from .recent import RecentRequests
from .roster import ControllerLink
from .sequence import Sequence
from .stream import Stream, Submission
from .tape import Brain, Tape
from .timers import Timers
from .wire import attempt_from, attempt_to, spec_to, worker_to

FLUSH_TIMEOUT = 0.5  # seconds for the last aborts to leave at shutdown

logger = logging.getLogger("baton.router")


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """`epoch` is drawn by the process, `seed` feeds every random draw of the router (None draws one)."""

    router_id: str
    epoch: int
    request_timeout: float = 600.0
    seed: int | None = None


class RouterService:
    """Takes submissions, gives streams. Create it inside a running event loop, then `start`."""

    def __init__(
        self,
        options: ServiceOptions,
        brain: Brain,
        clock: Clock,
        link: ControllerLink,
        metrics: Metrics,
        tape: Tape | None = None,
    ) -> None:
        self._options = options
        own = WorkerRef(options.router_id, options.epoch)
        self._id_prefix = id_prefix(own)
        self.peers = Peers(own)
        self._brain = brain
        self._clock = clock
        self._metrics = metrics
        self._tape = tape
        self._random = random.Random(options.seed)
        self._last_spec = pb.SequenceSpec()  # the two workers of an attempt are told the same, one right after the other
        self._timers = Timers(clock, self.post)
        self.membership = Membership(options.router_id, options.epoch, clock, self, link)
        self.changed = asyncio.Event()  # set whenever the set of live workers has changed
        self._running: dict[str, tuple[Sequence, Stream]] = {}  # by the sequence's id
        self._intake = TokenIntake(self, self._running, metrics)
        self.recent = RecentRequests()
        self._streams: dict[str, Stream] = {}
        self._by_client_id: dict[str, str] = {}
        self._events: deque[ev.Event] = deque()
        self._draining_events = False
        self._counter = 0
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_active(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    @property
    def num_pending(self) -> int:
        """Sequences that no worker has yet."""
        return sum(1 for sequence, _ in self._running.values() if sequence.attempt is None)

    @property
    def num_timers(self) -> int:
        return len(self._timers)

    def start(self) -> None:
        """Connect to the cluster."""
        self.membership.start()

    async def idle(self) -> None:
        """Wait until no request runs."""
        await self._idle.wait()

    async def close(self, grace: float) -> None:
        """Refuse new requests, give running ones `grace` seconds, end the rest with Unavailable."""
        self._closing = True
        try:
            async with asyncio.timeout(grace):
                await self.idle()
        except TimeoutError:
            logger.warning("%d requests are cut off by the shutdown", self.num_active)
        for stream in list(self._streams.values()):
            stream.cancel()
        await self.membership.flush(FLUSH_TIMEOUT)
        self._timers.close()
        await self.membership.close()
        await self.peers.close()

    # ---- for the faces ---------------------------------------------------------------------------

    def submit(self, submission: Submission) -> Stream:
        """Start a request. Raises at once what can be known at once: Unavailable, Overloaded, InvalidRequest."""
        if self._closing:
            raise Unavailable("this router is shutting down: send the request to another one")
        if submission.client_id and submission.client_id in self._by_client_id:
            raise InvalidRequest(f"request_id {submission.client_id!r} is in use by a running request", "request_id")
        self._counter += 1
        stream = Stream(f"{self._id_prefix}{self._counter}", submission, self._stop)
        self._streams[stream.id] = stream
        self._idle.clear()
        if submission.client_id:
            self._by_client_id[submission.client_id] = stream.id
        arrival = self._clock.now()
        seed = self._random.getrandbits(63) if submission.seed is None else submission.seed
        for index in range(submission.n):
            if stream.error is not None:
                break
            request = self._request(stream, index, arrival, seed)
            sequence = Sequence(request, index)
            self._running[request.id] = sequence, stream
            stream.sequences.append(sequence)
            self.post(ev.Arrived(arrival, request, self._random.random()))
        if stream.error is not None:
            raise stream.error
        return stream

    def abort(self, request_id: str) -> bool:
        """End a running request of this router by the client's or the router's name for it. False when there is none."""
        stream = self._streams.get(self._by_client_id.get(request_id, request_id))
        if stream is None:
            return False
        stream.cancel()
        return True

    def _request(self, stream: Stream, index: int, arrival: float, seed: int) -> Request:
        submission = stream.submission
        limit = self._options.request_timeout
        timeout = limit if submission.timeout is None else min(submission.timeout, limit)
        return Request(
            id=f"{stream.id}.{index}",
            prompt=submission.prompt,
            sampling=replace(submission.sampling, seed=seed, sequence_index=index),
            arrival=arrival,
            slo=submission.slo,
            tenant=submission.tenant,
            priority=submission.priority,
            deadline=arrival + timeout,
        )

    def _stop(self, sequence: Sequence, finish: FinishReason | None) -> None:
        """End a sequence by the client's will: well when its text is complete, else as cancelled."""
        sequence.wanted_finish = finish
        self.post(ev.Cancelled(self._clock.now(), sequence.request.id, done=finish is not None))

    # ---- events in, actions out ------------------------------------------------------------------

    def post(self, event: ev.Event) -> None:
        """Give the lifecycle an event. Events that arise while one is being handled are handled after it."""
        self._events.append(event)
        if self._draining_events:
            return
        self._draining_events = True
        try:
            while self._events:
                self._handle(self._events.popleft())
        finally:
            self._draining_events = False

    def _handle(self, event: ev.Event) -> None:
        try:
            actions = self._brain.handle(event)
            if self._tape is not None:
                self._tape(event, actions)
            for action in actions:
                self._perform(action)
        except Exception as error:
            # A bug of ours. The request it concerns must not hang because of it, nor the others end.
            logger.exception("handling %s failed", type(event).__name__)
            request_id = _request_of(event)
            if request_id is not None:
                self._complete(ev.Complete(request_id, "internal", f"the router failed: {type(error).__name__}: {error}"))
                if not isinstance(event, ev.Cancelled):  # nor may workers go on with it
                    self._events.append(ev.Cancelled(self._clock.now(), request_id))

    def _perform(self, action: ev.Action) -> None:
        match action:
            case ev.SendReserve(worker, attempt, source):
                if (spec := self._place(attempt, None, worker)) is not None:
                    reserve = pb.Reserve(sequence=spec, source=worker_to(source))
                    self.membership.send(worker, pb.RouterMessage(reserve=reserve))
            case ev.SendPrefill(worker, attempt, target):
                if (spec := self._place(attempt, worker, None)) is not None:
                    submit = pb.Submit(sequence=spec, target=worker_to(target))
                    self.membership.send(worker, pb.RouterMessage(submit=submit))
            case ev.SendRun(worker, attempt):
                if (spec := self._place(attempt, worker, worker)) is not None:
                    self.membership.send(worker, pb.RouterMessage(submit=pb.Submit(sequence=spec)))
            case ev.SendGrant(worker, attempt, ticket):
                grant = pb.Grant(attempt=attempt_to(attempt), ticket=ticket)
                self.membership.send(worker, pb.RouterMessage(grant=grant))
            case ev.SendAbort(worker, attempt):
                self.membership.unassign(worker, attempt)
                self.membership.send(worker, pb.RouterMessage(abort=pb.AbortAttempt(attempt=attempt_to(attempt))))
            case ev.SendRenew(worker, attempts):
                renew = pb.Renew(attempts=[attempt_to(attempt) for attempt in attempts])
                self.membership.send(worker, pb.RouterMessage(renew=renew))
            case ev.SendGone(worker, gone):
                self.membership.send(worker, pb.RouterMessage(gone=pb.WorkerGone(worker=worker_to(gone))))
            case ev.KillWorker(worker, reason):
                self.membership.kill(worker, reason)
            case ev.SetTimer(timer, at):
                self._timers.set(timer, at)
            case ev.Complete():
                self._complete(action)

    def _place(self, attempt: Attempt, first: WorkerRef | None, rest: WorkerRef | None) -> pb.SequenceSpec | None:
        """Note where an attempt goes; what its worker is to be told, or None when the request is over."""
        sequence = self._sequence(attempt)
        if sequence is None:
            return None
        if sequence.attempt != attempt:
            self._leave_workers(sequence)
        if sequence.place(attempt, first, rest):
            self._metrics.attempt(sequence.retries[-1] if attempt.number > 1 and sequence.retries else None)
        for worker in {first, rest} - {None}:
            assert worker is not None
            self.membership.assign(worker, attempt)
        if self._last_spec.attempt.request_id != attempt.request_id or self._last_spec.attempt.number != attempt.number:
            self._last_spec = spec_to(attempt, sequence.request, sequence.attempt_output, self._clock.now())
        return self._last_spec

    def _sequence(self, attempt: Attempt) -> Sequence | None:
        running = self._running.get(attempt.request_id)
        return None if running is None else running[0]

    def _leave_workers(self, sequence: Sequence) -> None:
        if sequence.attempt is not None:
            for worker in sequence.workers:
                self.membership.unassign(worker, sequence.attempt)

    # ---- the end of a request --------------------------------------------------------------------

    def _complete(self, action: ev.Complete) -> None:
        running = self._running.pop(action.request_id, None)
        if running is None:
            return
        sequence, stream = running
        self._timers.drop_request(action.request_id)
        self._leave_workers(sequence)
        error = error_of(action)
        if self._closing and isinstance(error, Cancelled):
            error = Unavailable(f"the router is shutting down; request {stream.client_id} can be sent again")
        sequence.end(finish_of(sequence, error), self._clock.now())
        if error is not None:
            stream.fail(error)
        stream.wake()
        if stream.done:
            self._end_stream(stream)

    def _end_stream(self, stream: Stream) -> None:
        if self._streams.pop(stream.id, None) is None:
            return
        if self._by_client_id.get(stream.submission.client_id) == stream.id:
            del self._by_client_id[stream.submission.client_id]
        if not self._streams:
            self._idle.set()
        if not stream.submission.internal:
            record = record_of(stream, self.membership.place)
            self._metrics.request_ended(record)
            log_request(record)
            self.recent.add(stream.sequences[0].request.arrival, record)

    # ---- what workers say (membership.MembershipOwner) ---------------------------------------------------

    def worker_message(self, worker: WorkerRef, message: pb.WorkerMessage) -> None:
        now = self._clock.now()
        match message.WhichOneof("body"):
            case "tokens":
                self._intake.take(worker, message.tokens.sequences, now)
            case "granted":
                attempt = attempt_from(message.granted.attempt)
                self.post(ev.Granted(now, worker, attempt, message.granted.ticket))
            case "adopted":
                attempt = attempt_from(message.adopted.attempt)
                if (sequence := self._sequence(attempt)) is not None:
                    sequence.adopted(attempt, now)
                self.post(ev.Adopted(now, worker, attempt))
            case "handed_over":
                handed = message.handed_over
                attempt = attempt_from(handed.attempt)
                self._metrics.handoff(handed.transport, handed.bytes, handed.seconds, handed.exposed)
                self.membership.unassign(worker, attempt)
                self.post(ev.HandedOver(now, worker, attempt))
            case "failed":
                self.attempt_failed(worker, attempt_from(message.failed.attempt), "failed", message.failed)
            case "preempted":
                attempt = attempt_from(message.preempted.attempt)
                self._trouble(worker, attempt, "preempted")
                self.post(ev.Preempted(now, worker, attempt))

    def stream_reset(self, worker: WorkerRef, attempts: Seq[Attempt]) -> None:
        for attempt in attempts:
            report = pb.AttemptFailed(reason=f"the control stream of {worker.worker_id} broke", retriable=True)
            self.attempt_failed(worker, attempt, "stream_reset", report)

    def worker_lost(self, worker: WorkerRef, place: Place) -> None:
        """The lifecycle knows. What it cannot know is who still waits for a first token that now never comes."""
        self._metrics.worker_lost(place)
        for sequence, _ in list(self._running.values()):
            if sequence.attempt is not None and sequence.awaits_first_token_from(worker):
                report = pb.AttemptFailed(reason=f"{worker.worker_id} was lost before its first token came", retriable=True)
                self.attempt_failed(worker, sequence.attempt, "worker_lost", report)

    def place(self, worker: WorkerRef) -> Place:
        """Labels of a worker (`intake.IntakeOwner`)."""
        return self.membership.place(worker)

    def membership_changed(self) -> None:
        self.changed.set()

    def routers_changed(self, routers: Iterable[pb.Registration]) -> None:
        self.peers.update(routers)

    def attempt_failed(self, worker: WorkerRef, attempt: Attempt, kind: str, report: pb.AttemptFailed) -> None:
        self._trouble(worker, attempt, kind)
        self.post(ev.AttemptFailed(self._clock.now(), worker, attempt, report.reason, report.retriable))

    def _trouble(self, worker: WorkerRef, attempt: Attempt, kind: str) -> None:
        """Remember why the attempt will be replaced, if it is."""
        self.membership.unassign(worker, attempt)
        sequence = self._sequence(attempt)
        if sequence is not None and sequence.attempt == attempt:
            sequence.trouble = kind


def _request_of(event: ev.Event) -> str | None:
    """The request that an event is about."""
    match event:
        case ev.Arrived():
            return event.request.id
        case ev.Cancelled():
            return event.request_id
        case ev.TimerFired():
            return event.timer.request_id or None
        case ev.WorkerJoined() | ev.WorkerReported() | ev.WorkerDraining() | ev.WorkerLost() | ev.WorkerConfirmedDead():
            return None
    return event.attempt.request_id
