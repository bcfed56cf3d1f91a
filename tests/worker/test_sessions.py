from __future__ import annotations

from baton.core.request import Attempt
from baton.proto import worker_pb2 as pb
from baton.worker.sessions import MAX_MORE, Sessions

ONE, TWO = Attempt("r-1", 0), Attempt("r-2", 0)


def test_messages_go_to_the_router_that_asked() -> None:
    sessions = Sessions()
    first, _ = sessions.open("router-0", 1)
    second, _ = sessions.open("router-1", 1)
    sessions.own(ONE, first)
    sessions.own(TWO, second)
    sessions.send(TWO, pb.WorkerMessage())
    assert first.outgoing.empty()
    assert second.outgoing.qsize() == 1


def test_a_router_that_dials_again_replaces_its_old_session() -> None:
    sessions = Sessions()
    old, replaced = sessions.open("router-0", 1)
    assert replaced == []
    sessions.own(ONE, old)
    _, replaced = sessions.open("router-0", 2)
    assert replaced == [old]
    assert sessions.close(old) == [ONE]
    assert sessions.owner(ONE) is None


def test_an_attempt_that_left_is_forgotten_everywhere() -> None:
    sessions = Sessions()
    session, _ = sessions.open("router-0", 1)
    sessions.own(ONE, session)
    sessions.disown(ONE)
    sessions.send(ONE, pb.WorkerMessage())
    assert session.outgoing.empty()
    assert sessions.close(session) == []


def test_broken_sessions_expire_after_the_grace_period_and_send_nothing() -> None:
    sessions = Sessions()
    session, _ = sessions.open("router-0", 1)
    assert sessions.expired(100.0, 5.0) == []
    session.broken_at = 100.0
    session.send(pb.WorkerMessage())
    assert session.outgoing.empty()
    assert sessions.expired(104.9, 5.0) == []
    assert sessions.expired(105.0, 5.0) == [session]


async def test_what_waits_travels_in_one_message() -> None:
    session, _ = Sessions().open("router-0", 1)
    count = MAX_MORE + 3
    for number in range(count):
        session.send(pb.WorkerMessage(adopted=pb.Adopted(attempt=pb.AttemptId(request_id="r", number=number))))
    batches = [await session.next_message(), await session.next_message()]
    assert [len(batch.more) for batch in batches] == [MAX_MORE, 1]
    numbers = [message.adopted.attempt.number for batch in batches for message in (batch, *batch.more)]
    assert numbers == list(range(count))
    assert session.outgoing.empty()
