"""A lifecycle with its clock in the test's hand: events in, actions out, integrity checked after each."""

from __future__ import annotations

from typing import Any

from baton.core.request import Attempt, Request, SamplingParams, WorkerRef
from baton.core.slo import Slo
from baton.core.view import Role, WorkerLoad
from baton.policy.admission import ADMISSION
from baton.policy.routing import ROUTING
from baton.router import events as ev
from baton.router.lifecycle import Lifecycle, LifecycleConfig

ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}


def ref(name: str, epoch: int = 1) -> WorkerRef:
    return WorkerRef(name, epoch)


P0, P1, D0, D1, M0 = ref("p0"), ref("p1"), ref("d0"), ref("d1"), ref("m0")


class Driver:
    """Workers are named by their role: p0 is a prefill, d1 a decode, m0 a mixed worker."""

    def __init__(self, *names: str, routing: str = "round_robin", admission: str = "none", max_queue: int = 8, **config: Any):
        admit = ADMISSION[admission](max_queue, Slo())
        self.lifecycle = Lifecycle(LifecycleConfig(**config), ROUTING[routing], admit)
        self.now = 0.0
        for name in names:
            self.join(name)

    def handle(self, event: ev.Event) -> list[ev.Action]:
        actions = self.lifecycle.handle(event)
        self.lifecycle.check()
        return actions

    # ---- events ----------------------------------------------------------------------------------

    def join(self, name: str, epoch: int = 1, total_blocks: int = 100) -> list[ev.Action]:
        return self.handle(ev.WorkerJoined(self.now, ref(name, epoch), ROLES[name[0]], 16, total_blocks))

    def report(self, worker: WorkerRef, **load: Any) -> list[ev.Action]:
        load = {"free_blocks": 100, "total_blocks": 100} | load
        return self.handle(ev.WorkerReported(self.now, worker, WorkerLoad(**load)))

    def arrive(
        self, name: str = "r", prompt: int = 32, max_tokens: int = 16, draw: float = 0.0, **fields: Any
    ) -> list[ev.Action]:
        request = Request(name, (7,) * prompt, SamplingParams(max_tokens=max_tokens), self.now, **fields)
        return self.handle(ev.Arrived(self.now, request, draw))

    def says(self, kind: Any, worker: WorkerRef, attempt: Attempt, *rest: Any) -> list[ev.Action]:
        """`worker` reports `kind` (an event class) of `attempt`."""
        return self.handle(kind(self.now, worker, attempt, *rest))

    def fire(self, kind: str, name: str = "", attempt: int = 0, stage: str = "") -> list[ev.Action]:
        return self.handle(ev.TimerFired(self.now, ev.Timer(kind, name, attempt, stage)))

    def lose(self, worker: WorkerRef, reason: str = "no heartbeat") -> list[ev.Action]:
        return self.handle(ev.WorkerLost(self.now, worker, reason))

    def cancel(self, name: str = "r", done: bool = False) -> list[ev.Action]:
        return self.handle(ev.Cancelled(self.now, name, done))

    # ---- shorthands ------------------------------------------------------------------------------

    def decoding(self, name: str = "r", prompt: int = 32, source: WorkerRef = P0, target: WorkerRef = D0) -> Attempt:
        """A request that was handed over and decodes."""
        self.arrive(name, prompt)
        attempt = Attempt(name, 1)
        self.says(ev.Granted, target, attempt, b"t")
        self.says(ev.FirstToken, source, attempt)
        self.says(ev.Adopted, target, attempt)
        self.says(ev.HandedOver, source, attempt)
        return attempt

    def counters(self, worker: WorkerRef) -> tuple[int, int, int]:
        """num_assigned, pending_tokens, context_tokens."""
        view = self.lifecycle.view(self.now)
        (found,) = [w for w in (*view.prefill, *view.decode, *view.mixed) if w.ref == worker]
        return found.num_assigned, found.pending_tokens, found.context_tokens

    def stage(self, name: str = "r") -> str:
        return self.lifecycle.snapshot()[name].stage.value


def without_timers(actions: list[ev.Action]) -> list[ev.Action]:
    return [action for action in actions if not isinstance(action, ev.SetTimer)]


def completes(actions: list[ev.Action]) -> list[ev.Complete]:
    return [action for action in actions if isinstance(action, ev.Complete)]
