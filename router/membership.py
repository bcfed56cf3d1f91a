"""The workers as this router reaches them: who is on the roster, connected, healthy, draining or gone.

It turns rosters, broken streams and missing heartbeats into worker events for the lifecycle. It decides nothing
about requests; it only remembers which attempts were placed where, so that a broken stream can name its victims.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from ..core.clock import Clock
from ..core.request import Attempt, WorkerRef
from ..core.view import Role, WorkerLoad
from ..observability.records import Place, WorkerSample
from ..proto import worker_pb2 as pb
from .events import Event, WorkerConfirmedDead, WorkerDraining, WorkerJoined, WorkerLost, WorkerReported
from .health import HealthMonitor
from .roster import ControllerLink
from .wire import load_from, worker_from, worker_to
from .worker_client import WorkerClient

HEALTH_INTERVAL = 0.5  # seconds

logger = logging.getLogger("baton.router.membership")


@dataclass(slots=True)
class Member:
    """One worker life on the roster. It has joined once the lifecycle knows of it."""

    ref: WorkerRef
    role: Role
    pid: int
    client: WorkerClient
    block_size: int = 0
    total_blocks: int = 0
    joined: bool = False
    draining: bool = False
    load: WorkerLoad = WorkerLoad()
    attempts: set[Attempt] = field(default_factory=set)

    @property
    def place(self) -> Place:
        return Place(self.role.value, self.ref.worker_id)

    @property
    def live(self) -> bool:
        """Takes new work."""
        return self.joined and self.client.up and not self.draining

    @property
    def state(self) -> str:
        if not self.joined or not self.client.up:
            return "connecting"
        return "draining" if self.draining else "ready"


class MembershipOwner(Protocol):
    """The router service."""

    def post(self, event: Event) -> None: ...

    def worker_message(self, worker: WorkerRef, message: pb.WorkerMessage) -> None: ...

    def stream_reset(self, worker: WorkerRef, attempts: tuple[Attempt, ...]) -> None:
        """The control stream broke and is back; the worker has dropped these attempts."""
        ...

    def worker_lost(self, worker: WorkerRef, place: Place) -> None:
        """Nothing will come from this worker any more. Follows the WorkerLost event."""
        ...

    def membership_changed(self) -> None: ...

    def routers_changed(self, routers: Iterable[pb.Registration]) -> None:
        """The routers on the latest roster."""
        ...


class Membership:
    """Implements `worker_client.WorkerListener` for every member."""

    def __init__(self, router_id: str, router_epoch: int, clock: Clock, owner: MembershipOwner, link: ControllerLink) -> None:
        self._router_id = router_id
        self._router_epoch = router_epoch
        self._clock = clock
        self._owner = owner
        self._link = link
        self._health = HealthMonitor(HEALTH_INTERVAL)
        self._members: dict[WorkerRef, Member] = {}
        self._gone: set[WorkerRef] = set()  # lost or dead lives that the roster may still name
        self._dead: set[WorkerRef] = set()  # reported as confirmed dead
        self._places: dict[str, Place] = {}  # by worker id, of everyone ever seen
        self._kills: dict[WorkerRef, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def members(self) -> list[Member]:
        """By worker id."""
        return sorted(self._members.values(), key=lambda member: member.ref)

    def start(self) -> None:
        """Watch the roster and the heartbeats."""
        self._spawn(self._link.watch(self.update_roster))
        self._spawn(self._check_health())

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        members = list(self._members.values())
        self._members.clear()
        await asyncio.gather(*(member.client.close() for member in members))

    async def flush(self, timeout: float) -> None:
        """Give queued commands up to `timeout` seconds to leave."""
        writers = [member.client.flush() for member in self._members.values() if member.client.up]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await asyncio.gather(*writers)

    # ---- for the service -------------------------------------------------------------------------

    def send(self, worker: WorkerRef, message: pb.RouterMessage) -> None:
        """Dropped when the worker is gone: the lifecycle is about to learn of that."""
        member = self._members.get(worker)
        if member is not None:
            member.client.send(message)

    def assign(self, worker: WorkerRef, attempt: Attempt) -> None:
        member = self._members.get(worker)
        if member is not None:
            member.attempts.add(attempt)

    def unassign(self, worker: WorkerRef, attempt: Attempt) -> None:
        member = self._members.get(worker)
        if member is not None:
            member.attempts.discard(attempt)

    def place(self, worker: WorkerRef) -> Place:
        """Labels of a worker, also of one that is gone."""
        return self._places.get(worker.worker_id) or Place("", worker.worker_id)

    def kill(self, worker: WorkerRef, reason: str) -> None:
        """Have the worker ended; WorkerConfirmedDead follows when it certainly is."""
        if worker not in self._kills and worker not in self._dead:
            logger.warning("ending %s: %s", worker, reason)
            self._kills[worker] = self._spawn(self._kill(worker, reason))

    def token_capacity(self) -> int | None:
        """Tokens of the longest sequence that some live worker can hold from start to end; None when nobody is live."""
        pools = [m.total_blocks * m.block_size for m in self._members.values() if m.live and m.role is not Role.PREFILL]
        return max(pools, default=None)

    def unready_reason(self) -> str:
        """Why no request can be served; empty when one could."""
        live = {member.role for member in self._members.values() if member.live}
        if Role.MIXED in live or {Role.PREFILL, Role.DECODE} <= live:
            return ""
        if not live:
            return "no live worker"
        missing = Role.DECODE if Role.PREFILL in live else Role.PREFILL
        return f"no live {missing} worker"

    def samples(self) -> list[WorkerSample]:
        """All members, for metrics."""
        now = self._clock.now()
        return [
            WorkerSample(
                place=member.place,
                up=member.client.up,
                assigned=len(member.attempts),
                waiting=member.load.num_waiting,
                running=member.load.num_running,
                free_blocks=member.load.free_blocks,
                total_blocks=member.total_blocks,
                quarantined_blocks=member.load.quarantined_blocks,
                tickets=member.load.tickets,
                step=member.load.step,
                heartbeat_age=self._health.age(member.ref, now),
            )
            for member in self.members
        ]

    # ---- the roster ------------------------------------------------------------------------------

    def update_roster(self, roster: pb.Roster) -> None:
        """Dial who is new, give up who is dead."""
        self._owner.routers_changed(roster.routers)
        roles = {role.value: role for role in Role}
        alive = set()
        for registration in roster.workers:
            role = roles.get(registration.role)
            if role is None:  # of a newer release
                continue
            ref = worker_from(registration.worker)
            alive.add(ref)
            if ref not in self._members and ref not in self._gone:
                self._add(ref, role, registration)
        dead = {worker_from(worker) for worker in roster.dead}
        for ref in sorted(dead):
            self._confirm_dead(ref)
        for ref, member in list(self._members.items()):
            if ref not in alive and not member.client.up:
                self._lose(ref, "it left the roster")
        keep = alive | dead | set(self._kills)
        self._gone &= keep
        self._dead &= keep

    def _add(self, ref: WorkerRef, role: Role, registration: pb.Registration) -> None:
        self._places[ref.worker_id] = Place(role.value, ref.worker_id)
        client = WorkerClient(ref, registration.address, self._router_id, self._router_epoch, self)
        self._members[ref] = Member(ref, role, registration.pid, client)
        client.start()

    def _confirm_dead(self, ref: WorkerRef) -> None:
        if ref in self._dead:
            return
        self._dead.add(ref)
        self._lose(ref, "the controller says that it is dead")
        self._owner.post(WorkerConfirmedDead(self._clock.now(), ref))

    def _lose(self, ref: WorkerRef, reason: str) -> None:
        self._gone.add(ref)
        self._health.forget(ref)
        member = self._members.pop(ref, None)
        if member is None:
            return
        self._spawn(member.client.close())
        if not member.joined:
            self.kill(ref, reason)  # the lifecycle does not know it; ended, it comes back as a new life
        else:
            logger.warning("worker %s is lost: %s", ref, reason)
            self._owner.post(WorkerLost(self._clock.now(), ref, reason))
            self._owner.worker_lost(ref, member.place)
            self._owner.membership_changed()

    # ---- what the streams say --------------------------------------------------------------------

    def connected(self, client: WorkerClient, hello: pb.WorkerHello, again: bool) -> None:
        member = self._members.get(client.ref)
        if member is None:
            return
        member.block_size, member.total_blocks = hello.block_size, hello.total_blocks
        self._health.watch(client.ref, self._clock.now())
        if again:
            for dead in self._dead:  # said while the stream was down, it was never heard
                client.send(pb.RouterMessage(gone=pb.WorkerGone(worker=worker_to(dead))))
        if again and member.joined:
            logger.warning("control stream of %s is back: %d attempts were lost", client.ref, len(member.attempts))
            attempts = tuple(sorted(member.attempts))
            member.attempts.clear()
            self._owner.stream_reset(client.ref, attempts)
            self._owner.membership_changed()

    def received(self, client: WorkerClient, message: pb.WorkerMessage) -> None:
        if client.ref in self._members:
            self._owner.worker_message(client.ref, message)

    def heartbeat(self, client: WorkerClient, message: pb.Heartbeat) -> None:
        member = self._members.get(client.ref)
        if member is None:
            return
        now, load = self._clock.now(), load_from(message)
        self._health.heartbeat(client.ref, load, now)
        member.load = load
        changed = not member.joined
        if not member.joined:
            member.joined = True
            logger.info("worker %s (%s) joined", member.ref, member.role)
            self._owner.post(WorkerJoined(now, member.ref, member.role, member.block_size, member.total_blocks))
        self._owner.post(WorkerReported(now, member.ref, load))
        if message.draining and not member.draining:
            member.draining = changed = True
            self._owner.post(WorkerDraining(now, member.ref))
        if changed:
            self._owner.membership_changed()

    def disconnected(self, client: WorkerClient, reason: str) -> None:
        logger.info("control stream of %s broke: %s", client.ref, reason)
        if client.ref in self._members:
            self._owner.membership_changed()

    def lost(self, client: WorkerClient, reason: str) -> None:
        self._lose(client.ref, f"its control stream broke: {reason}")

    async def _check_health(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_INTERVAL)
            for ref, reason in self._health.check(self._clock.now()):
                self._lose(ref, reason)

    async def _kill(self, worker: WorkerRef, reason: str) -> None:
        await self._link.kill(worker, reason)
        self._kills.pop(worker, None)
        self._confirm_dead(worker)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a task of the membership failed", exc_info=task.exception())
