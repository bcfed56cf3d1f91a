"""Workers that exist only as what they hold: they take the lifecycle's actions and say what real ones would say.

Commands and messages travel in one queue per worker and direction, as over its stream; between workers any
interleaving is possible. The service's part is here too: what a decode worker says of its tokens waits until
the prefill worker's first token has come.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from baton.core.request import Attempt, Request, SamplingParams, WorkerRef
from baton.core.view import Role, WorkerLoad
from baton.policy.routing import RoutingPolicy
from baton.router import events as ev
from baton.router.lifecycle import Lifecycle, LifecycleConfig

Command = ev.SendReserve | ev.SendPrefill | ev.SendRun | ev.SendGrant | ev.SendAbort | ev.SendRenew | ev.SendGone
Message = ev.Granted | ev.FirstToken | ev.Adopted | ev.HandedOver | ev.Progress | ev.Finished | ev.AttemptFailed | ev.Preempted


@dataclass
class Hold:
    """What a worker has of an attempt. `kind`: prefill, pushed, reserved, granted, running (adopted) or whole."""

    kind: str
    target: WorkerRef | None = None
    ticket: bool = False
    num_output: int = 0


@dataclass
class ModelWorker:
    ref: WorkerRef
    role: Role
    frozen: bool = False  # dead or hanging: does nothing
    inbox: deque[Command] = field(default_factory=deque)
    outbox: deque[Message] = field(default_factory=deque)
    holds: dict[Attempt, Hold] = field(default_factory=dict)


class ModelCluster:
    """A lifecycle and everything around it."""

    def __init__(self, route: RoutingPolicy, **config: Any) -> None:
        self.lifecycle = Lifecycle(LifecycleConfig(**config), route, lambda request, view: None)
        self.now = 0.0
        self.workers: dict[WorkerRef, ModelWorker] = {}  # those the router is connected with
        self.to_confirm: list[WorkerRef] = []
        self.timers: dict[ev.Timer, float] = {}
        self.arrived: Counter[str] = Counter()
        self.completed: Counter[str] = Counter()
        self.errors: dict[str, str | None] = {}
        self.target_of: dict[Attempt, WorkerRef] = {}  # of split attempts
        self.begun: set[Attempt] = set()  # the client has the attempt's first token
        self.early: dict[Attempt, list[tuple[ModelWorker, Message]]] = {}
        self._epoch = 0

    # ---- the router's side -----------------------------------------------------------------------

    def handle(self, event: ev.Event) -> list[ev.Action]:
        actions = self.lifecycle.handle(event)
        self.lifecycle.check()
        for action in actions:
            self._perform(action)
        return actions

    def _perform(self, action: ev.Action) -> None:
        match action:
            case ev.SetTimer(timer, at):
                self.timers[timer] = at
            case ev.Complete(request_id, error):
                self.completed[request_id] += 1
                self.errors[request_id] = error
                assert self.completed[request_id] <= self.arrived[request_id]
            case ev.KillWorker(worker, _):
                assert worker not in self.to_confirm
                self.to_confirm.append(worker)
            case _:
                if isinstance(action, ev.SendReserve):
                    self.target_of[action.attempt] = action.worker
                self.workers[action.worker].inbox.append(action)  # a KeyError: somebody who is not connected was addressed

    def arrive(self, request_id: str, prompt: int, max_tokens: int, draw: float) -> None:
        self.arrived[request_id] += 1
        request = Request(request_id, (1,) * prompt, SamplingParams(max_tokens=max_tokens), self.now)
        self.handle(ev.Arrived(self.now, request, draw))

    def fire(self, timer: ev.Timer) -> None:
        self.now = max(self.now, self.timers.pop(timer))
        self.handle(ev.TimerFired(self.now, timer))

    def join(self, worker_id: str, role: Role) -> None:
        """A new life of `worker_id`; the router's stream to the old one is replaced."""
        self._epoch += 1
        ref = WorkerRef(worker_id, self._epoch)
        old = next((other for other in self.workers if other.worker_id == worker_id), None)
        if old is not None:
            del self.workers[old]
        self.workers[ref] = ModelWorker(ref, role)
        self.handle(ev.WorkerJoined(self.now, ref, role, 16, 64))

    def lose(self, worker: ModelWorker) -> None:
        """The router hears that the worker is gone; what it still had to say is never read."""
        del self.workers[worker.ref]
        self.handle(ev.WorkerLost(self.now, worker.ref, "lost"))

    def confirm(self, ref: WorkerRef) -> None:
        self.to_confirm.remove(ref)
        self.handle(ev.WorkerConfirmedDead(self.now, ref))

    def report(self, worker: ModelWorker, rate: float, waiting: int) -> None:
        load = WorkerLoad(prefill_rate=rate, decode_step=0.01, num_waiting=waiting, free_blocks=64, total_blocks=64)
        self.handle(ev.WorkerReported(self.now, worker.ref, load))

    def deliver_message(self, worker: ModelWorker) -> None:
        """The router reads one message of the worker's stream."""
        if not worker.outbox:
            return
        message = worker.outbox.popleft()
        attempt = message.attempt
        if (
            isinstance(message, ev.Progress | ev.Finished)
            and self.target_of.get(attempt) == worker.ref
            and attempt not in self.begun
        ):
            self.early.setdefault(attempt, []).append((worker, message))
            return
        self.handle(message)
        if isinstance(message, ev.FirstToken):
            self.begun.add(attempt)
            for other, early in self.early.pop(attempt, []):
                if other.ref in self.workers:
                    self.handle(early)

    # ---- the workers' side -------------------------------------------------------------------------

    def deliver_command(self, worker: ModelWorker) -> None:
        if worker.frozen or not worker.inbox:
            return
        match worker.inbox.popleft():
            case ev.SendReserve(_, attempt, _):
                worker.holds[attempt] = Hold("reserved")
            case ev.SendPrefill(_, attempt, target):
                worker.holds[attempt] = Hold("prefill", target)
            case ev.SendRun(_, attempt):
                worker.holds[attempt] = Hold("whole")
            case ev.SendGrant(_, attempt, _):
                if attempt in worker.holds:
                    worker.holds[attempt].ticket = True
            case ev.SendAbort(_, attempt):
                worker.holds.pop(attempt, None)

    def work(self, worker: ModelWorker, choice: int, ends_early: bool = False) -> None:
        """One of the worker's attempts gets one step further."""
        if worker.frozen or not worker.holds:
            return
        attempt = list(worker.holds)[choice % len(worker.holds)]
        hold = worker.holds[attempt]
        if hold.kind == "reserved":
            hold.kind = "granted"
            worker.outbox.append(ev.Granted(self.now, worker.ref, attempt, b"ticket"))
        elif hold.kind == "prefill" and hold.num_output == 0:
            hold.num_output = 1
            worker.outbox.append(ev.FirstToken(self.now, worker.ref, attempt))
            if ends_early:
                self._drop(worker, attempt, ev.Finished(self.now, worker.ref, attempt))
        elif hold.kind == "prefill" and hold.ticket:
            self._push(worker, attempt, hold)
        elif hold.kind == "pushed":
            self._acknowledged(worker, attempt, hold)
        elif hold.kind in ("whole", "running"):
            self._decode(worker, attempt, hold)

    def fail(self, worker: ModelWorker, choice: int, preempted: bool) -> None:
        """KV arrived damaged, a step raised, blocks ran out: the worker drops an attempt and says so."""
        if worker.frozen or not worker.holds:
            return
        attempt = list(worker.holds)[choice % len(worker.holds)]
        if preempted and worker.holds[attempt].kind in ("whole", "running"):
            self._drop(worker, attempt, ev.Preempted(self.now, worker.ref, attempt))
        else:
            self._drop(worker, attempt, ev.AttemptFailed(self.now, worker.ref, attempt, "damaged"))

    def _push(self, worker: ModelWorker, attempt: Attempt, hold: Hold) -> None:
        assert hold.target is not None
        target = self.workers.get(hold.target)
        if target is None or target.frozen:
            return  # nobody answers
        landed = target.holds.get(attempt)
        if landed is None or landed.kind != "granted":
            self._drop(worker, attempt, ev.AttemptFailed(self.now, worker.ref, attempt, "refused"))
            return
        landed.kind, landed.num_output = "running", 1
        target.outbox.append(ev.Adopted(self.now, target.ref, attempt))
        hold.kind = "pushed"

    def _acknowledged(self, worker: ModelWorker, attempt: Attempt, hold: Hold) -> None:
        """The answer to the push comes, or is lost with the target: then the sender cannot know that all went well."""
        assert hold.target is not None
        target = self.workers.get(hold.target)
        if target is None or target.frozen:
            self._drop(worker, attempt, ev.AttemptFailed(self.now, worker.ref, attempt, "no acknowledgement"))
        else:
            self._drop(worker, attempt, ev.HandedOver(self.now, worker.ref, attempt))

    def _decode(self, worker: ModelWorker, attempt: Attempt, hold: Hold) -> None:
        hold.num_output += 1
        if hold.kind == "whole" and hold.num_output == 1:
            worker.outbox.append(ev.FirstToken(self.now, worker.ref, attempt))
        elif hold.num_output < 4:
            worker.outbox.append(ev.Progress(self.now, worker.ref, attempt, hold.num_output))
        else:
            self._drop(worker, attempt, ev.Finished(self.now, worker.ref, attempt))

    @staticmethod
    def _drop(worker: ModelWorker, attempt: Attempt, message: Message) -> None:
        del worker.holds[attempt]
        worker.outbox.append(message)

    # ---- what must hold ------------------------------------------------------------------------------

    def check_nothing_is_forgotten(self) -> None:
        """Whatever a worker holds or is about to hold is the attempt in flight there, or its abort is on the way."""
        flights = self.lifecycle.snapshot()
        for worker in self.workers.values():
            to_come = [c.attempt for c in worker.inbox if isinstance(c, ev.SendReserve | ev.SendPrefill | ev.SendRun)]
            aborted = {command.attempt for command in worker.inbox if isinstance(command, ev.SendAbort)}
            for attempt in (*worker.holds, *to_come):
                flight = flights.get(attempt.request_id)
                current = flight is not None and flight.attempt == attempt and worker.ref in (flight.source, flight.target)
                assert current or attempt in aborted, f"{attempt} strands at {worker.ref}"

    def settle(self) -> None:
        """No more trouble: everybody who hangs is found out, new workers come, and everything runs to its end."""
        for worker in [worker for worker in self.workers.values() if worker.frozen]:
            self.lose(worker)
        for ref in list(self.to_confirm):
            self.confirm(ref)
        self.join("p-last", Role.PREFILL)
        self.join("d-last", Role.DECODE)
        for _ in range(400):
            if not self.lifecycle.num_active and not any(w.inbox or w.outbox for w in self.workers.values()):
                return
            for worker in list(self.workers.values()):
                while worker.inbox:
                    self.deliver_command(worker)
                for choice in range(len(worker.holds)):
                    self.work(worker, choice)
                while worker.outbox:
                    self.deliver_message(worker)
            for timer in [timer for timer in self.timers if timer.stage == "retry"]:
                self.fire(timer)
            self.check_nothing_is_forgotten()
        raise AssertionError(f"these never end: {self.lifecycle.snapshot()}")
