"""Frames survive the wire and damaged ones are noticed."""

from __future__ import annotations

import pytest
from baton.core.errors import PeerLost, TransferDamaged, TransferRefused
from baton.core.request import Attempt, WorkerRef
from baton.kv_transfer.frames import Kind, Reply, Request, Status, checksum_of
from baton.kv_transfer.transport import Header, Note
from hypothesis import given
from hypothesis import strategies as st

HEADER = Header(
    Attempt("router-1:ü", 3),
    WorkerRef("prefill-0", 2**63 - 1),
    WorkerRef("decode-0", 0),
    12,
    Note(3, 4, last=True, first_token=99),
)


@given(
    kind=st.sampled_from(Kind),
    number=st.integers(0, 2**40),
    runs=st.lists(st.tuples(st.integers(0, 2**48), st.integers(0, 2**40))).map(tuple),
    checksum=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    payload=st.binary(),
)
def test_request_round_trip(kind, number, runs, checksum, payload):
    request = Request(kind, number, HEADER, runs, checksum)
    half = len(payload) // 2
    frame = request.pack([memoryview(payload)[:half], memoryview(payload)[half:]])
    back, found = Request.unpack(frame)
    assert back == request
    assert bytes(found) == payload


@given(position=st.integers(0), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_head_is_noticed(position, bit):
    frame = bytearray(Request(Kind.PLACED, 5, HEADER, ((0, 10),), 77).pack())
    frame[position % len(frame)] ^= 1 << bit
    with pytest.raises(TransferDamaged):
        Request.unpack(bytes(frame))


@pytest.mark.parametrize("frame", [b"", b"\0\0", b"\0\0\0\1\0\0\0\0", Reply(1, Status.OK).pack()])
def test_what_is_no_request_is_refused(frame):
    with pytest.raises(TransferDamaged):
        Request.unpack(frame)


def test_a_request_is_no_reply():
    with pytest.raises(TransferDamaged):
        Reply.unpack(Request(Kind.STOP, 1, HEADER).pack())


@pytest.mark.parametrize(
    ("status", "error"), [(Status.REFUSED, TransferRefused), (Status.DAMAGED, TransferDamaged), (Status.LOST, PeerLost)]
)
def test_replies_raise_what_they_say(status, error):
    reply = Reply.unpack(Reply(7, status, "because").pack())
    assert reply == Reply(7, status, "because")
    with pytest.raises(error, match="because"):
        reply.raise_for_status()
    if error is not PeerLost:
        assert Reply.to_error(7, error("because")) == reply


def test_an_accepting_reply_raises_nothing():
    Reply.unpack(Reply(7, Status.OK).pack()).raise_for_status()


def test_checksum_is_over_the_pieces_in_order():
    data = bytes(range(256)) * 5
    view = memoryview(data)
    assert checksum_of([view[:100], view[100:]]) == checksum_of([view])
    assert checksum_of([view[100:], view[:100]]) != checksum_of([view])
