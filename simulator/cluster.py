"""The router of a simulated cluster: it performs the actions of the real `Lifecycle` in virtual time.

Like `router.service`, it takes no decision: events go in, actions come out, and a message takes `network.control`
seconds each way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from random import Random

from ..core.errors import InternalError, InvalidRequest, Unavailable
from ..core.request import Attempt, Request, SequenceSpec, WorkerRef
from ..engine.counting import REPORT_EVERY
from ..kv_transfer.ticket import Ticket
from ..policy.admission import ADMISSION
from ..policy.ordering import ORDERING
from ..policy.routing import ROUTING
from ..router import events as ev
from ..router.lifecycle import Lifecycle, LifecycleConfig
from .decode import DecodeWorker
from .fleet import Fleet
from .heap import EventHeap
from .port import TokenNews
from .prefill import PrefillWorker
from .records import RequestOutcome
from .requests import RequestLog
from .setup import ClusterSetup, Failure
from .timeline import Timeline
from .tokens import Tokens
from .worker import SimulatedWorker
from .workload.planned import PlannedRequest

BEAT = 0.5  # seconds between heartbeats, and between turns of the reaper, as in the service
PATIENCE = 1200  # heartbeats without a step or a transfer after which a simulation counts as stuck


class Cluster:
    """Implements `port.RouterPort`. `ended` is told of every request that is over."""

    def __init__(
        self,
        setup: ClusterSetup,
        heap: EventHeap,
        workload: Iterator[PlannedRequest],
        ended: Callable[[RequestOutcome], None],
        timeline: Timeline | None,
        fast: bool,
    ) -> None:
        _require_known(setup)
        self.fleet = Fleet(setup, heap, self, timeline, fast)
        self.lifecycle = _lifecycle(setup)
        self.ended_at = 0.0
        self._setup = setup
        self._heap = heap
        self._workload = workload
        self._ended = ended
        self._control = setup.network.control
        self._draws = Random(setup.seed)
        self._tokens = Tokens(any(pool.prefix_cache for pool in setup.pools))
        self._running: dict[str, RequestLog] = {}
        self._num_arrived = 0
        self._arriving = True
        self._events: deque[ev.Event] = deque()
        self._handling = False
        self._lease_timer_at = 0.0
        self._births_to_come = 0
        self._idle_beats = 0
        self._last_seen: tuple[int, int] = (0, 0)

    @property
    def over(self) -> bool:
        """Whether every request has arrived and ended."""
        return not self._arriving and not self._running

    def start(self) -> None:
        """Bring all workers up and let the first request arrive."""
        for worker_id in self.fleet.names:
            self._join(worker_id)
        for failure in self._setup.failures:
            self._heap.push(failure.at, self._fail, failure)
        self._heap.push(BEAT, self._beat)
        first = self._next_planned()
        self._heap.push(0.0 if first is None else first.at, self._arrive, first)

    # ---- requests ------------------------------------------------------------------------------

    def _arrive(self, planned: PlannedRequest | None) -> None:
        """Take in a request, and all others of the same moment: they meet the same cluster. Then wait for the next."""
        while planned is not None:
            self._take_in(planned)
            planned = self._next_planned()
            if planned is not None and planned.at > self._heap.now:
                self._heap.push(planned.at, self._arrive, planned)
                return
        self._arriving = False

    def _next_planned(self) -> PlannedRequest | None:
        planned = next(self._workload, None)
        if planned is None:
            return None
        if planned.at < self._heap.now or planned.input_tokens < 1 or planned.output_tokens < 1:
            raise InvalidRequest(
                f"request {planned.index} of the workload, {planned}: times may not go back (it is {self._heap.now} s), "
                "and prompt and output need at least one token",
                "workload",
            )
        return planned

    def _take_in(self, planned: PlannedRequest) -> None:
        self._num_arrived += 1
        request = Request(
            id=f"r{self._num_arrived}",
            prompt=self._tokens.prompt(planned),
            sampling=self._tokens.sampling(planned.output_tokens),
            arrival=self._heap.now,
            slo=self._setup.slo,
            tenant=planned.tenant,
            priority=planned.priority,
        )
        self._running[request.id] = RequestLog(planned, request)
        self._post(ev.Arrived(self._heap.now, request, self._draws.random()))

    def _complete(self, request_id: str, error: str) -> None:
        log = self._running.pop(request_id, None)
        if log is None:
            return
        if error:
            self._catch_up(log)
        self.ended_at = self._heap.now
        self._ended(log.outcome(self._heap.now, error))

    # ---- events in, actions out ------------------------------------------------------------------

    def _post(self, event: ev.Event) -> None:
        """Give the lifecycle an event. Events that arise while one is being handled are handled after it."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        while self._events:
            for action in self.lifecycle.handle(self._events.popleft()):
                self._perform(action)
        self._handling = False

    def _perform(self, action: ev.Action) -> None:
        match action:
            case ev.SetTimer(timer, at):
                self._set_timer(timer, at)
            case ev.SendReserve(ref, attempt, source):
                spec, worker = self._place(attempt, None, ref, False), self.fleet.find(ref)
                if isinstance(worker, DecodeWorker):
                    self._send(worker, worker.on_reserve, spec, source)
            case ev.SendPrefill(ref, attempt, target):
                spec, worker = self._place(attempt, ref, None, True), self.fleet.find(ref)
                if worker is not None:
                    self._send(worker, worker.on_submit, spec, target)
            case ev.SendRun(ref, attempt):
                spec, worker = self._place(attempt, ref, ref, False), self.fleet.find(ref)
                if worker is not None:
                    self._send(worker, worker.on_submit, spec, None)
            case ev.SendGrant(ref, attempt):
                ticket, worker = self._running[attempt.request_id].ticket, self.fleet.find(ref)
                if isinstance(worker, PrefillWorker) and ticket is not None:
                    self._send(worker, worker.on_grant, ticket)
            case ev.Complete(request_id, error):
                self._complete(request_id, error or "")
            case ev.SendAbort(ref, attempt):
                if (worker := self.fleet.find(ref)) is not None:
                    self._send(worker, worker.on_abort, attempt)
            case ev.SendRenew(ref, attempts):
                if (worker := self.fleet.find(ref)) is not None:
                    self._send(worker, worker.on_renew, attempts)
            case ev.SendGone(ref, gone):
                if (worker := self.fleet.find(ref)) is not None:
                    self._send(worker, worker.on_gone, gone)
            case ev.KillWorker(ref):
                self._heap.push(self._heap.now + self._control, self._kill, ref)

    def _send(self, worker: SimulatedWorker, handler: Callable[..., None], *arguments: object) -> None:
        self._heap.push(self._heap.now + self._control, worker.deliver, handler, *arguments)

    def _place(self, attempt: Attempt, first: WorkerRef | None, rest: WorkerRef | None, hand_over: bool) -> SequenceSpec:
        """Note where an attempt goes; what its worker is to be told."""
        log = self._running[attempt.request_id]
        if log.attempt is not None and log.attempt != attempt:
            self._catch_up(log)
        log.place(attempt, first, rest)
        request = log.request
        output = self._tokens.output(log.base) if log.base else ()
        arrival = self._heap.now + self._control
        return SequenceSpec(attempt, request.prompt, request.sampling, output, request.priority, arrival, hand_over)

    def _catch_up(self, log: RequestLog) -> None:
        """The router has every token that was sent, although only some were worth an event here."""
        worker = self.fleet.find(log.rest) if log.rest is not None else None
        if worker is not None and log.attempt is not None and log.begun:
            worker.deliver(lambda: None)  # up to now
            log.num_tokens = max(log.num_tokens, worker.scheduler.num_output(log.attempt) or 0)

    def _set_timer(self, timer: ev.Timer, at: float) -> None:
        if at == math.inf:
            return
        if timer.request_id:
            self._running[timer.request_id].timers[timer.kind, timer.attempt, timer.stage] = at
        else:
            self._lease_timer_at = at
        self._heap.push(max(at, self._heap.now), self._timer_due, timer, at)

    def _timer_due(self, timer: ev.Timer, at: float) -> None:
        """A timer that was replaced, or whose request is over, fires no more."""
        if timer.request_id:
            log = self._running.get(timer.request_id)
            if log is None or log.timers.get((timer.kind, timer.attempt, timer.stage)) != at:
                return
        elif self._lease_timer_at != at:
            return
        self._post(ev.TimerFired(self._heap.now, timer))

    # ---- what workers say (port.RouterPort) --------------------------------------------------------

    def tokens(self, worker: WorkerRef, news: Sequence[TokenNews]) -> None:
        self._heap.push(self._heap.now + self._control, self._take_tokens, worker, news)

    def granted(self, worker: WorkerRef, ticket: Ticket) -> None:
        self._heap.push(self._heap.now + self._control, self._take_grant, worker, ticket)

    def adopted(self, worker: WorkerRef, attempt: Attempt) -> None:
        self._heap.push(self._heap.now + self._control, self._take_adopted, worker, attempt, self._heap.now)

    def handed_over(self, worker: WorkerRef, attempt: Attempt) -> None:
        self._report(ev.HandedOver(self._heap.now + self._control, worker, attempt))

    def failed(self, worker: WorkerRef, attempt: Attempt, reason: str, retriable: bool) -> None:
        self._report(ev.AttemptFailed(self._heap.now + self._control, worker, attempt, reason, retriable))

    def preempted(self, worker: WorkerRef, attempt: Attempt, num_output: int) -> None:
        self._heap.push(self._heap.now + self._control, self._take_preempted, worker, attempt, num_output)

    def _report(self, event: ev.Event) -> None:
        """Give the lifecycle an event that arrives `control` seconds from now."""
        self._heap.push(self._heap.now + self._control, self._post, event)

    def _take_tokens(self, worker: WorkerRef, news: Sequence[TokenNews]) -> None:
        """As `router.intake.TokenIntake`."""
        now = self._heap.now
        for item in news:
            attempt = item.attempt
            log = self._running.get(attempt.request_id)
            if log is None or log.attempt != attempt or worker not in (log.first, log.rest):
                continue
            before = log.num_tokens
            if log.take(item, now):
                self._post(ev.FirstToken(now, worker, attempt))
            if item.finished:
                self._post(ev.Finished(now, worker, attempt))
            elif before // REPORT_EVERY != item.num_output // REPORT_EVERY:
                self._post(ev.Progress(now, worker, attempt, item.num_output))

    def _take_grant(self, worker: WorkerRef, ticket: Ticket) -> None:
        log = self._running.get(ticket.attempt.request_id)
        if log is not None and log.attempt == ticket.attempt:
            log.ticket = ticket
        self._post(ev.Granted(self._heap.now, worker, ticket.attempt, b""))

    def _take_adopted(self, worker: WorkerRef, attempt: Attempt, landed: float) -> None:
        log = self._running.get(attempt.request_id)
        if log is not None and log.attempt == attempt and log.landed is None:
            log.landed = landed
        self._post(ev.Adopted(self._heap.now, worker, attempt))

    def _take_preempted(self, worker: WorkerRef, attempt: Attempt, num_output: int) -> None:
        log = self._running.get(attempt.request_id)
        if log is not None and log.attempt == attempt and log.begun:
            log.num_tokens = max(log.num_tokens, num_output)
        self._post(ev.Preempted(self._heap.now, worker, attempt))

    # ---- lives of workers ------------------------------------------------------------------------

    def _join(self, worker_id: str) -> None:
        worker = self.fleet.start(worker_id)
        setup, now = worker.setup, self._heap.now
        self._post(ev.WorkerJoined(now, worker.ref, setup.role, setup.block_size, setup.num_blocks))
        self._post(ev.WorkerReported(now, worker.ref, worker.load()))

    def _fail(self, failure: Failure) -> None:
        worker = self.fleet.life_of(failure.worker)
        if worker is None or self.over:
            return
        for log in self._running.values():
            if log.rest == worker.ref:
                self._catch_up(log)
        self.fleet.kill(worker.ref)
        self._heap.push(self._heap.now + failure.noticed, self._notice, worker.ref)
        if failure.restart != math.inf:
            self._births_to_come += 1
            self._heap.push(self._heap.now + failure.restart, self._restart, failure.worker)

    def _notice(self, ref: WorkerRef) -> None:
        """The control stream broke and the controller confirms the death, as `router.membership` reports it."""
        now = self._heap.now
        self._post(ev.WorkerLost(now, ref, "its process ended"))
        for log in list(self._running.values()):
            # The lifecycle cannot know who still waits for a first token that now never comes.
            if log.attempt is not None and not log.begun and log.first == ref:
                self._post(ev.AttemptFailed(now, ref, log.attempt, f"{ref} was lost before its first token came"))
        self._post(ev.WorkerConfirmedDead(now, ref))

    def _restart(self, worker_id: str) -> None:
        self._births_to_come -= 1
        if not self.over and self.fleet.life_of(worker_id) is None:
            self._join(worker_id)

    def _kill(self, ref: WorkerRef) -> None:
        self.fleet.kill(ref)
        self._report(ev.WorkerConfirmedDead(self._heap.now + self._control, ref))

    def _beat(self) -> None:
        if self.over:
            return
        for ref, load in self.fleet.beat():
            self._report(ev.WorkerReported(self._heap.now + self._control, ref, load))
        self._require_progress()
        self._heap.push(self._heap.now + BEAT, self._beat)

    def _require_progress(self) -> None:
        """Requests that nobody will ever serve are given up, and a simulation that is stuck says so: none runs for ever."""
        seen = self.fleet.num_steps, self._num_arrived
        busy = any(worker.device.in_step for worker in self.fleet.alive) or self.fleet.transfers.num_under_way
        waits = not self._running or self._births_to_come
        self._idle_beats = 0 if busy or waits or seen != self._last_seen else self._idle_beats + 1
        self._last_seen = seen
        if not self._arriving and not self._births_to_come and not self.fleet.alive:
            for request_id in list(self._running):
                self._complete(request_id, Unavailable.code)
                self._post(ev.Cancelled(self._heap.now, request_id))
        elif self._idle_beats > PATIENCE:
            stuck = next(iter(self._running.values())).planned
            raise InternalError(
                f"the simulation is stuck at {self._heap.now} s with {len(self._running)} requests, first {stuck}"
            )


def _require_known(setup: ClusterSetup) -> None:
    """Raises InvalidRequest for a policy that does not exist."""
    named = [("routing", setup.routing, tuple(ROUTING)), ("admission", setup.admission, tuple(ADMISSION))]
    named += [("ordering", pool.ordering, tuple(ORDERING)) for pool in setup.pools]
    for field, name, allowed in named:
        if name not in allowed:
            raise InvalidRequest(f"{field}: there is no policy {name!r}; allowed are {', '.join(allowed)}", field)


def _lifecycle(setup: ClusterSetup) -> Lifecycle:
    config = LifecycleConfig(
        slo=setup.slo,
        lease=setup.lease,
        request_timeout=setup.request_timeout,
        local_prefill_tokens=setup.local_prefill_tokens,
    )
    return Lifecycle(config, ROUTING[setup.routing], ADMISSION[setup.admission](setup.max_queue, setup.slo))
