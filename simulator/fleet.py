"""The simulated workers of a cluster: their births, deaths and heartbeats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..core.errors import InvalidRequest
from ..core.request import WorkerRef
from ..core.view import Role, WorkerLoad
from .decode import DecodeWorker
from .heap import EventHeap
from .meter import Meter
from .port import RouterPort
from .prefill import PrefillWorker
from .records import WorkerUse
from .setup import ClusterSetup, PoolSetup
from .timeline import Timeline
from .transfers import Transfers
from .worker import Place

Worker = PrefillWorker | DecodeWorker


class Fleet:
    """All workers by name; those that are alive by reference."""

    def __init__(self, setup: ClusterSetup, heap: EventHeap, port: RouterPort, timeline: Timeline | None, fast: bool) -> None:
        self.transfers = Transfers(heap, setup.network, self._find_decode)
        self._setup = setup
        self._heap = heap
        self._port = port
        self._timeline = timeline
        self._fast = fast
        self._slots = {worker_id: (pool, node) for worker_id, pool, node in _slots(setup.pools)}
        self._meters = {worker_id: Meter(worker_id, pool.role, pool.num_blocks) for worker_id, (pool, _) in self._slots.items()}
        self._epochs = dict.fromkeys(self._slots, 0)
        self._alive: dict[WorkerRef, Worker] = {}
        self._reported: dict[WorkerRef, WorkerLoad] = {}
        for failure in setup.failures:
            if failure.worker not in self._slots:
                known = ", ".join(self._slots)
                raise InvalidRequest(f"failures: there is no worker {failure.worker!r}, the workers are {known}", "failures")

    @property
    def alive(self) -> tuple[Worker, ...]:
        return tuple(self._alive.values())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._slots)

    @property
    def num_steps(self) -> int:
        """Steps that ended, of all workers ever."""
        return sum(meter.num_steps for meter in self._meters.values())

    def find(self, ref: WorkerRef) -> Worker | None:
        """The worker if it is alive."""
        return self._alive.get(ref)

    def life_of(self, worker_id: str) -> Worker | None:
        """The worker that goes by this name, if it is alive."""
        return self._alive.get(WorkerRef(worker_id, self._epochs[worker_id]))

    def start(self, worker_id: str) -> Worker:
        """A new life of a worker."""
        pool, node = self._slots[worker_id]
        self._epochs[worker_id] += 1
        place = Place(WorkerRef(worker_id, self._epochs[worker_id]), node, pool, self._setup.lease, self._fast)
        meter = self._meters[worker_id]
        worker: Worker
        if pool.role is Role.PREFILL:
            worker = PrefillWorker(place, self._heap, self._port, meter, self._timeline, self.transfers)
        else:
            worker = DecodeWorker(place, self._heap, self._port, meter, self._timeline)
        self._alive[place.ref] = worker
        return worker

    def kill(self, ref: WorkerRef) -> None:
        """The process ends, and with it everything that it sends and receives."""
        worker = self._alive.pop(ref, None)
        if worker is not None:
            worker.kill()
            self.transfers.worker_died(ref)

    def beat(self) -> Iterator[tuple[WorkerRef, WorkerLoad]]:
        """The reaper's turn at every worker, and the load reports that say something new."""
        for ref, worker in list(self._alive.items()):
            if not (worker.touched or worker.device.in_step or worker.num_tickets or worker.num_waiting):
                continue
            worker.deliver(worker.on_tick)
            worker.touched = False
            load = worker.load()
            if self._reported.get(ref) != load:
                self._reported[ref] = load
                yield ref, load

    def use(self, now: float) -> tuple[WorkerUse, ...]:
        return tuple(meter.use(now) for meter in self._meters.values())

    def _find_decode(self, ref: WorkerRef) -> DecodeWorker | None:
        worker = self._alive.get(ref)
        return worker if isinstance(worker, DecodeWorker) else None


def _slots(pools: Iterable[PoolSetup]) -> Iterator[tuple[str, PoolSetup, int]]:
    """Name, pool and node of every worker. Raises InvalidRequest for pools that cannot be."""
    pools = tuple(pools)
    free_node = max((node for pool in pools for node in pool.nodes), default=-1) + 1
    numbers = dict.fromkeys(Role, 0)
    if sum(pool.replicas for pool in pools) < 1:
        raise InvalidRequest("pools: there is no worker; at least one is needed", "pools")
    for pool in pools:
        if pool.replicas < 0 or (pool.nodes and len(pool.nodes) != pool.replicas):
            raise InvalidRequest(f"nodes: {pool.replicas} {pool.role} workers on {pool.nodes}; every worker needs one", "nodes")
        for index in range(pool.replicas):
            node = pool.nodes[index] if pool.nodes else free_node
            free_node += not pool.nodes
            yield f"{pool.role}-{numbers[pool.role]}", pool, node
            numbers[pool.role] += 1
