"""The health monitor: pure, time in, verdicts out."""

from __future__ import annotations

from dataclasses import replace

from baton.core.request import WorkerRef
from baton.core.view import WorkerLoad
from baton.router.health import HealthMonitor

A, B = WorkerRef("a", 1), WorkerRef("b", 1)


def run(monitor: HealthMonitor, start: float, end: float, **loads: WorkerLoad | None) -> list[tuple[float, str, str]]:
    """Half a second at a time: the heartbeats of `loads` (None: silence), then a check."""
    verdicts = []
    for tick in range(round(start * 2), round(end * 2)):
        now = tick / 2
        for name, load in loads.items():
            if load is not None:
                monitor.heartbeat(WorkerRef(name, 1), load, now)
        verdicts += [(now, ref.worker_id, reason) for ref, reason in monitor.check(now)]
    return verdicts


def watching(*refs: WorkerRef) -> HealthMonitor:
    monitor = HealthMonitor(0.5)
    for ref in refs:
        monitor.watch(ref, 0.0)
    return monitor


def test_silence_is_noticed_after_two_seconds() -> None:
    verdicts = run(watching(A, B), 0, 10, a=None, b=WorkerLoad())
    assert [(now, name) for now, name, _ in verdicts] == [(2.5, "a")]
    assert "no heartbeat for 2.5 s" in verdicts[0][2]


def test_predicted_step_extends_patience() -> None:
    monitor = watching(A)
    monitor.heartbeat(A, WorkerLoad(predicted_step=3.0), 0.0)
    assert [now for now, _, _ in run(monitor, 0, 20)] == [9.5]


def test_stuck_step_is_noticed_although_heartbeats_come() -> None:
    stuck = WorkerLoad(step=7, in_step=True)
    verdicts = run(watching(A), 0, 10, a=stuck)
    assert [now for now, _, _ in verdicts] == [2.5]
    assert "step 7" in verdicts[0][2]


def test_idle_or_moving_steps_are_well() -> None:
    monitor = watching(A, B)
    for second in range(20):
        loads = {"a": WorkerLoad(step=7), "b": WorkerLoad(step=second, in_step=True)}
        assert run(monitor, second, second + 1, **loads) == []


def test_idle_time_does_not_count_for_a_step_that_begins() -> None:
    monitor = watching(A)
    idle = WorkerLoad(step=7)
    assert run(monitor, 0, 10, a=idle) == []
    assert [now for now, _, _ in run(monitor, 10, 20, a=replace(idle, step=8, in_step=True))] == [12.5]


def test_own_stall_is_not_held_against_workers() -> None:
    monitor = watching(A, B)
    assert run(monitor, 0, 3, a=WorkerLoad(), b=WorkerLoad()) == []
    assert monitor.check(60.0) == []  # this process was stopped for a minute
    verdicts = run(monitor, 60.5, 70, a=WorkerLoad(), b=None)
    assert [name for _, name, _ in verdicts] == ["b"]


def test_lost_and_forgotten_workers_are_not_watched() -> None:
    monitor = watching(A, B)
    monitor.forget(B)
    assert [name for _, name, _ in run(monitor, 0, 20)] == ["a"]
    monitor.heartbeat(A, WorkerLoad(), 20.0)
    assert monitor.age(A, 21.0) is None
