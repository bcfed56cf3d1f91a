"""What every transport makes of a ticket and a copy plan before it pushes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..core.errors import TransferRefused
from ..core.kv import Endpoint
from .ticket import Ticket
from .transport import Copy, Header, Note


def header_of(ticket: Ticket, note: Note) -> Header:
    """How a push under `ticket` names itself."""
    return Header(ticket.attempt, ticket.source, ticket.target, ticket.generation, note)


def only_endpoint(ticket: Ticket, copies: Sequence[Copy]) -> Endpoint:
    """The endpoint of a worker with one rank. Raises TransferRefused for more ranks, at either end."""
    if len(ticket.endpoints) != 1 or any(copy.source_rank or copy.target_rank for copy in copies):
        raise TransferRefused(
            f"ticket for {ticket.attempt}: this transport moves KV between workers of one rank, not to {len(ticket.endpoints)}"
        )
    return ticket.endpoints[0]


def runs_of(copies: Sequence[Copy]) -> tuple[tuple[int, int], ...]:
    """Where the bytes go: (offset in the target pool, number of bytes)."""
    return tuple((copy.target_offset, copy.num_bytes) for copy in copies)


def cut_runs(copies: Sequence[Copy], num_bytes: int) -> Iterator[Copy]:
    """The same bytes in runs of at most `num_bytes`."""
    for copy in copies:
        for start in range(0, copy.num_bytes, num_bytes):
            length = min(num_bytes, copy.num_bytes - start)
            yield Copy(copy.source_offset + start, copy.target_offset + start, length)


def cut(copies: Sequence[Copy], num_bytes: int) -> Iterator[list[Copy]]:
    """The same bytes in portions of `num_bytes` (the last may be smaller), cutting runs where one is full."""
    portion: list[Copy] = []
    room = num_bytes
    for copy in copies:
        start = 0
        while start < copy.num_bytes:
            length = min(room, copy.num_bytes - start)
            portion.append(Copy(copy.source_offset + start, copy.target_offset + start, length))
            start, room = start + length, room - length
            if room == 0:
                yield portion
                portion, room = [], num_bytes
    if portion:
        yield portion
