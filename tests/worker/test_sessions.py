from __future__ import annotations

from baton.core.request import Attempt
from baton.core.view import WorkerLoad
from baton.proto import worker_pb2 as pb
from baton.worker.sessions import MAX_MORE, Sessions

ONE, TWO = Attempt("r-1", 0), Attempt("r-2", 0)


def test_messages_go_to_the_router_that_asked() -> None:
    sessions = Sessions()
    first, _ = sessions.open("router-0", 1)
    second, _ = sessions.open("router-1", 1)
    sessions.own(ONE, first, 10, to_prefill=True)
    sessions.own(TWO, second, 10, to_prefill=True)
    sessions.send(TWO, pb.WorkerMessage())
    assert first.outgoing.empty()
    assert second.outgoing.qsize() == 1


def test_a_router_that_dials_again_replaces_its_old_session() -> None:
    sessions = Sessions()
    old, replaced = sessions.open("router-0", 1)
    assert replaced == []
    sessions.own(ONE, old, 10, to_prefill=True)
    _, replaced = sessions.open("router-0", 2)
    assert replaced == [old]
    assert sessions.close(old) == [ONE]
    assert sessions.owner(ONE) is None


def test_an_attempt_that_left_is_forgotten_everywhere() -> None:
    sessions = Sessions()
    session, _ = sessions.open("router-0", 1)
    sessions.own(ONE, session, 10, to_prefill=True)
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


def test_a_router_is_told_what_the_others_have_here() -> None:
    sessions = Sessions()
    first, _ = sessions.open("router-0", 1)
    second, _ = sessions.open("router-1", 1)
    mine, load = Attempt("r-3", 0), WorkerLoad(step=7)
    sessions.own(mine, first, 1000, to_prefill=True)
    assert sessions.beside("router-0", load) is load  # nobody else has anything
    sessions.own(ONE, second, 30, to_prefill=True)
    sessions.own(TWO, second, 5, to_prefill=False)

    def others(router_id: str) -> tuple[int, int, int]:
        told = sessions.beside(router_id, load)
        assert told.step == 7
        return told.others_assigned, told.others_pending_tokens, told.others_context_tokens

    assert others("router-0") == (2, 30, 35)
    assert others("router-1") == (1, 1000, 1000)
    assert others("router-2") == (3, 1030, 1035)
    sessions.prefilled(ONE)
    assert others("router-0") == (2, 0, 35)
    sessions.disown(ONE)
    assert others("router-0") == (1, 0, 5)
    sessions.close(second)
    assert others("router-0") == (0, 0, 0)
    third, _ = sessions.open("router-0", 2)  # another life of the router itself is none of the others
    sessions.own(ONE, third, 8, to_prefill=True)
    assert others("router-0") == (0, 0, 0)
