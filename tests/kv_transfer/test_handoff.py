"""Sender and receiver against an adversarial world: late, repeated, lost and damaged messages, cancels, deaths.

The world's rules: each router-worker channel is in order; a transport asks before its first write, writes block by
block, reports, and gets an answer; its connection may break anywhere, and what it sent before may still arrive later.
Wherever a block is written, it must be owned by that very ticket or lie in quarantine.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from baton.core.errors import TransferRefused
from baton.core.kv import Endpoint, KVLayout
from baton.core.request import Attempt, SamplingParams, SequenceSpec, WorkerRef
from baton.engine.blocks import BlockPool
from baton.kv_transfer import handoff as ho
from baton.kv_transfer.ticket import Ticket
from baton.kv_transfer.transport import Header, Note
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

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


class World(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
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

    # ---- requests --------------------------------------------------------------------------------

    @rule(family=st.integers(0, 1), num_tokens=st.integers(1, 30), drop=st.sampled_from([False] * 5 + [True]))
    def request(self, family, num_tokens, drop):
        """A prompt: two families share prefixes, so that blocks are held already."""
        self.number += 1
        tokens = tuple(100 * family + i for i in range(num_tokens))
        spec = SequenceSpec(Attempt(f"r{self.number}", 1), tokens, SamplingParams())
        self.specs[spec.attempt] = spec
        self.receiver.inbox.append(ho.ReserveAsked(self.now, spec, self.sender.ref))
        if not drop:  # else the prefill worker never hears of it
            self.sender.inbox.append(ho.Opened(self.now, spec.attempt, self.receiver.ref, num_tokens))

    @precondition(lambda self: self.specs)
    @rule(data=st.data())
    def cancel(self, data):
        attempt = data.draw(st.sampled_from(sorted(self.specs)))
        self.receiver.inbox.append(ho.Cancelled(self.now, attempt))
        self.sender.inbox.append(ho.Cancelled(self.now, attempt))

    @rule(random=st.randoms(use_true_random=False), num_steps=st.integers(1, 40))
    def go_on(self, random, num_steps):
        """Nothing bad happens for a while."""
        for _ in range(num_steps):
            choice = random.randrange(4)
            if choice == 0 and self.receiver.inbox:
                self._to_receiver(self.receiver, self.receiver.inbox.popleft())
            elif choice == 1 and self.sender.inbox:
                self._to_sender(self.sender, self.sender.inbox.popleft())
            elif choice == 2 and self.pushes:
                self._step(random.choice(self.pushes))
            elif self.sender.pinned:
                attempt = random.choice(sorted(self.sender.pinned))
                left = len(self.specs[attempt].prompt) - self.sender.computed.get(attempt, 0)
                self._compute(attempt, random.randint(1, 12) if left > 12 else left, random.random() < 0.5)

    @precondition(lambda self: self.receiver.running)
    @rule(data=st.data())
    def finish_sequence(self, data):
        attempt = data.draw(st.sampled_from(sorted(self.receiver.running)))
        self.receiver.pool.release(self.receiver.running.pop(attempt))
        self._to_receiver(self.receiver, ho.RoomFreed(self.now))

    # ---- the network -----------------------------------------------------------------------------

    @rule(twice=st.integers(0, 5))
    def deliver_to_receiver(self, twice):
        if self.receiver.inbox:
            event = self.receiver.inbox.popleft()
            for _ in range(2 if twice == 0 else 1):
                self._to_receiver(self.receiver, event)

    @rule(twice=st.integers(0, 5))
    def deliver_to_sender(self, twice):
        if self.sender.inbox:
            event = self.sender.inbox.popleft()
            for _ in range(2 if twice == 0 else 1):
                self._to_sender(self.sender, event)

    @precondition(lambda self: self.sender.inbox)
    @rule()
    def lose_a_grant(self):
        """The router died, or dropped the ticket of a request that is over."""
        if isinstance(self.sender.inbox[0], ho.Granted):
            self.sender.inbox.popleft()

    @precondition(lambda self: self.pushes)
    @rule(data=st.data(), num_steps=st.integers(1, 12))
    def advance_push(self, data, num_steps):
        push = self.pushes[data.draw(st.integers(0, len(self.pushes) - 1))]
        for _ in range(num_steps):
            if push.over:
                break
            self._step(push)

    @precondition(lambda self: self.pushes)
    @rule(data=st.data(), arrives=st.booleans())
    def break_connection(self, data, arrives):
        push = self.pushes[data.draw(st.integers(0, len(self.pushes) - 1))]
        if arrives and push.asked and not push.to_write:
            self.late.append((push.receiver, push.header, push.damaged))
        self._answer(push, "connection lost")

    @precondition(lambda self: self.pushes)
    @rule(data=st.data())
    def damage(self, data):
        self.pushes[data.draw(st.integers(0, len(self.pushes) - 1))].damaged = True

    @precondition(lambda self: self.late)
    @rule(data=st.data(), keep=st.booleans())
    def late_frame(self, data, keep):
        index = data.draw(st.integers(0, len(self.late) - 1))
        receiver, late, damaged = self.late[index] if keep else self.late.pop(index)
        self._land(receiver, late, damaged)

    @precondition(lambda self: self.stops)
    @rule(data=st.data())
    def deliver_stop(self, data):
        receiver, source, attempt = self.stops.pop(data.draw(st.integers(0, len(self.stops) - 1)))
        if receiver.alive:
            self._to_receiver(receiver, ho.SourceStopped(self.now, source, attempt))

    # ---- time and death --------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.0, 4.0]), renewed=st.sampled_from([True, True, True, False]))
    def pass_time(self, seconds, renewed):
        if renewed:
            self._renew()
        self.now += seconds
        self._to_receiver(self.receiver, ho.Tick(self.now))
        self._to_sender(self.sender, ho.Tick(self.now))

    def _renew(self) -> None:
        attempts = tuple(sorted(self.specs))
        self._to_receiver(self.receiver, ho.LeaseRenewed(self.now, attempts))
        self._to_sender(self.sender, ho.LeaseRenewed(self.now, attempts))

    @rule(odds=st.integers(0, 4))
    def kill_sender(self, odds):
        if odds:
            return
        dead = self.sender
        self._kill_sender(dead)
        self.sender = self._new_sender()
        self.senders.append(self.sender)
        self.receiver.inbox.append(ho.SourceGone(self.now, dead.ref))

    @rule(odds=st.integers(0, 4))
    def kill_receiver(self, odds):
        if odds:
            return
        dead = self.receiver
        dead.alive = False
        for push in [p for p in self.pushes if p.receiver is dead]:
            self._answer(push, "peer died")
        self.receiver = self._new_receiver()
        self.receivers.append(self.receiver)
        self.sender.inbox.append(ho.TargetGone(self.now, dead.ref))

    # ---- what must hold --------------------------------------------------------------------------

    @invariant()
    def pools_are_sound(self):
        self.receiver.pool.check()

    @invariant()
    def each_end_answers_once(self):
        assert all(count == 1 for count in self.failures.values()), self.failures
        assert all(count == 1 for count in self.unpins.values()), self.unpins
        assert all(count == 1 for count in self.adoptions.values()), self.adoptions

    def teardown(self):
        """Everything is delivered, runs out of lease or finishes: nothing may be left over."""
        for _ in range(4):
            while self.pushes:
                push = self.pushes[0]
                while not push.over:
                    self._step(push)
            while self.receiver.inbox:
                self._to_receiver(self.receiver, self.receiver.inbox.popleft())
            while self.sender.inbox:
                self._to_sender(self.sender, self.sender.inbox.popleft())
            self.now += LEASE
            self._to_receiver(self.receiver, ho.Tick(self.now))
            self._to_sender(self.sender, ho.Tick(self.now))
            while self.stops:
                receiver, source, attempt = self.stops.pop()
                if receiver.alive:
                    self._to_receiver(receiver, ho.SourceStopped(self.now, source, attempt))
            for attempt in sorted(self.receiver.running):
                self.receiver.pool.release(self.receiver.running.pop(attempt))
        machine, pool = self.receiver.machine, self.receiver.pool
        assert (machine.num_tickets, machine.num_waiting, machine.num_quarantined) == (0, 0, 0)
        assert machine.attempts == frozenset()
        pool.check()
        assert (pool.num_free, pool.num_quarantined) == (NUM_BLOCKS, 0)
        assert self.sender.machine.num_open == 0
        assert self.sender.pinned == {}

    # ---- inside ----------------------------------------------------------------------------------

    def _compute(self, attempt: Attempt, num_tokens: int, token_first: bool) -> None:
        total, done = len(self.specs[attempt].prompt), self.sender.computed.get(attempt, 0)
        if done == total:
            return
        done += num_tokens
        self.sender.computed[attempt] = done
        events: list[ho.SenderEvent] = [ho.Computed(self.now, attempt, done, tuple(range(50)), done == total)]
        if done == total:
            events.insert(0 if token_first else 1, ho.FirstToken(self.now, attempt, 7))
        for event in events:
            self._to_sender(self.sender, event)

    def _new_receiver(self) -> Receiving:
        self.epoch += 1
        return Receiving(WorkerRef("decode-0", self.epoch))

    def _new_sender(self) -> Sending:
        self.epoch += 1
        return Sending(WorkerRef("prefill-0", self.epoch))

    def _kill_sender(self, dead: Sending) -> None:
        dead.alive = False
        for push in [p for p in self.pushes if p.sender is dead]:
            if push.asked and not push.to_write:
                self.late.append((push.receiver, push.header, push.damaged))
            push.over = True
            self.pushes.remove(push)

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
        receiver.memory[block] = self.specs[ticket.attempt].prompt[: (index + 1) * BLOCK_SIZE]

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


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
