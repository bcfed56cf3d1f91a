"""The controller: who the members are, which of their lives is the present one, and who is certainly dead.

It is on no data path: while it is away, running streams go on, and only restarts wait. It polls nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from ..core.clock import Clock, MonotonicClock
from ..core.request import WorkerRef
from ..proto import worker_pb2 as pb
from .launcher import Launcher, MemberSpec
from .members import pin_router_ports
from .supervisor import Backoff, Member, MemberState, Supervisor

MAX_DEAD = 256  # confirmed dead lives that a roster names; a router that was away longer asks for each with Kill
STOP_PATIENCE = 5.0  # seconds between SIGTERM and SIGKILL

logger = logging.getLogger("baton.controller")


class Controller:
    """Supervises the members of one cluster. Every method runs on one event loop."""

    def __init__(
        self,
        cluster: str,
        specs: Sequence[MemberSpec],
        launcher: Launcher,
        backoff: Backoff = Backoff(),
        clock: Clock = MonotonicClock(),
    ) -> None:
        self._cluster = cluster
        self._launcher = launcher
        self._members = {spec.member_id: Member(spec) for spec in specs}
        self._supervisors = {
            name: Supervisor(member, launcher, backoff, self._changed, self._died, clock)
            for name, member in self._members.items()
        }
        self._dead: deque[WorkerRef] = deque(maxlen=MAX_DEAD)
        self._change = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._clock = clock
        self._began = clock.now()
        self._stopped = asyncio.Event()
        self._stopping = False

    async def attach(self) -> None:
        """Find the members that an earlier controller left running."""
        await asyncio.gather(*(supervisor.attach() for supervisor in self._supervisors.values()))

    def start(self) -> None:
        """Start what does not run and keep everything running."""
        self._tasks = [
            asyncio.create_task(self._supervise(supervisor), name=name) for name, supervisor in self._supervisors.items()
        ]

    async def stopped(self) -> None:
        """Wait until `shutdown` has ended every member."""
        await self._stopped.wait()

    async def shutdown(self) -> None:
        """End every member: SIGTERM, and SIGKILL for those that do not listen. Safe to call twice."""
        if self._stopping:
            await self._stopped.wait()
            return
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(supervisor.stop(STOP_PATIENCE) for supervisor in self._supervisors.values()))
        self._changed()
        self._stopped.set()

    # ---- what members and routers ask ------------------------------------------------------------

    def register(self, registration: pb.Registration) -> str:
        """Take a member's registration as that of its present life. Returns "" or why it is refused."""
        member = self._members.get(registration.worker.worker_id)
        if member is None:
            return f"cluster {self._cluster} has no member {registration.worker.worker_id!r}"
        if self._stopping:
            return "the cluster is shutting down"
        epoch = registration.worker.epoch
        if epoch in member.over:
            return f"epoch {epoch:x} of {member.spec.member_id} is over; a process must register under a new one"
        if registration.role != member.spec.role:
            return f"{member.spec.member_id} is a {member.spec.role}, not a {registration.role}"
        if member.handle is None:
            return f"{member.spec.member_id} is being restarted; this process is not its present one"
        if registration.pid != member.handle.pid:
            return f"{member.spec.member_id} is process {member.handle.pid} now, not {registration.pid}"
        if member.registration is not None and member.registration.worker.epoch != epoch:
            present = member.registration.worker.epoch
            return f"process {registration.pid} has registered as epoch {present:x}; a process has one epoch"
        member.registration = registration
        member.state = MemberState.READY
        member.last_error = ""
        if member.spec.role == "router":  # one that restarts must come back where its clients look for it
            grpc, http = registration.shared_address, registration.shared_http_address
            pinned = pin_router_ports(member.spec.config_json, grpc or registration.address, http or registration.http_address)
            member.spec = replace(member.spec, config_json=pinned)
        logger.info("%s is ready at %s (pid %d)", member.spec.member_id, registration.address, registration.pid)
        self._changed()
        return ""

    def roster(self) -> pb.Roster:
        """The workers and routers that are alive, and those recently confirmed dead."""
        alive = [member.registration for member in self._members.values() if member.registration is not None]
        return pb.Roster(
            workers=[registration for registration in alive if registration.role != "router"],
            dead=[pb.WorkerId(worker_id=ref.worker_id, epoch=ref.epoch) for ref in self._dead],
            routers=[registration for registration in alive if registration.role == "router"],
        )

    async def rosters(self) -> AsyncIterator[pb.Roster]:
        """The roster, and again after every change. Changes that come faster than they are read are merged."""
        last: pb.Roster | None = None
        while not self._stopping:
            change = self._change  # taken before the roster is read, so that no change is missed
            roster = self.roster()
            if roster != last:
                yield roster
                last = roster
            await change.wait()

    async def kill(self, ref: WorkerRef, reason: str) -> bool:
        """End this life of a member. True when it is certainly dead, now or long since; it is then restarted."""
        member = self._members.get(ref.worker_id)
        if member is None:
            return False
        if ref.epoch in member.over or member.handle is None:
            return ref.epoch not in member.unconfirmed
        if member.registration is not None and member.registration.worker.epoch != ref.epoch:
            return True  # one process at a time: the present one was started after the end of every other
        if member.registration is None and not member.attached:
            return True  # nobody can know the epoch of a process that has not registered yet
        logger.warning("killing %s: %s", ref, reason)
        member.kill_reason = f"killed: {reason}"
        return await self._launcher.kill(member.handle)

    def state(self) -> pb.ClusterState:
        """Every member with its state, for people."""
        return pb.ClusterState(
            cluster=self._cluster,
            uptime=self._clock.now() - self._began,
            members=[self._describe(member) for member in self._members.values()],
        )

    # ---- what supervisors report -----------------------------------------------------------------

    async def _supervise(self, supervisor: Supervisor) -> None:
        try:
            await supervisor.run()
        except Exception as error:  # a bug must be seen, and must not leave the others unwatched
            logger.exception("the supervisor of %s failed", supervisor.member.spec.member_id)
            supervisor.member.state = MemberState.FAILED
            supervisor.member.last_error = f"its supervisor failed: {error!r}"
            self._changed()

    def _died(self, ref: WorkerRef) -> None:
        self._dead.append(ref)

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def _describe(self, member: Member) -> pb.Member:
        registration = member.registration or pb.Registration(
            worker=pb.WorkerId(worker_id=member.spec.member_id),
            role=member.spec.role,
            pid=member.handle.pid if member.handle is not None else 0,
        )
        return pb.Member(
            registration=registration, state=member.state.value, restarts=member.restarts, last_error=member.last_error
        )
