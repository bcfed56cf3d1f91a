"""Keeps one member alive: start, watch, restart with a growing pause, give up when it cannot even start.

It decides nothing about the cluster; the controller hears of every change through `on_change`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from ..core.clock import Clock
from ..core.errors import BatonError
from ..core.request import WorkerRef
from ..proto import worker_pb2 as pb
from .launcher import Exit, Launcher, MemberHandle, MemberSpec, log_tail


class MemberState(StrEnum):
    """`ready` means registered, and so warmed up."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds between a member's end and its next start, doubling from `first` to `longest`.

    steady       a life of that many seconds makes the next pause `first` again
    max_attempts starts in a row that never became ready before the member counts as failed
    """

    first: float = 0.2
    longest: float = 10.0
    steady: float = 30.0
    max_attempts: int = 5

    def pause(self, num_short_lives: int) -> float:
        """The pause after so many short lives in a row (>= 1)."""
        return min(self.longest, self.first * 2.0 ** min(num_short_lives - 1, 30))


@dataclass(slots=True)
class Member:
    """What is known of one member. Only its supervisor and the controller write to it.

    registration  of its present process, once it has registered
    over          epochs that must never register again
    unconfirmed   epochs whose process may still be alive somewhere
    attached      the present process was started by an earlier controller
    """

    spec: MemberSpec
    state: MemberState = MemberState.STARTING
    handle: MemberHandle | None = None
    registration: pb.Registration | None = None
    over: set[int] = field(default_factory=set)
    unconfirmed: set[int] = field(default_factory=set)
    restarts: int = 0
    last_error: str = ""
    attached: bool = False
    kill_reason: str = ""

    @property
    def ref(self) -> WorkerRef | None:
        """The present life, once it has registered."""
        if self.registration is None:
            return None
        return WorkerRef(self.registration.worker.worker_id, self.registration.worker.epoch)


class Supervisor:
    """Runs one member until told to stop. `on_change` is called after every change of `member`; `on_dead` with
    every life that ended, once its death is certain."""

    def __init__(
        self,
        member: Member,
        launcher: Launcher,
        backoff: Backoff,
        on_change: Callable[[], None],
        on_dead: Callable[[WorkerRef], None],
        clock: Clock,
    ) -> None:
        self.member = member
        self._launcher = launcher
        self._backoff = backoff
        self._on_change = on_change
        self._on_dead = on_dead
        self._clock = clock
        self._num_short_lives = 0
        self._num_attempts = 0

    async def attach(self) -> None:
        """Take over the process that an earlier controller started, if it is alive."""
        handle = await self._launcher.attach(self.member.spec)
        if handle is not None:
            self.member.handle, self.member.attached = handle, True

    async def run(self) -> None:
        """Keep the member alive. Returns when it has failed for good; cancel it to stop."""
        while True:
            if self.member.handle is None and not await self._start():
                end = Exit(self.member.last_error, confirmed=True)
                lived = 0.0
            else:
                end, lived = await self._live()
            if not await self._pause(end, lived):
                return

    async def stop(self, patience: float) -> None:
        """SIGTERM, then SIGKILL after `patience` seconds. `run` must have been cancelled."""
        handle, self.member.handle = self.member.handle, None
        if handle is not None:
            await self._launcher.terminate(handle)
            try:
                await asyncio.wait_for(handle.exited(), patience)
            except TimeoutError:
                if not await self._launcher.kill(handle):
                    self.member.last_error = f"process {handle.pid} did not die"
        self.member.state = MemberState.STOPPED

    async def _start(self) -> bool:
        self._num_attempts += 1
        try:
            self.member.handle = await self._launcher.start(self.member.spec)
        except BatonError as error:
            self.member.last_error = str(error)
            return False
        return True

    async def _live(self) -> tuple[Exit, float]:
        """Wait for the end of the present process; return how it ended and how many seconds it lived."""
        member = self.member
        assert member.handle is not None
        began = self._clock.now()
        end = await member.handle.exited()
        was_ready, ref = member.registration is not None, member.ref
        if was_ready:
            self._num_attempts = 0
        member.handle, member.registration, member.attached = None, None, False
        reason = f"{member.kill_reason} ({end.reason})" if member.kill_reason else end.reason
        tail = "" if member.kill_reason else log_tail(member.spec)
        member.last_error = f"{reason}\n{tail}" if tail else reason
        member.kill_reason = ""
        if ref is not None:
            member.over.add(ref.epoch)
            if end.confirmed:
                self._on_dead(ref)
            else:
                member.unconfirmed.add(ref.epoch)
        return end, self._clock.now() - began

    async def _pause(self, end: Exit, lived: float) -> bool:
        """Wait before the next start; False when there shall be none."""
        member = self.member
        if self._num_attempts >= self._backoff.max_attempts:
            member.state = MemberState.FAILED
            self._on_change()
            return False
        self._num_short_lives = 1 if lived >= self._backoff.steady else self._num_short_lives + 1
        member.state = MemberState.RESTARTING
        member.restarts += 1
        self._on_change()
        await asyncio.sleep(self._backoff.pause(self._num_short_lives))
        return True
