"""Whether workers live, judged from their heartbeats alone. Pure: readings of a clock in, verdicts out.

A worker is lost when no heartbeat came for too long, or when its step counter stands still inside a step for
too long. Too long is max(2 s, 3 x the step time that it predicted). The monitor also watches itself: when
nobody called it for a while (the router's own loop stalled), that time is not held against the workers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.request import WorkerRef
from ..core.view import WorkerLoad

MIN_PATIENCE = 2.0  # seconds
PREDICTION_FACTOR = 3.0
STALL = 0.25  # seconds by which a check may be late before the router itself counts as stalled


@dataclass(slots=True)
class _Pulse:
    """`heard` and `moved` are when the last heartbeat came and when the step counter last moved (or was idle)."""

    heard: float
    moved: float
    load: WorkerLoad


class HealthMonitor:
    """Call `check` every `interval` seconds."""

    def __init__(self, interval: float = 0.5) -> None:
        self._interval = interval
        self._pulses: dict[WorkerRef, _Pulse] = {}
        self._checked: float | None = None

    def watch(self, worker: WorkerRef, now: float) -> None:
        """The worker has connected: heartbeats are due from now on."""
        self._pulses[worker] = _Pulse(now, now, WorkerLoad())

    def forget(self, worker: WorkerRef) -> None:
        self._pulses.pop(worker, None)

    def heartbeat(self, worker: WorkerRef, load: WorkerLoad, now: float) -> None:
        """One heartbeat arrived. Ignored for a worker that is not watched."""
        pulse = self._pulses.get(worker)
        if pulse is None:
            return
        pulse.heard = now
        if not load.in_step or not pulse.load.in_step or load.step != pulse.load.step:
            pulse.moved = now
        pulse.load = load

    def age(self, worker: WorkerRef, now: float) -> float | None:
        """Seconds since the last heartbeat."""
        pulse = self._pulses.get(worker)
        return None if pulse is None else now - pulse.heard

    def check(self, now: float) -> list[tuple[WorkerRef, str]]:
        """The workers that are lost, with the reason. They are not watched any more."""
        self._forgive(now)
        lost = []
        for worker, pulse in self._pulses.items():
            reason = _verdict(pulse, now)
            if reason:
                lost.append((worker, reason))
        for worker, _ in lost:
            self.forget(worker)
        return lost

    def _forgive(self, now: float) -> None:
        """Heartbeats that came while this process did not run are still unread: give them time."""
        late = 0.0 if self._checked is None else now - self._checked - self._interval
        self._checked = now
        if late <= STALL:
            return
        for pulse in self._pulses.values():
            pulse.heard = min(now, pulse.heard + late)
            pulse.moved = min(now, pulse.moved + late)


def _verdict(pulse: _Pulse, now: float) -> str:
    patience = max(MIN_PATIENCE, PREDICTION_FACTOR * pulse.load.predicted_step)
    silent = now - pulse.heard
    if silent > patience:
        return f"no heartbeat for {silent:.1f} s (allowed: {patience:.1f} s)"
    stuck = now - pulse.moved
    if pulse.load.in_step and stuck > patience:
        return f"step {pulse.load.step} has been running for {stuck:.1f} s (allowed: {patience:.1f} s)"
    return ""
