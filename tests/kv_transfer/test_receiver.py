"""The receiving end: events in, actions out, and every block accounted for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from baton.core.errors import TransferRefused
from baton.core.kv import Endpoint, KVLayout
from baton.core.request import Attempt, SamplingParams, SequenceSpec, WorkerRef
from baton.engine.blocks import BlockPool
from baton.kv_transfer import handoff as ho
from baton.kv_transfer.ticket import Ticket
from baton.kv_transfer.transport import Header, Note

NUM_BLOCKS, BLOCK_SIZE, LEASE = 10, 4, 3.0
SOURCE, TARGET = WorkerRef("prefill-0", 5), WorkerRef("decode-0", 6)
ENDPOINT = Endpoint(TARGET, "127.0.0.1:1", "host", "", NUM_BLOCKS, KVLayout(1, 1, 1, BLOCK_SIZE, "float32"))


def spec(name: str, num_tokens: int, num_output: int = 0) -> SequenceSpec:
    tokens = tuple(range(num_tokens))
    return SequenceSpec(Attempt(name, 1), tokens[: num_tokens - num_output], SamplingParams(), tokens[num_tokens - num_output :])


def header(ticket: Ticket, note: Note) -> Header:
    return Header(ticket.attempt, ticket.source, ticket.target, ticket.generation, note)


def everything(ticket: Ticket, first_token: int = 9) -> Header:
    return header(ticket, Note(ticket.num_held, len(ticket.blocks) - ticket.num_held, last=True, first_token=first_token))


class Rig:
    def __init__(self, num_blocks: int = NUM_BLOCKS, head_room: int = 1) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        endpoint = replace(ENDPOINT, num_blocks=num_blocks)
        self.receiver = ho.Receiver(TARGET, self.pool, BLOCK_SIZE, (endpoint,), LEASE, head_room)

    def reserve(self, name: str, num_tokens: int, now: float = 0.0, source: WorkerRef = SOURCE) -> list[ho.ReceiverAction]:
        return self.receiver.handle(ho.ReserveAsked(now, spec(name, num_tokens), source))

    def ticket(self, name: str, num_tokens: int, now: float = 0.0, source: WorkerRef = SOURCE) -> Ticket:
        (grant,) = self.reserve(name, num_tokens, now, source)
        assert isinstance(grant, ho.Grant)
        return grant.ticket

    def baseline(self) -> bool:
        self.pool.check()
        nothing = (self.receiver.num_tickets, self.receiver.num_waiting, self.receiver.num_quarantined)
        return self.pool.num_free == self.pool.num_blocks and nothing == (0, 0, 0)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_reservation_is_granted_with_head_room_and_adopted(rig):
    ticket = rig.ticket("r", 10)
    assert (ticket.attempt, ticket.source, ticket.target) == (Attempt("r", 1), SOURCE, TARGET)
    assert (len(ticket.blocks), ticket.num_held, ticket.num_tokens, ticket.lease) == (3, 0, 10, LEASE)
    assert rig.pool.num_free == NUM_BLOCKS - 4
    assert rig.receiver.attempts == {ticket.attempt}
    for note in (Note(0, 0), Note(0, 2)):
        rig.receiver.check(header(ticket, note))
        assert rig.receiver.handle(ho.Landed(1.0, header(ticket, note))) == []
    (adopt,) = rig.receiver.handle(ho.Landed(2.0, header(ticket, Note(2, 1, last=True, first_token=77))))
    assert isinstance(adopt, ho.Adopt)
    assert (adopt.spec, adopt.first_token, adopt.num_held) == (spec("r", 10), 77, 0)
    assert adopt.blocks[:3] == ticket.blocks
    assert len(adopt.blocks) == 4
    rig.pool.release(adopt.blocks)
    assert rig.baseline()


def test_tokens_of_earlier_attempts_are_known_too(rig):
    (grant,) = rig.receiver.handle(ho.ReserveAsked(0.0, spec("r", 10, num_output=6), SOURCE))
    assert grant.ticket.num_tokens == 10


def test_cached_blocks_are_held_and_never_landed_on(rig):
    first = rig.ticket("a", 8)
    (adopt,) = rig.receiver.handle(ho.Landed(0.0, everything(first)))
    rig.pool.publish(tuple(range(8)), adopt.blocks)
    rig.pool.release(adopt.blocks)
    ticket = rig.ticket("b", 8)
    assert (ticket.num_held, ticket.blocks) == (2, first.blocks)
    with pytest.raises(TransferRefused, match="not within"):
        rig.receiver.check(header(ticket, Note(1, 1)))
    (adopt,) = rig.receiver.handle(ho.Landed(0.0, everything(ticket)))
    assert (adopt.num_held, adopt.blocks[:2]) == (2, ticket.blocks)
    rig.pool.release(adopt.blocks)
    assert rig.baseline()


def test_the_head_of_the_queue_waits_holding_nothing_and_nobody_overtakes(rig):
    big = rig.ticket("big", 32)
    assert rig.reserve("second", 16) == []
    assert rig.reserve("third", 1) == []
    assert (rig.receiver.num_waiting, rig.pool.num_free) == (2, NUM_BLOCKS - 9)
    assert rig.receiver.handle(ho.RoomFreed(1.0)) == []
    granted = rig.receiver.handle(ho.Cancelled(1.0, big.attempt))
    assert [action.ticket.attempt.request_id for action in granted] == ["second", "third"]
    assert rig.receiver.num_waiting == 0


def test_room_freed_by_the_scheduler_is_used(rig):
    taken = rig.pool.allocate(8)
    assert rig.reserve("r", 16) == []
    rig.pool.release(taken[:3])
    (grant,) = rig.receiver.handle(ho.RoomFreed(1.0))
    assert isinstance(grant, ho.Grant)


def test_a_prompt_larger_than_the_pool_fails_for_good(rig):
    (fail,) = rig.reserve("r", 41)
    assert fail == ho.Fail(Attempt("r", 1), "KV of 41 tokens needs 11 blocks, worker decode-0@6 has 10", retriable=False)
    assert rig.baseline()


def test_head_room_shrinks_to_the_pool(rig):
    assert len(rig.ticket("r", 40).blocks) == 10


def test_a_ticket_that_nobody_used_is_released_at_once(rig):
    ticket = rig.ticket("r", 10)
    assert rig.receiver.handle(ho.Cancelled(1.0, ticket.attempt)) == []
    assert rig.baseline()
    with pytest.raises(TransferRefused, match="no live ticket"):
        rig.receiver.check(header(ticket, Note(0, 0)))


@pytest.mark.parametrize("end", ["cancel", "expiry", "damage"])
@pytest.mark.parametrize("relief", ["stopped", "gone"])
def test_blocks_that_may_still_be_written_stay_in_quarantine(rig, end, relief):
    ticket = rig.ticket("r", 10)
    rig.receiver.check(header(ticket, Note(0, 0)))
    event = {
        "cancel": ho.Cancelled(1.0, ticket.attempt),
        "expiry": ho.Tick(LEASE),
        "damage": ho.Damaged(1.0, header(ticket, Note(0, 2)), "flipped"),
    }[end]
    failures = [type(action) for action in rig.receiver.handle(event)]
    assert failures == ([] if end == "cancel" else [ho.Fail])
    assert (rig.receiver.num_quarantined, rig.pool.num_quarantined, rig.pool.num_free) == (1, 3, NUM_BLOCKS - 3)
    for wrong in (
        ho.SourceStopped(2.0, WorkerRef("prefill-0", 6), ticket.attempt),
        ho.SourceGone(2.0, WorkerRef("prefill-1", 5)),
    ):
        rig.receiver.handle(wrong)
        assert rig.pool.num_quarantined == 3
    ended = ho.SourceStopped(3.0, SOURCE, ticket.attempt) if relief == "stopped" else ho.SourceGone(3.0, SOURCE)
    assert rig.receiver.handle(ended) == []
    assert rig.baseline()


def test_held_blocks_and_head_room_do_not_go_to_quarantine(rig):
    (adopt,) = rig.receiver.handle(ho.Landed(0.0, everything(rig.ticket("a", 8))))
    rig.pool.publish(tuple(range(8)), adopt.blocks)
    ticket = rig.ticket("b", 12)
    assert ticket.num_held == 2
    rig.receiver.check(header(ticket, Note(2, 0)))
    rig.receiver.handle(ho.Cancelled(1.0, ticket.attempt))
    assert rig.pool.num_quarantined == 1


def test_leases_are_renewed(rig):
    ticket = rig.ticket("r", 4)
    rig.ticket("other", 4)
    rig.receiver.handle(ho.LeaseRenewed(2.0, (ticket.attempt, Attempt("unknown", 1))))
    (fail,) = rig.receiver.handle(ho.Tick(3.0))
    assert fail == ho.Fail(Attempt("other", 1), "the lease of 3 s ran out at decode-0@6", retriable=True)
    assert rig.receiver.attempts == {ticket.attempt}
    rig.receiver.handle(ho.Tick(4.9))
    assert rig.receiver.num_tickets == 1
    rig.receiver.handle(ho.Tick(5.0))
    assert rig.baseline()


def test_a_waiting_reservation_expires_too(rig):
    rig.pool.allocate(10)
    rig.reserve("r", 4)
    rig.reserve("kept", 4)
    rig.receiver.handle(ho.LeaseRenewed(2.0, (Attempt("kept", 1),)))
    (fail,) = rig.receiver.handle(ho.Tick(3.5))
    assert (fail.attempt, fail.retriable) == (Attempt("r", 1), True)
    assert rig.receiver.num_waiting == 1


def test_the_death_of_a_source_fails_what_it_had(rig):
    other = WorkerRef("prefill-1", 8)
    kept = rig.ticket("kept", 4, source=other)
    used = rig.ticket("used", 8)
    rig.receiver.check(header(used, Note(0, 0)))
    rig.ticket("unused", 8)
    rig.reserve("waiting", 20)
    failures = rig.receiver.handle(ho.SourceGone(1.0, SOURCE))
    assert {fail.attempt.request_id for fail in failures} == {"used", "unused", "waiting"}
    assert all(fail.retriable for fail in failures)
    assert (rig.receiver.num_quarantined, rig.pool.num_quarantined) == (0, 0)
    assert rig.receiver.attempts == {kept.attempt}


def test_a_source_that_gives_up_fails_the_attempt(rig):
    ticket = rig.ticket("r", 8)
    rig.receiver.check(header(ticket, Note(0, 0)))
    (fail,) = rig.receiver.handle(ho.SourceStopped(1.0, SOURCE, ticket.attempt))
    assert (fail.attempt, fail.retriable) == (ticket.attempt, True)
    assert rig.baseline()


def test_only_the_very_ticket_is_accepted(rig):
    ticket = rig.ticket("r", 8)
    good = header(ticket, Note(0, 1))
    for wrong, match in [
        (replace(good, source=WorkerRef("prefill-0", 4)), "names generation 1"),
        (replace(good, target=WorkerRef("decode-0", 5)), "this is decode-0@6"),
        (replace(good, generation=2), "names generation 2"),
        (replace(good, attempt=Attempt("r", 2)), "no live ticket"),
        (header(ticket, Note(0, 3)), "not within"),
        (header(ticket, Note(2, 1)), "not within"),
        (header(ticket, Note(1, -1)), "not within"),
        (header(ticket, Note(0, 2, last=True)), "no first token"),
        (header(ticket, Note(1, 1, last=True, first_token=3)), "1 blocks are missing"),
    ]:
        with pytest.raises(TransferRefused, match=match):
            rig.receiver.check(wrong)
    rig.receiver.handle(ho.Cancelled(1.0, ticket.attempt))
    assert rig.baseline(), "a refused source cannot write: nothing goes to quarantine"


def test_generations_are_never_used_again(rig):
    generations = []
    for i in range(5):
        ticket = rig.ticket(f"r{i}", 4)
        generations.append(ticket.generation)
        rig.receiver.handle(ho.Cancelled(0.0, ticket.attempt))
    assert len(set(generations)) == 5


def test_repeated_landings_are_harmless(rig):
    ticket = rig.ticket("r", 8)
    for _ in range(2):
        assert rig.receiver.handle(ho.Landed(0.0, header(ticket, Note(0, 1)))) == []
    (adopt,) = rig.receiver.handle(ho.Landed(0.0, header(ticket, Note(1, 1, last=True, first_token=3))))
    assert rig.receiver.handle(ho.Landed(0.0, header(ticket, Note(1, 1, last=True, first_token=3)))) == []
    assert rig.receiver.handle(ho.Damaged(0.0, header(ticket, Note(1, 1)), "late")) == []
    rig.pool.release(adopt.blocks)
    assert rig.baseline()


def test_an_incomplete_landing_fails_closed(rig):
    ticket = rig.ticket("r", 8)
    (fail,) = rig.receiver.handle(ho.Landed(0.0, header(ticket, Note(1, 1, last=True, first_token=3))))
    assert isinstance(fail, ho.Fail)
    assert "1 blocks are missing" in fail.reason


def test_repeated_and_unknown_events_are_ignored(rig):
    ticket = rig.ticket("r", 8)
    assert rig.reserve("r", 8) == []
    rig.receiver.check(header(ticket, Note(0, 0)))
    rig.receiver.handle(ho.Cancelled(0.0, ticket.attempt))
    assert rig.reserve("r", 8) == []
    rig.receiver.handle(ho.SourceStopped(0.0, SOURCE, ticket.attempt))
    assert rig.reserve("r", 8) == []
    unknown = Attempt("unknown", 1)
    stranger = replace(header(ticket, Note(0, 0)), attempt=unknown)
    for event in (
        ho.Cancelled(0.0, unknown),
        ho.SourceStopped(0.0, SOURCE, unknown),
        ho.SourceGone(0.0, SOURCE),
        ho.LeaseRenewed(0.0, (unknown,)),
        ho.Landed(0.0, stranger),
        ho.Damaged(0.0, stranger, "x"),
        ho.RoomFreed(0.0),
        ho.Tick(0.0),
    ):
        assert rig.receiver.handle(event) == []
    assert rig.baseline()


def test_what_ended_long_ago_may_begin_again(rig):
    rig.receiver.handle(ho.Cancelled(0.0, Attempt("r", 1)))
    rig.receiver.handle(ho.Tick(1.0))
    assert rig.reserve("r", 8) == []
    rig.receiver.handle(ho.Tick(1000.0))
    (grant,) = rig.reserve("r", 8)
    assert isinstance(grant, ho.Grant)
