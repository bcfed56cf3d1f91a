"""The response parser: any cut of the bytes gives the same events."""

from __future__ import annotations

from itertools import pairwise

import pytest
from baton.bench.sse import BadResponse, EventSplitter, ResponseParser
from hypothesis import given
from hypothesis import strategies as st

EVENTS = [b'{"choices":[{"text":"a\\n\\nb"}]}', b"{}", b"x" * 300, b"[DONE]"]
BODY = b": a comment\n\n" + b"".join(b"data: " + event + b"\n\n" for event in EVENTS)


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(f"{len(piece):X};ext=1\r\n".encode() + piece + b"\r\n" for piece in pieces) + b"0\r\n\r\n"


def events_of(stream: bytes, cuts: list[int]) -> tuple[ResponseParser, list[bytes]]:
    parser, splitter = ResponseParser(), EventSplitter()
    bounds = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    events = []
    for start, end in pairwise(bounds):
        if end > start:
            events += splitter.feed(parser.feed(stream[start:end]))
    return parser, events


@given(cuts=st.lists(st.integers(0, 10_000), max_size=30), size=st.integers(1, 400), crlf=st.booleans())
def test_chunked_streams_survive_every_cut(cuts: list[int], size: int, crlf: bool) -> None:
    body = BODY.replace(b"\n", b"\r\n") if crlf else BODY
    head = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nServer: x\r\nTransfer-Encoding:  Chunked\r\n\r\n"
    parser, events = events_of(head + chunked(body, size), cuts)
    assert events == EVENTS
    assert parser.status == 200
    assert parser.complete


@given(cuts=st.lists(st.integers(0, 10_000), max_size=10))
def test_a_body_with_a_length_ends_there(cuts: list[int]) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
    parser, events = events_of(head + BODY + b"data: beyond\n\n", cuts)
    assert events == EVENTS
    assert parser.complete


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    parser, events = events_of(b"HTTP/1.0 200 OK\r\n\r\n" + BODY, [40])
    assert events == EVENTS
    assert not parser.complete
    assert parser.end()


@pytest.mark.parametrize("stream", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc"])
def test_a_connection_that_closes_early_is_no_proper_end(stream: bytes) -> None:
    parser = ResponseParser()
    parser.feed(stream)
    assert not parser.end()


def test_an_unfinished_chunked_body_is_no_proper_end() -> None:
    parser, _ = events_of(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(BODY, 50)[:-5], [])
    assert not parser.end()


@pytest.mark.parametrize(
    "stream",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"x" * 70_000,
    ],
)
def test_what_is_no_http_is_refused(stream: bytes) -> None:
    with pytest.raises(BadResponse):
        ResponseParser().feed(stream)


def test_events_with_a_name_or_several_lines() -> None:
    assert EventSplitter().feed(b"event: x\ndata: 1\ndata: 2\nid: 4\n\nretry: 5\n\n") == [b"1\n2"]
