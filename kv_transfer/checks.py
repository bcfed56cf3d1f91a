"""What every transport makes of a ticket before it pushes."""

from __future__ import annotations

from collections.abc import Sequence

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
