"""Long seeded runs through the model cluster: deeper into handoffs than generated programs get.

Trouble is rarer than work here, so that requests reach every stage before it strikes; the test asserts that they did.
"""

from __future__ import annotations

import random

from baton.core.view import Role
from baton.policy.routing import ROUTING
from baton.router import events as ev
from baton.tests.router.lifecycle_cluster import ModelCluster, ModelWorker

POOLS = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
WORKER_IDS = ("p0", "p1", "d0", "d1", "m0")
# What happens next, and how often. The sum of the troubles is about one in twenty.
WEIGHTS = {
    "command": 30,
    "work": 30,
    "read": 30,
    "arrive": 5,
    "fire": 1.0,
    "report": 1.0,
    "cancel": 0.3,
    "fail": 0.7,
    "freeze": 0.3,
    "lose": 0.3,
    "confirm": 0.5,
    "join": 0.5,
    "drain": 0.1,
}


class Soak:
    """One run. `reached` holds (what happened, stage of the request it happened to)."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.reached: set[tuple[str, str]] = set()
        self.cancelled: set[str] = set()
        self.count = 0
        self.slow = self.random.choice(WORKER_IDS)  # its stream lags behind, so that others' messages overtake its own
        routing = ROUTING[self.random.choice(sorted(ROUTING))]
        self.cluster = ModelCluster(routing, local_prefill_tokens=self.random.choice([0, 0, 8]), request_timeout=1e6, head_room=2)
        for name in WORKER_IDS:
            self.cluster.join(name, POOLS[name[0]])

    def run(self, steps: int) -> None:
        kinds = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()), k=steps)
        for kind in kinds:
            self.step(kind)
            self.cluster.check_nothing_is_forgotten()

    def step(self, kind: str) -> None:
        cluster, draw = self.cluster, self.random
        if kind == "arrive":
            self.count += 1
            cluster.arrive(f"r{self.count}", draw.choice([1, 8, 40]), max_tokens=4, draw=draw.random())
        elif kind == "join":
            name = draw.choice(WORKER_IDS)
            cluster.join(name, POOLS[name[0]])
        elif kind == "cancel":
            name = f"r{max(1, self.count - draw.randrange(8))}"
            self.note("cancelled", name)
            self.cancelled.add(name)
            cluster.handle(ev.Cancelled(cluster.now, name, draw.random() < 0.5))
        elif kind == "confirm" and cluster.to_confirm:
            cluster.confirm(draw.choice(cluster.to_confirm))
        elif kind == "fire":
            timers = [timer for timer in cluster.timers if timer.kind != "deadline"]
            if timers:
                cluster.fire(draw.choice(timers))
        elif cluster.workers:
            self.step_of(kind, draw.choice(list(cluster.workers.values())))

    def step_of(self, kind: str, worker: ModelWorker) -> None:
        cluster, draw = self.cluster, self.random
        match kind:
            case "command":
                cluster.deliver_command(worker)
            case "work":
                cluster.work(worker, draw.randrange(100), ends_early=draw.random() < 0.05)
            case "read":
                if worker.ref.worker_id != self.slow or draw.random() < 0.15:
                    cluster.deliver_message(worker)
            case "report":
                cluster.report(worker, draw.choice([0.0, 1e3]), draw.randrange(2))
            case "fail":
                cluster.fail(worker, draw.randrange(100), preempted=draw.random() < 0.5)
            case "freeze":
                worker.frozen = True
            case "drain":
                cluster.handle(ev.WorkerDraining(cluster.now, worker.ref))
            case "lose":
                for name, flight in cluster.lifecycle.snapshot().items():
                    if worker.ref in (flight.source, flight.target):
                        self.note("source lost" if worker.ref == flight.source else "target lost", name)
                cluster.lose(worker)

    def note(self, what: str, name: str) -> None:
        flight = self.cluster.lifecycle.snapshot().get(name)
        if flight is not None:
            self.reached.add((what, flight.stage.value))

    def finish(self) -> None:
        cluster = self.cluster
        cluster.settle()
        assert cluster.completed == cluster.arrived
        failed = {name: error for name, error in cluster.errors.items() if error is not None and name not in self.cancelled}
        assert set(failed.values()) <= {"unavailable"}
        assert all(worker.holds == {} for worker in cluster.workers.values())
        view = cluster.lifecycle.view(cluster.now)
        for worker in (*view.prefill, *view.decode, *view.mixed):
            assert (worker.num_assigned, worker.pending_tokens, worker.context_tokens) == (0, 0, 0)


def test_every_request_ends_once_and_nothing_strands() -> None:
    reached: set[tuple[str, str]] = set()
    for seed in range(30):
        soak = Soak(seed)
        soak.run(1500)
        soak.finish()
        reached |= soak.reached
    troubles = ("source lost", "target lost", "cancelled")
    stages = ("prefill", "grant", "handover", "decode")
    assert reached >= {(trouble, stage) for trouble in troubles for stage in stages}
