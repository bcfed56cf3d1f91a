"""What every simulated worker does, whatever its pool: the service's `WorkerCore` in virtual time.

The engine's scheduler and block pool are the real ones. A prefill worker adds the sending end of a handoff to
this, a decode worker the receiving end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.errors import BatonError, InvalidRequest
from ..core.request import Attempt, SequenceSpec, WorkerRef
from ..core.step import ComputedEvent, FailedEvent, PreemptedEvent, SequenceEvent, TokenEvent
from ..core.view import Role, WorkerLoad
from ..engine.blocks import BlockPool
from ..engine.counting import REPORT_EVERY, CountingScheduler
from ..engine.scheduler import Scheduler, SchedulerConfig
from ..policy.ordering import ORDERING
from .device import Device
from .heap import EventHeap
from .meter import Meter
from .port import RouterPort, TokenNews
from .setup import PoolSetup
from .timeline import Timeline
from .tokens import SAMPLED


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker stands: what it is told of the world when it starts."""

    ref: WorkerRef
    node: int
    setup: PoolSetup
    lease: float
    fast: bool


class SimulatedWorker(ABC):
    """One life of a worker. Everything that happens to it goes through `deliver`, or comes from its device."""

    def __init__(self, place: Place, heap: EventHeap, port: RouterPort, meter: Meter, timeline: Timeline | None) -> None:
        setup = place.setup
        self.ref = place.ref
        self.node = place.node
        self.setup = setup
        self.alive = True
        self.touched = True  # something has happened since the last heartbeat
        self.blocks = BlockPool(setup.num_blocks, setup.block_size, setup.prefix_cache)
        config, order = _scheduler_config(setup), ORDERING[setup.ordering]
        self.scheduler = (
            CountingScheduler(self.blocks, config, order, SAMPLED) if place.fast else Scheduler(self.blocks, config, order)
        )
        self.heap = heap
        self.port = port
        self.meter = meter
        track = None if timeline is None else (timeline, f"workers/{place.ref.worker_id}")
        self.device = Device(heap, self.scheduler, setup, self, meter, track)
        self._without_token: set[Attempt] = set()

    # ---- from outside --------------------------------------------------------------------------

    def deliver(self, handler: Callable[..., None], *arguments: object) -> None:
        """Let something happen to the worker now, unless it is dead."""
        if self.alive:
            self.device.sync()
            self.meter.reached(self.heap.now, self.num_used)
            self.touched = True
            handler(*arguments)
            self.device.settle()
            self.meter.goes_on(self.num_used, self.num_waiting)

    def kill(self) -> None:
        """The process ends. What it has sent is on its way still."""
        self.device.sync()
        self.meter.reached(self.heap.now, self.num_used)
        self.meter.goes_on(0, 0)
        self.alive = False
        self.device.stop()

    def load(self) -> WorkerLoad:
        """What a heartbeat says. Called through `deliver`."""
        return WorkerLoad(
            step=self.device.step,
            in_step=self.device.in_step,
            predicted_step=self.device.predicted_step,
            prefill_rate=self.device.prefill_rate,
            decode_step=self.device.decode_step,
            num_waiting=self.num_waiting,
            num_running=self.scheduler.num_running,
            free_blocks=self.blocks.num_free,
            total_blocks=self.blocks.num_blocks,
            quarantined_blocks=self.blocks.num_quarantined,
            tickets=self.num_tickets,
        )

    @property
    def num_used(self) -> int:
        """Blocks that hold something that cannot be evicted."""
        return self.blocks.num_blocks - self.blocks.num_free

    @property
    def num_waiting(self) -> int:
        """Sequences and reservations that hold no blocks."""
        return self.scheduler.num_waiting

    @property
    @abstractmethod
    def num_tickets(self) -> int: ...

    @abstractmethod
    def on_submit(self, spec: SequenceSpec, target: WorkerRef | None) -> None:
        """Prefill a sequence, and hand it over to `target` or serve it to its end."""
        ...

    @abstractmethod
    def on_abort(self, attempt: Attempt) -> None: ...

    @abstractmethod
    def on_renew(self, attempts: tuple[Attempt, ...]) -> None: ...

    @abstractmethod
    def on_gone(self, gone: WorkerRef) -> None: ...

    @abstractmethod
    def on_tick(self) -> None:
        """The reaper's turn."""
        ...

    # ---- commands ------------------------------------------------------------------------------

    def add(self, spec: SequenceSpec) -> bool:
        """Queue a sequence to be prefilled here. Returns False (and reports the failure) when it can never run."""
        try:
            self.scheduler.add(spec, self.heap.now)
        except BatonError as error:
            self.fail(spec.attempt, str(error), retriable=not isinstance(error, InvalidRequest))
            return False
        self._without_token.add(spec.attempt)
        self.device.wake()
        return True

    def abort(self, attempt: Attempt) -> None:
        """Drop the attempt wherever it is; harmless when it is not here."""
        self.scheduler.abort(attempt)
        self.forget(attempt)
        self.device.wake()

    def fail(self, attempt: Attempt, reason: str, retriable: bool) -> None:
        """Report to the router that the attempt is given up."""
        self.port.failed(self.ref, attempt, reason, retriable)
        self.forget(attempt)

    def forget(self, attempt: Attempt) -> None:
        """The attempt has left this worker."""
        self._without_token.discard(attempt)

    # ---- what the device reports ---------------------------------------------------------------

    def may_repeat(self) -> bool:
        return True

    def on_progress(self, reached: Sequence[tuple[Attempt, int]]) -> None:
        self.port.tokens(self.ref, [TokenNews(attempt, num_output) for attempt, num_output in reached])

    def on_events(self, events: Sequence[SequenceEvent]) -> None:
        """As `worker.core.WorkerCore.on_events`; the router is spared tokens that decide nothing."""
        self.touched = True
        news: list[TokenNews] = []
        ended: list[Attempt] = []
        preempted: list[PreemptedEvent] = []
        failed: list[FailedEvent] = []
        for event in events:
            if isinstance(event, TokenEvent):
                self._note(event, news)
                if event.finish is not None:
                    ended.append(event.attempt)
                self.on_tokens(event)
            elif isinstance(event, ComputedEvent):
                self.on_computed(event)
            elif isinstance(event, PreemptedEvent):
                preempted.append(event)
            else:
                failed.append(event)
        if news:
            self.port.tokens(self.ref, news)
        for left in preempted:
            self.port.preempted(self.ref, left.attempt, left.num_output)
        for failure in failed:
            self.fail(failure.attempt, failure.reason, retriable=False)
        self.meter.preemptions += len(preempted)
        for attempt in [*ended, *[left.attempt for left in preempted]]:
            self.forget(attempt)
        self.after_step()

    def on_tokens(self, event: TokenEvent) -> None:  # noqa: B027 (not every role cares)
        """For the roles: a sequence gained tokens."""

    def on_computed(self, event: ComputedEvent) -> None:  # noqa: B027
        """For the roles: a sequence to be handed over has more KV."""

    def after_step(self) -> None:  # noqa: B027
        """For the roles: blocks may have become free."""

    def _note(self, event: TokenEvent, news: list[TokenNews]) -> None:
        num_output = event.position + len(event.tokens)
        if event.attempt in self._without_token:
            self._without_token.discard(event.attempt)
            info = self.scheduler.info(event.attempt)
            started, cached = (None, 0) if info is None else (info.first_scheduled, info.cached_tokens)
            news.append(TokenNews(event.attempt, num_output, event.finish is not None, started, cached))
        elif event.finish is not None or num_output % REPORT_EVERY == 0:
            news.append(TokenNews(event.attempt, num_output, event.finish is not None))


def _scheduler_config(setup: PoolSetup) -> SchedulerConfig:
    """As `worker.build` configures the scheduler of a pool."""
    return SchedulerConfig(
        max_step_tokens=setup.max_step_tokens,
        max_num_seqs=setup.max_num_seqs,
        max_model_len=setup.max_model_len,
        return_preempted=setup.role is Role.DECODE,
        prefix_cache=setup.prefix_cache,
        pipeline_stages=setup.cost.stages,
        max_context=setup.max_context,
        phases_apart=setup.phases_apart,
        eager_pipeline=setup.eager_pipeline,
    )
