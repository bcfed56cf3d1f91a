"""How long a stage of an attempt may take, and which long waits are nobody's fault.

Dead and hanging workers are found by their heartbeats. A stage deadline finds what heartbeats cannot: a cut
link between two workers that both live, a sequence or a notice that got lost. It must not fire merely because
a pool is full, or overload would feed itself with repeated work.
"""

from __future__ import annotations

from .flight import Flight, Stage
from .lifecycle_config import LifecycleConfig

MAX_PATIENCE = 3  # late handovers that are excused because the link works for others


def stage_limit(flight: Flight, config: LifecycleConfig) -> float | None:
    """Seconds that the stage may take, by the latest load reports. None: no deadline but the request's own."""
    predicted = _predicted(flight)
    return None if predicted is None else max(config.stage_floor, config.stage_factor * predicted)


def is_explained(flight: Flight) -> bool:
    """Whether a stage that takes longer than its limit may nevertheless be in order."""
    target = flight.target
    if target is None:
        return True
    match flight.stage:
        case Stage.PREFILL:
            worker = (flight.source or target).worker
            load = worker.load
            no_room = load.free_blocks * worker.block_size < flight.known_tokens
            return load.prefill_rate <= 0.0 or load.num_waiting > 0 or no_room
        case Stage.HANDOVER:
            if flight.source is None or flight.patience >= MAX_PATIENCE:
                return False
            return target.worker.landed_at.get(flight.source.worker.ref, flight.since) > flight.since
        case Stage.DECODE:
            # Beside many others a sequence may wait for a row, or be computed again: only an idle worker has lost it.
            load = target.worker.load
            busy = load.num_running + load.num_waiting > 0
            return flight.num_output > flight.mark or load.decode_step <= 0.0 or busy
        case _:
            return True


def _predicted(flight: Flight) -> float | None:
    """Seconds the stage should take; 0 when unknown; None for stages without a deadline."""
    target = flight.target
    if target is None:
        return None
    match flight.stage:
        case Stage.PREFILL:
            worker = (flight.source or target).worker
            load = worker.load
            queue = worker.queued_tokens / load.prefill_rate if load.prefill_rate > 0.0 else 0.0
            return queue + load.predicted_step
        case Stage.HANDOVER:
            steps = target.worker.load.predicted_step
            return steps + (flight.source.worker.load.predicted_step if flight.source else 0.0)
        case Stage.DECODE:
            remaining = flight.request.sampling.max_tokens - flight.num_output
            return target.worker.load.decode_step * max(1, remaining)
        case _:
            return None
