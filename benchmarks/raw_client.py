"""A gRPC client that costs next to nothing: just as much HTTP/2 as it takes to keep server streams busy.

The router has one core and its clients share the other with the fake workers, so a client that cost as much per
message as the server would measure itself. It sends the same request over and over, prepared as bytes, and reads
the answers as protobuf messages. It must never be used for anything else: it knows one path, no TLS, no metadata.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from baton.proto import inference_pb2 as pb

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7, 0x8
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE = 0x1, 0x4
MAX_WINDOW = (1 << 31) - 1
DEFAULT_WINDOW = 65_535
LAGGING_WINDOW = 64  # bytes that a stream may send ahead to a client that lags: about a message of one token


@dataclass(slots=True)
class Answer:
    """One stream. Times are readings of the monotonic clock; `think` is what its worker reported as computing."""

    sent: float
    first: float = 0.0
    num_messages: int = 0
    think: float = 0.0
    finish: str = ""
    tokens: list[int] = field(default_factory=list)
    trailers: bytes = b""
    window: int = 0  # bytes that the server may send, where that is limited
    rest: bytes = b""  # of a message that is not complete yet


class Connection(asyncio.Protocol):
    """One connection. With a `lag`, every stream takes one message and then nothing for so many seconds."""

    def __init__(
        self,
        path: str,
        on_message: Callable[[int, int], None],
        on_end: Callable[[Connection, Answer], None],
        lag: float = 0.0,
    ) -> None:
        self._headers = _request_headers(path)
        self._on_message = on_message
        self._on_end = on_end
        self._window = LAGGING_WINDOW if lag else MAX_WINDOW
        self._lag = lag
        self._next_id = 1
        self._answers: dict[int, Answer] = {}
        self._unread = b""
        self._allowance = DEFAULT_WINDOW  # what the server lets us send
        self._consumed = 0
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()  # the server has said what it allows
        self.closed: asyncio.Future[None] = self._loop.create_future()

    def send(self, request: bytes) -> None:
        """Start one stream with `request`, a serialised message."""
        assert self._transport is not None
        body = b"\0" + len(request).to_bytes(4, "big") + request
        self._allowance -= len(body)
        if self._allowance < 0:
            raise RuntimeError("the server's flow-control window is used up: this client does not wait")
        number, self._next_id = self._next_id, self._next_id + 2
        self._answers[number] = Answer(time.monotonic(), window=self._window)
        headers = _frame(HEADERS, END_HEADERS, number, self._headers)
        self._transport.write(headers + _frame(DATA, END_STREAM, number, body))

    def close(self) -> None:
        """Streams that still run are cancelled by it."""
        if self._transport is not None:
            self._transport.close()

    # ---- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses
        settings = struct.pack(">HIHI", HEADER_TABLE_SIZE, 0, INITIAL_WINDOW_SIZE, self._window)
        grow = (MAX_WINDOW - DEFAULT_WINDOW).to_bytes(4, "big")
        transport.write(PREFACE + _frame(SETTINGS, 0, 0, settings) + _frame(WINDOW_UPDATE, 0, 0, grow))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        data = self._unread + data
        position, end = 0, len(data)
        while end - position >= 9:
            length = int.from_bytes(data[position : position + 3], "big")
            if end - position < 9 + length:
                break
            kind, flags = data[position + 3], data[position + 4]
            number = int.from_bytes(data[position + 5 : position + 9], "big")
            self._frame_received(kind, flags, number, data[position + 9 : position + 9 + length])
            position += 9 + length
        self._unread = data[position:]

    # ---- frames ----------------------------------------------------------------------------------

    def _frame_received(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == DATA:
            self._data(number, payload)
        elif kind == HEADERS and flags & END_STREAM:
            self._end(number, payload)
        elif kind == SETTINGS and not flags & ACK:
            self._write(_frame(SETTINGS, ACK, 0, b""))
            if not self.ready.done():
                self.ready.set_result(None)
        elif kind == PING and not flags & ACK:
            self._write(_frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE and number == 0:
            self._allowance += int.from_bytes(payload, "big")
        elif kind == RST_STREAM:
            self._end(number, b"reset")
        elif kind == GOAWAY:
            self.close()

    def _data(self, number: int, payload: bytes) -> None:
        answer = self._answers.get(number)
        self._consumed += len(payload)
        if self._consumed > 1 << 24:
            self._open(0, self._consumed)
            self._consumed = 0
        if answer is None:
            return
        data = answer.rest + payload if answer.rest else payload
        position = 0
        while len(data) - position >= 5:
            length = int.from_bytes(data[position + 1 : position + 5], "big")
            if len(data) - position < 5 + length:
                break
            self._message(answer, data[position + 5 : position + 5 + length])
            position += 5 + length
        answer.rest = rest = data[position:]
        if self._lag:
            answer.window -= len(payload)
            if len(rest) >= 5:
                self._open(number, 5 + int.from_bytes(rest[1:5], "big") - len(rest) - answer.window)
            elif position:
                self._loop.call_later(self._lag, self._reopen, number)

    def _message(self, answer: Answer, data: bytes) -> None:
        message = pb.GenerateResponse.FromString(data)
        if not answer.first:
            answer.first = time.monotonic()
        answer.num_messages += 1
        answer.tokens.extend(message.token_ids)
        if message.finish_reason:
            answer.finish = message.finish_reason
            answer.think = message.stages.prefill
        self._on_message(len(message.token_ids), len(data))

    def _end(self, number: int, trailers: bytes) -> None:
        answer = self._answers.pop(number, None)
        if answer is not None:
            answer.trailers = trailers
            self._on_end(self, answer)

    def _reopen(self, number: int) -> None:
        answer = self._answers.get(number)
        if answer is not None:
            self._open(number, self._window - answer.window)

    def _open(self, number: int, num_bytes: int) -> None:
        """Let the server send `num_bytes` more; on one stream, or number 0: on all together."""
        if num_bytes > 0:
            if number:
                self._answers[number].window += num_bytes
            self._write(_frame(WINDOW_UPDATE, 0, number, num_bytes.to_bytes(4, "big")))

    def _write(self, frame: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)


def _frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + number.to_bytes(4, "big") + payload


def _request_headers(path: str) -> bytes:
    """HPACK (RFC 7541): two entries of the static table, the rest as literals that nobody has to remember."""

    def literal(index: int, value: str) -> bytes:
        prefix = bytes((index,)) if index < 15 else bytes((15, index - 15))
        return prefix + bytes((len(value),)) + value.encode()

    method_post, scheme_http = b"\x83", b"\x86"
    trailers = b"\x00\x02te" + bytes((len("trailers"),)) + b"trailers"
    return method_post + scheme_http + literal(4, path) + literal(1, "localhost") + literal(31, "application/grpc") + trailers
