"""The sending end: events in, actions out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from baton.core.kv import Endpoint, KVLayout
from baton.core.request import Attempt, WorkerRef
from baton.kv_transfer import handoff as ho
from baton.kv_transfer.ticket import Ticket
from baton.kv_transfer.transport import Note

BLOCK_SIZE, LEASE = 4, 3.0
SOURCE, TARGET = WorkerRef("prefill-0", 5), WorkerRef("decode-0", 6)
R = Attempt("r", 1)
ENDPOINT = Endpoint(TARGET, "127.0.0.1:1", "host", "", 99, KVLayout(1, 1, 1, BLOCK_SIZE, "float32"))
TICKET = Ticket(R, SOURCE, TARGET, (11, 12, 13), 0, 10, 1, LEASE, (ENDPOINT,))
BLOCKS = (1, 2, 3)
TOKEN = ho.FirstToken(0.0, R, 42)
LAST = Note(0, 3, last=True, first_token=42)


def computed(num_tokens: int, last: bool = False) -> ho.Computed:
    return ho.Computed(0.0, R, num_tokens, BLOCKS[: -(-num_tokens // BLOCK_SIZE)], last)


def done(note: Note) -> ho.PushDone:
    return ho.PushDone(0.0, R, note.first_block, note.num_blocks)


def failed(reason: str = "lost", retriable: bool = True) -> ho.PushFailed:
    return ho.PushFailed(0.0, R, reason, retriable)


@pytest.fixture
def sender() -> ho.Sender:
    sender = ho.Sender(SOURCE, LEASE)
    assert sender.handle(ho.Opened(0.0, R, TARGET, 10)) == []
    assert (sender.num_open, sender.is_open(R), sender.attempts) == (1, True, {R})
    return sender


def run(sender: ho.Sender, *events: ho.SenderEvent) -> list[ho.SenderAction]:
    """The actions of the last event; those before must ask for nothing."""
    for event in events[:-1]:
        assert sender.handle(event) == []
    return sender.handle(events[-1])


def test_chunks_leave_while_later_ones_are_computed(sender):
    ask = Note(0, 0)
    assert sender.handle(ho.Granted(0.0, TICKET)) == [ho.Push(TICKET, (), ask)]
    assert run(sender, computed(6), done(ask)) == [ho.Push(TICKET, (1, 2), Note(0, 1))]
    assert sender.handle(computed(8)) == []
    assert sender.handle(done(Note(0, 1))) == [ho.Push(TICKET, (1, 2), Note(1, 1))]
    assert run(sender, done(Note(1, 1)), computed(10, last=True)) == []
    last = Note(2, 1, last=True, first_token=42)
    assert sender.handle(TOKEN) == [ho.Push(TICKET, BLOCKS, last)]
    assert sender.handle(done(last)) == [ho.Unpin(R), ho.HandedOver(R)]
    assert (sender.num_open, sender.is_open(R)) == (0, False)


@pytest.mark.parametrize("events", [(computed(10, last=True), TOKEN), (TOKEN, computed(10, last=True))])
def test_a_late_grant_finds_everything_computed(sender, events):
    assert run(sender, *events, ho.Granted(0.0, TICKET)) == [ho.Push(TICKET, BLOCKS, LAST)]
    assert sender.handle(done(LAST)) == [ho.Unpin(R), ho.HandedOver(R)]


def test_a_grant_with_blocks_to_push_asks_by_pushing(sender):
    assert run(sender, computed(9), ho.Granted(0.0, TICKET)) == [ho.Push(TICKET, BLOCKS, Note(0, 2))]


def test_held_blocks_are_never_sent(sender):
    ticket = replace(TICKET, num_held=2)
    assert run(sender, computed(8), ho.Granted(0.0, ticket)) == [ho.Push(ticket, (1, 2), Note(2, 0))]
    assert run(sender, done(Note(2, 0)), computed(10, last=True)) == []
    assert sender.handle(TOKEN) == [ho.Push(ticket, BLOCKS, Note(2, 1, last=True, first_token=42))]


def test_a_prompt_that_is_held_whole_sends_only_the_token(sender):
    ticket = replace(TICKET, num_held=3)
    last = Note(3, 0, last=True, first_token=42)
    assert run(sender, computed(10, last=True), TOKEN, ho.Granted(0.0, ticket)) == [ho.Push(ticket, BLOCKS, last)]
    assert sender.handle(done(last)) == [ho.Unpin(R), ho.HandedOver(R)]


def test_notes_count_in_blocks_of_the_target(sender):
    endpoint = replace(ENDPOINT, layout=replace(ENDPOINT.layout, block_size=8))
    ticket = replace(TICKET, blocks=(11, 12), endpoints=(endpoint,))
    assert run(sender, computed(9), ho.Granted(0.0, ticket)) == [ho.Push(ticket, BLOCKS, Note(0, 1))]


def test_cancelled_before_anything_happened(sender):
    assert sender.handle(ho.Cancelled(0.0, R)) == [ho.Unpin(R)]
    assert sender.handle(ho.Granted(0.0, TICKET)) == [ho.SendStop(R, TICKET)], "the receiver learns it from a late ticket"


def test_cancelled_between_pushes(sender):
    sender.handle(ho.Granted(0.0, TICKET))
    sender.handle(done(Note(0, 0)))
    assert sender.handle(ho.Cancelled(0.0, R)) == [ho.Unpin(R), ho.SendStop(R, TICKET)]
    assert sender.handle(ho.Cancelled(0.0, R)) == []


@pytest.mark.parametrize("outcome", [done(Note(0, 2)), failed()])
def test_cancelled_during_a_push_waits_for_its_end(sender, outcome):
    run(sender, computed(8), ho.Granted(0.0, TICKET))
    assert sender.handle(ho.Cancelled(0.0, R)) == []
    assert (sender.num_open, sender.is_open(R)) == (1, False)
    assert sender.handle(computed(10, last=True)) == []
    assert sender.handle(TOKEN) == []
    assert sender.handle(outcome) == [ho.Unpin(R), ho.SendStop(R, TICKET)]
    assert sender.num_open == 0


def test_cancelled_during_the_last_push_that_succeeds(sender):
    run(sender, computed(10, last=True), TOKEN, ho.Granted(0.0, TICKET))
    assert sender.handle(ho.Cancelled(0.0, R)) == []
    assert sender.handle(done(LAST)) == [ho.Unpin(R)]


@pytest.mark.parametrize("retriable", [True, False])
def test_a_failed_push_gives_the_attempt_up(sender, retriable):
    run(sender, computed(8), ho.Granted(0.0, TICKET))
    actions = sender.handle(failed("no live ticket", retriable))
    assert actions == [ho.Fail(R, "no live ticket", retriable), ho.Unpin(R), ho.SendStop(R, TICKET)]


def test_leases(sender):
    assert sender.handle(ho.Tick(2.9)) == []
    assert sender.handle(ho.LeaseRenewed(2.9, (R, Attempt("unknown", 1)))) == []
    assert sender.handle(ho.Tick(5.8)) == []
    reason = "the lease of 3 s ran out at prefill-0@5"
    assert sender.handle(ho.Tick(5.9)) == [ho.Fail(R, reason, True), ho.Unpin(R)]


def test_a_lease_that_runs_out_during_a_push(sender):
    run(sender, computed(8), ho.Granted(0.0, TICKET))
    (fail,) = sender.handle(ho.Tick(3.0))
    assert isinstance(fail, ho.Fail)
    assert sender.handle(ho.Tick(4.0)) == []
    assert sender.handle(done(Note(0, 2))) == [ho.Unpin(R), ho.SendStop(R, TICKET)]


def test_a_dead_target_needs_no_promise(sender):
    other = Attempt("other", 1)
    sender.handle(ho.Opened(0.0, other, WorkerRef("decode-1", 1), 10))
    sender.handle(ho.Granted(0.0, TICKET))
    assert sender.handle(ho.TargetGone(0.0, TARGET)) == [ho.Fail(R, "decode worker decode-0@6 died", True)]
    assert sender.handle(failed()) == [ho.Unpin(R)]
    assert sender.attempts == {other}


@pytest.mark.parametrize(
    ("ticket", "stopped"),
    [
        (replace(TICKET, source=WorkerRef("prefill-0", 4)), False),
        (replace(TICKET, target=WorkerRef("decode-0", 5)), True),
        (replace(TICKET, num_tokens=9), True),
    ],
)
def test_a_ticket_that_does_not_fit_ends_the_attempt(sender, ticket, stopped):
    fail, unpin, *stop = sender.handle(ho.Granted(0.0, ticket))
    assert isinstance(fail, ho.Fail)
    assert fail.retriable
    assert unpin == ho.Unpin(R)
    assert stop == ([ho.SendStop(R, ticket)] if stopped else [])


def test_a_ticket_of_an_unknown_attempt_is_answered_with_a_promise_that_is_kept():
    sender = ho.Sender(SOURCE, LEASE)
    assert sender.handle(ho.Granted(0.0, TICKET)) == [ho.SendStop(R, TICKET)]
    fail, unpin = sender.handle(ho.Opened(0.0, R, TARGET, 10))
    assert isinstance(fail, ho.Fail)
    assert unpin == ho.Unpin(R)
    assert sender.handle(ho.Granted(0.0, TICKET)) == [ho.SendStop(R, TICKET)]
    assert sender.handle(ho.Granted(0.0, replace(TICKET, source=WorkerRef("prefill-9", 1)))) == []


def test_a_ticket_that_comes_while_giving_up_is_promised_too(sender):
    sender.handle(ho.Granted(0.0, TICKET))
    sender.handle(ho.Cancelled(0.0, R))
    assert sender.handle(ho.Granted(0.0, TICKET)) == []
    assert sender.handle(failed()) == [ho.Unpin(R), ho.SendStop(R, TICKET)]


def test_repeated_and_unknown_events_are_ignored(sender):
    assert sender.handle(ho.Opened(0.0, R, TARGET, 10)) == []
    assert run(sender, computed(8), ho.Granted(0.0, TICKET)) != []
    assert sender.handle(ho.Granted(0.0, TICKET)) == []
    assert sender.handle(done(Note(0, 1))) == [], "another push than the one in flight"
    unknown = Attempt("unknown", 1)
    for event in (
        ho.Computed(0.0, unknown, 4, (1,), True),
        ho.FirstToken(0.0, unknown, 1),
        ho.PushDone(0.0, unknown, 0, 1),
        ho.PushFailed(0.0, unknown, "x", True),
        ho.Cancelled(0.0, unknown),
        ho.TargetGone(0.0, WorkerRef("decode-9", 1)),
        ho.Tick(0.0),
    ):
        assert sender.handle(event) == []


def test_what_ended_long_ago_may_begin_again():
    sender, attempt = ho.Sender(SOURCE, LEASE), Attempt("r", 1)
    opened = ho.Opened(0.0, attempt, TARGET, 10)
    assert sender.handle(opened) == []
    sender.handle(ho.Cancelled(0.0, attempt))
    sender.handle(ho.Tick(LEASE))
    assert isinstance(sender.handle(opened)[0], ho.Fail)
    sender.handle(ho.Tick(100 * LEASE))
    assert sender.handle(opened) == []
