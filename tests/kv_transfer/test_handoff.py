"""Sender and receiver against an adversarial world: late, repeated, lost and damaged messages, cancels, deaths.

The world's rules: each router-worker channel is in order; a transport asks before its first write, writes block by
block, reports, and gets an answer; its connection may break anywhere, and what it sent before may still arrive later.
Wherever a block is written, it must be owned by that very ticket or lie in quarantine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from baton.core.errors import TransferRefused
from baton.core.kv import Endpoint, KVLayout
from baton.core.request import Attempt, SamplingParams, SequenceSpec, WorkerRef
from baton.engine.blocks import BlockPool
from baton.kv_transfer import handoff as ho
from baton.kv_transfer.ticket import Ticket
from baton.kv_transfer.transport import Header, Note
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCK_SIZE = 4
NUM_BLOCKS = 14
LEASE = 3.0
LAYOUT = KVLayout(1, 1, 1, BLOCK_SIZE, "float32")


@dataclass
class Receiving:
    """One life of the decode worker: state machine, block pool, memory, and the sequences it runs."""

    ref: WorkerRef
    pool: BlockPool = field(default_factory=lambda: BlockPool(NUM_BLOCKS, BLOCK_SIZE))
    memory: dict[int, tuple[int, ...]] = field(default_factory=dict)  # block -> the tokens whose KV it holds
    running: dict[Attempt, tuple[int, ...]] = field(default_factory=dict)
    owners: dict[int, Ticket] = field(default_factory=dict)  # block -> the latest ticket that it was granted to
    inbox: deque[ho.ReceiverEvent] = field(default_factory=deque)
    alive: bool = True

    def __post_init__(self) -> None:
        endpoint = Endpoint(self.ref, "", "", "", NUM_BLOCKS, LAYOUT)
        self.machine = ho.Receiver(self.ref, self.pool, BLOCK_SIZE, (endpoint,), LEASE, head_room=1)


@dataclass
class Sending:
    """One life of the prefill worker."""

    ref: WorkerRef
    pinned: dict[Attempt, SequenceSpec] = field(default_factory=dict)
    computed: dict[Attempt, int] = field(default_factory=dict)
    inbox: deque[ho.SenderEvent] = field(default_factory=deque)
    alive: bool = True

    def __post_init__(self) -> None:
        self.machine = ho.Sender(self.ref, LEASE)


@dataclass
class Pushing:
    """One push of a transport: what it has still to do, and frames of it that still travel."""

    sender: Sending
    receiver: Receiving
    ticket: Ticket
    note: Note
    to_write: deque[int]
    asked: bool = False
    damaged: bool = False
    over: bool = False  # the sender has got its answer

    @property
    def header(self) -> Header:
        return header(self.ticket, self.note)


def header(ticket: Ticket, note: Note) -> Header:
    return Header(ticket.attempt, ticket.source, ticket.target, ticket.generation, note)


class World:
    """Makes random moves; `bad` names the kinds of trouble that may happen."""

    def __init__(self, random: Random, bad: frozenset[str]) -> None:
        self.random = random
        self.bad = bad
        self.now = 0.0
        self.epoch = 0
        self.number = 0
        self.receiver = self._new_receiver()
        self.sender = self._new_sender()
        self.senders = [self.sender]
        self.receivers = [self.receiver]
        self.pushes: list[Pushing] = []
        self.late: list[tuple[Receiving, Header, bool]] = []  # frames that outlived their connection
        self.stops: list[tuple[Receiving, WorkerRef, Attempt]] = []
        self.specs: dict[Attempt, SequenceSpec] = {}
        self.failures: dict[tuple[str, Attempt], int] = {}
        self.unpins: dict[Attempt, int] = {}
        self.adoptions: dict[Attempt, int] = {}

    # ---- what always happens ---------------------------------------------------------------------

    def move(self) -> None:
        """One move, drawn by weight: most of the time nothing bad happens."""
        moves: list[tuple[int, Callable[[], None]]] = [
            (6, self.request),
            (40, self.deliver_to_receiver),
            (40, self.deliver_to_sender),
            (30, self.compute),
            (80, self.advance_push),
            (10, self.deliver_stop),
            (6, self.finish_sequence),
            (8, self.pass_time),
        ]
        moves += [(weight, move) for name, weight, move in self.troubles() if name in self.bad]
        weights = [weight for weight, _ in moves]
        self.random.choices([move for _, move in moves], weights)[0]()
        self.receiver.pool.check()

    def request(self) -> None:
        """A prompt: two families share prefixes, so that blocks are held already."""
        self.number += 1
        tokens = tuple(100 * self.random.randrange(2) + i for i in range(self.random.randint(1, 30)))
        spec = SequenceSpec(Attempt(f"r{self.number}", 1), tokens, SamplingParams())
        self.specs[spec.attempt] = spec
        self.receiver.inbox.append(ho.ReserveAsked(self.now, spec, self.sender.ref))
        if "lost messages" not in self.bad or self.random.random() < 0.9:  # else the prefill worker never hears of it
            self.sender.inbox.append(ho.Opened(self.now, spec.attempt, self.receiver.ref, len(tokens)))

    def deliver_to_receiver(self) -> None:
        if self.receiver.inbox:
            event = self.receiver.inbox.popleft()
            for _ in range(self._times()):
                self._to_receiver(self.receiver, event)

    def deliver_to_sender(self) -> None:
        if self.sender.inbox:
            event = self.sender.inbox.popleft()
            for _ in range(self._times()):
                self._to_sender(self.sender, event)

    def compute(self) -> None:
        if not self.sender.pinned:
            return
        attempt = self.random.choice(sorted(self.sender.pinned))
        total, done = len(self.specs[attempt].prompt), self.sender.computed.get(attempt, 0)
        if done == total:
            return
        done = min(total, done + self.random.randint(1, 20))
        self.sender.computed[attempt] = done
        events: list[ho.SenderEvent] = [ho.Computed(self.now, attempt, done, tuple(range(50)), done == total)]
        if done == total:
            events.insert(self.random.randrange(2), ho.FirstToken(self.now, attempt, 7))
        for event in events:
            self._to_sender(self.sender, event)

    def advance_push(self) -> None:
        if self.pushes:
            self._step(self.random.choice(self.pushes))

    def deliver_stop(self) -> None:
        if self.stops:
            receiver, source, attempt = self.stops.pop(self.random.randrange(len(self.stops)))
            if receiver.alive:
                self._to_receiver(receiver, ho.SourceStopped(self.now, source, attempt))

    def finish_sequence(self) -> None:
        if self.receiver.running:
            attempt = self.random.choice(sorted(self.receiver.running))
            self.receiver.pool.release(self.receiver.running.pop(attempt))
            self._to_receiver(self.receiver, ho.RoomFreed(self.now))

    def pass_time(self) -> None:
        if "expiry" not in self.bad or self.random.random() < 0.7:
            attempts = tuple(sorted(self.specs))
            self._to_receiver(self.receiver, ho.LeaseRenewed(self.now, attempts))
            self._to_sender(self.sender, ho.LeaseRenewed(self.now, attempts))
        self.now += self.random.choice([0.5, 1.0, 2.0])
        self._to_receiver(self.receiver, ho.Tick(self.now))
        self._to_sender(self.sender, ho.Tick(self.now))

    # ---- trouble ---------------------------------------------------------------------------------

    def troubles(self) -> list[tuple[str, int, Callable[[], None]]]:
        return [
            ("cancels", 8, self.cancel),
            ("lost messages", 3, self.lose_a_grant),
            ("broken connections", 6, self.break_connection),
            ("broken connections", 6, self.late_frame),
            ("damage", 4, self.damage),
            ("dead source", 1, self.kill_sender),
            ("dead target", 1, self.kill_receiver),
        ]

    def cancel(self) -> None:
        if self.specs:
            attempt = self.random.choice(sorted(self.specs)[-6:])
            self.receiver.inbox.append(ho.Cancelled(self.now, attempt))
            self.sender.inbox.append(ho.Cancelled(self.now, attempt))

    def lose_a_grant(self) -> None:
        """The router died, or dropped the ticket of a request that is over."""
        grant = next((event for event in self.sender.inbox if isinstance(event, ho.Granted)), None)
        if grant is not None:
            self.sender.inbox.remove(grant)

    def break_connection(self) -> None:
        if self.pushes:
            push = self.random.choice(self.pushes)
            if push.asked and not push.to_write:
                self.late.append((push.receiver, push.header, push.damaged))
            self._answer(push, "connection lost")

    def late_frame(self) -> None:
        if self.late:
            receiver, late, damaged = self.random.choice(self.late)
            self._land(receiver, late, damaged)

    def damage(self) -> None:
        if self.pushes:
            push = self.random.choice(self.pushes)
            push.damaged = push.damaged or len(push.to_write) == push.note.num_blocks > 0

    def kill_sender(self) -> None:
        dead = self.sender
        dead.alive = False
        for push in [p for p in self.pushes if p.sender is dead]:
            if push.asked and not push.to_write:
                self.late.append((push.receiver, push.header, push.damaged))
            self.pushes.remove(push)
        self.sender = self._new_sender()
        self.senders.append(self.sender)
        self.receiver.inbox.append(ho.SourceGone(self.now, dead.ref))

    def kill_receiver(self) -> None:
        dead = self.receiver
        dead.alive = False
        for push in [p for p in self.pushes if p.receiver is dead]:
            self._answer(push, "peer died")
        self.receiver = self._new_receiver()
        self.receivers.append(self.receiver)
        self.sender.inbox.append(ho.TargetGone(self.now, dead.ref))

    # ---- the end ---------------------------------------------------------------------------------

    def settle(self) -> None:
        """Everything is delivered, runs out of lease or finishes: nothing may be left over."""
        for _ in range(4):
            while self.pushes or self.receiver.inbox or self.sender.inbox:
                for move in (self.advance_push, self.deliver_to_receiver, self.deliver_to_sender):
                    move()
            self.now += LEASE
            self._to_receiver(self.receiver, ho.Tick(self.now))
            self._to_sender(self.sender, ho.Tick(self.now))
            while self.stops:
                self.deliver_stop()
            while self.receiver.running:
                self.finish_sequence()
        machine, pool = self.receiver.machine, self.receiver.pool
        assert (machine.num_tickets, machine.num_waiting, machine.num_quarantined) == (0, 0, 0)
        assert machine.attempts == frozenset()
        pool.check()
        assert (pool.num_free, pool.num_quarantined) == (NUM_BLOCKS, 0)
        assert self.sender.machine.num_open == 0
        assert self.sender.pinned == {}
        for counts in (self.failures, self.unpins, self.adoptions):
            assert set(counts.values()) <= {1}, counts

    # ---- inside ----------------------------------------------------------------------------------

    def _new_receiver(self) -> Receiving:
        self.epoch += 1
        return Receiving(WorkerRef("decode-0", self.epoch))

    def _new_sender(self) -> Sending:
        self.epoch += 1
        return Sending(WorkerRef("prefill-0", self.epoch))

    def _times(self) -> int:
        return 2 if "repeated messages" in self.bad and self.random.random() < 0.2 else 1

    def _to_receiver(self, receiver: Receiving, event: ho.ReceiverEvent) -> None:
        event = replace(event, now=self.now)
        for action in receiver.machine.handle(event):
            match action:
                case ho.Grant(ticket):
                    assert len(ticket.blocks) == -(-ticket.num_tokens // BLOCK_SIZE)
                    receiver.owners |= dict.fromkeys(ticket.blocks[ticket.num_held :], ticket)
                    granting = next((s for s in self.senders if s.ref == ticket.source and s.alive), None)
                    if granting is not None:
                        granting.inbox.append(ho.Granted(self.now, ticket))
                case ho.Adopt(spec, blocks, first_token, _):
                    self.adoptions[spec.attempt] = self.adoptions.get(spec.attempt, 0) + 1
                    assert first_token == 7
                    num_known = -(-len(spec.prompt) // BLOCK_SIZE)
                    assert len(blocks) in (num_known, num_known + 1)
                    for i, block in enumerate(blocks[:num_known]):
                        assert receiver.memory[block] == spec.prompt[: (i + 1) * BLOCK_SIZE]
                    receiver.pool.publish(spec.prompt, blocks)
                    receiver.running[spec.attempt] = blocks
                case ho.Fail(attempt, _, _):
                    self._failed(f"receiver {receiver.ref}", attempt)

    def _to_sender(self, sender: Sending, event: ho.SenderEvent) -> None:
        if isinstance(event, ho.Opened) and event.attempt not in self.unpins:
            sender.pinned[event.attempt] = self.specs[event.attempt]
        event = event if isinstance(event, ho.Granted) else replace(event, now=self.now)
        for action in sender.machine.handle(event):
            match action:
                case ho.Push(ticket, blocks, note):
                    assert not [p for p in self.pushes if p.ticket.attempt == ticket.attempt]
                    assert note.num_blocks == 0 or blocks
                    receiver = next(r for r in self.receivers if r.ref == ticket.target)
                    written = range(note.first_block, note.first_block + note.num_blocks)
                    push = Pushing(sender, receiver, ticket, note, deque(written))
                    self.pushes.append(push)
                    if not receiver.alive:
                        self._answer(push, "peer died")
                case ho.Unpin(attempt):
                    self.unpins[attempt] = self.unpins.get(attempt, 0) + 1
                    assert not [p for p in self.pushes if p.ticket.attempt == attempt], "unpinned under a push"
                    del sender.pinned[attempt]
                case ho.SendStop(attempt, ticket):
                    assert not [p for p in self.pushes if p.ticket.attempt == attempt], "promised under a push"
                    receiver = next(r for r in self.receivers if r.ref == ticket.target)
                    self.stops.append((receiver, sender.ref, attempt))
                case ho.Fail(attempt, _, _):
                    self._failed(f"sender {sender.ref}", attempt)
                case ho.HandedOver(attempt):
                    assert attempt in self.adoptions

    def _failed(self, end: str, attempt: Attempt) -> None:
        """The router gives the attempt up at both ends."""
        self.failures[end, attempt] = self.failures.get((end, attempt), 0) + 1
        self.receiver.inbox.append(ho.Cancelled(self.now, attempt))
        self.sender.inbox.append(ho.Cancelled(self.now, attempt))

    def _step(self, push: Pushing) -> None:
        if not push.asked:
            ask = replace(push.note, num_blocks=0, last=False, first_token=-1)
            try:
                push.receiver.machine.check(header(push.ticket, ask))
            except TransferRefused as error:
                self._answer(push, str(error))
                return
            push.asked = True
        elif push.to_write:
            self._write(push, push.to_write.popleft())
        else:
            self._answer(push, self._land(push.receiver, push.header, push.damaged))

    def _write(self, push: Pushing, index: int) -> None:
        """One-sided: the receiver's machine is not asked. That is what quarantine is for."""
        ticket, receiver = push.ticket, push.receiver
        assert ticket.attempt in push.sender.pinned, "reads blocks that are not pinned"
        block = ticket.blocks[index]
        assert receiver.owners[block] is ticket, "written after the block was granted to somebody else"
        live = ticket.attempt in receiver.machine.attempts
        assert receiver.pool.references(block) == (1 if live else 0)
        assert live or block in receiver.pool.snapshot().quarantined, "written while it could be reused"
        tokens = self.specs[ticket.attempt].prompt[: (index + 1) * BLOCK_SIZE]
        receiver.memory[block] = () if push.damaged else tokens

    def _land(self, receiver: Receiving, landing: Header, damaged: bool) -> str | None:
        """The receiver handles the report of a push; returns why it refused, or None."""
        if not receiver.alive:
            return "peer died"
        try:
            receiver.machine.check(landing)
        except TransferRefused as error:
            return str(error)
        if damaged:
            self._to_receiver(receiver, ho.Damaged(self.now, landing, "flipped"))
            return "damaged"
        self._to_receiver(receiver, ho.Landed(self.now, landing))
        return None

    def _answer(self, push: Pushing, reason: str | None) -> None:
        push.over = True
        self.pushes.remove(push)
        attempt, note = push.ticket.attempt, push.note
        if reason is None:
            self._to_sender(push.sender, ho.PushDone(self.now, attempt, note.first_block, note.num_blocks))
        else:
            self._to_sender(push.sender, ho.PushFailed(self.now, attempt, reason, True))


TROUBLES = (
    "cancels",
    "expiry",
    "lost messages",
    "repeated messages",
    "broken connections",
    "damage",
    "dead source",
    "dead target",
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_steps=st.integers(0, 1500), bad=st.frozensets(st.sampled_from(TROUBLES)))
def test_whatever_goes_wrong_nothing_is_left_over(seed, num_steps, bad):
    world = World(Random(seed), bad)
    for _ in range(num_steps):
        world.move()
    world.settle()


@pytest.mark.parametrize("trouble", TROUBLES)
def test_each_trouble_alone_and_all_together(trouble):
    for bad in (frozenset({trouble}), frozenset(TROUBLES)):
        world = World(Random(trouble), bad)
        for _ in range(3000):
            world.move()
        world.settle()
        assert world.adoptions


def test_without_trouble_every_request_is_handed_over():
    world = World(Random(0), frozenset())
    for _ in range(4000):
        world.move()
    while world.number > len(world.adoptions):
        for move in (world.advance_push, world.deliver_to_receiver, world.deliver_to_sender, world.compute):
            move()
        world.finish_sequence()
    world.settle()
    assert len(world.adoptions) == world.number > 50
    assert world.failures == {}
