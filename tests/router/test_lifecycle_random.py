"""The lifecycle among workers that do and suffer anything: every request ends once, nothing strands, nothing leaks."""

from __future__ import annotations

from baton.core.view import Role
from baton.policy.routing import ROUTING
from baton.router.events import Cancelled, WorkerDraining
from baton.tests.router.lifecycle_cluster import ModelCluster, ModelWorker
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

POOLS = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
WORKER_IDS = ("p0", "p1", "d0", "d1", "m0")
NAMES = st.sampled_from(WORKER_IDS)
NUMBERS = st.integers(0, 11)
KINDS = st.sampled_from(["command", "command", "work", "work", "read", "read", "end"])
STEPS = st.lists(st.tuples(KINDS, NUMBERS, NUMBERS), min_size=10, max_size=60)


class ClusterInTrouble(RuleBasedStateMachine):
    """Rules are what may happen next; `teardown` lets the system settle and looks for what was left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.cancelled: set[str] = set()

    @initialize(
        routing=st.sampled_from(sorted(ROUTING)),
        names=st.sets(NAMES),
        max_attempts=st.sampled_from([1, 3, 8]),
        local=st.sampled_from([0, 8]),
    )
    def start(self, routing: str, names: set[str], max_attempts: int, local: int) -> None:
        self.cluster = ModelCluster(
            ROUTING[routing], max_attempts=max_attempts, local_prefill_tokens=local, head_room=4, request_timeout=1000.0
        )
        self.max_attempts = max_attempts
        for name in sorted(names):
            self.cluster.join(name, POOLS[name[0]])

    def pick(self, number: int) -> ModelWorker | None:
        workers = list(self.cluster.workers.values())
        return workers[number % len(workers)] if workers else None

    # ---- the ordinary ------------------------------------------------------------------------------

    @rule(prompt=st.sampled_from([1, 8, 40]), draw=st.floats(0.0, 0.999))
    def arrive(self, prompt: int, draw: float) -> None:
        self.count += 1
        self.cluster.arrive(f"r{self.count}", prompt, max_tokens=4, draw=draw)

    @rule(steps=STEPS)
    def go_on(self, steps: list[tuple[str, int, int]]) -> None:
        """Workers and streams make progress, in any order."""
        for kind, number, choice in steps:
            worker = self.pick(number)
            if worker is None:
                return
            if kind == "read":
                self.cluster.deliver_message(worker)
            elif kind == "command":
                self.cluster.deliver_command(worker)
            else:
                self.cluster.work(worker, choice, ends_early=kind == "end")
            self.cluster.check_nothing_is_forgotten()

    @rule(number=NUMBERS, rate=st.sampled_from([0.0, 1e3]), waiting=st.integers(0, 1))
    def report(self, number: int, rate: float, waiting: int) -> None:
        worker = self.pick(number)
        if worker is not None:
            self.cluster.report(worker, rate, waiting)

    # ---- the extraordinary -------------------------------------------------------------------------

    @rule(number=NUMBERS)
    def fire(self, number: int) -> None:
        timers = sorted(self.cluster.timers, key=lambda timer: (timer.kind == "deadline", self.cluster.timers[timer]))
        if timers:
            self.cluster.fire(timers[number % len(timers)])

    @rule(number=NUMBERS, done=st.booleans())
    def cancel(self, number: int, done: bool) -> None:
        name = f"r{max(1, self.count - number)}"
        self.cancelled.add(name)
        self.cluster.handle(Cancelled(self.cluster.now, name, done))

    @rule(number=NUMBERS, choice=NUMBERS, preempted=st.booleans())
    def fail(self, number: int, choice: int, preempted: bool) -> None:
        worker = self.pick(number)
        if worker is not None:
            self.cluster.fail(worker, choice, preempted)

    @rule(number=NUMBERS)
    def freeze(self, number: int) -> None:
        """Killed or stopped; the router has not noticed yet."""
        worker = self.pick(number)
        if worker is not None:
            worker.frozen = True

    @rule(number=NUMBERS)
    def lose(self, number: int) -> None:
        worker = self.pick(number)
        if worker is not None:
            self.cluster.lose(worker)

    @rule(number=NUMBERS)
    def confirm(self, number: int) -> None:
        if self.cluster.to_confirm:
            self.cluster.confirm(self.cluster.to_confirm[number % len(self.cluster.to_confirm)])

    @rule(name=NAMES)
    def join(self, name: str) -> None:
        self.cluster.join(name, POOLS[name[0]])

    @rule(number=NUMBERS)
    def drain(self, number: int) -> None:
        worker = self.pick(number)
        if worker is not None:
            self.cluster.handle(WorkerDraining(self.cluster.now, worker.ref))

    # ---- what must hold ----------------------------------------------------------------------------

    @invariant()
    def nothing_strands(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.check_nothing_is_forgotten()

    def teardown(self) -> None:
        if not hasattr(self, "cluster"):
            return
        cluster = self.cluster
        cluster.settle()
        assert cluster.completed == cluster.arrived
        for name, error in cluster.errors.items():
            assert error in (None, "unavailable", "deadline_exceeded", "cancelled"), (name, error)
            assert error != "cancelled" or name in self.cancelled
        assert (cluster.lifecycle.num_active, cluster.lifecycle.num_pending) == (0, 0)
        for worker in cluster.workers.values():
            assert worker.holds == {}
        view = cluster.lifecycle.view(cluster.now)
        for its in (*view.prefill, *view.decode, *view.mixed):
            assert (its.num_assigned, its.pending_tokens, its.context_tokens) == (0, 0, 0)


ClusterInTrouble.TestCase.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestClusterInTrouble = ClusterInTrouble.TestCase
