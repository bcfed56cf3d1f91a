"""How one message of the side channel between two workers looks on the wire.

::

    4 bytes   length of the head, big endian
    4 bytes   xxh32 of the head, big endian
    head      msgpack
    payload   raw bytes (only CHUNK and JOIN have any)

Requests (source -> target): CHUNK carries bytes of a push, WRITTEN says that some of its bytes lie in the
target's memory, PLACED that all of it is there, STOP promises that nothing is written any more. JOIN invites the target into a
process group, over which COMING says some bytes are sent next. The target answers PLACED, STOP and JOIN, and whatever it
refuses, with a Reply.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import msgpack
import xxhash

from ..core.errors import PeerLost, TransferDamaged, TransferError, TransferRefused
from ..core.request import Attempt, WorkerRef
from .transport import Header, Note

METHOD_SERVICE = "baton.v1.KvPeer"
METHOD_NAME = "Transfer"
CHUNK_BYTES = 256 << 10  # larger messages cost gRPC twice the CPU per byte: each is then mapped and faulted in afresh
_PREFIX = 8

Runs = tuple[tuple[int, int], ...]  # (offset in the target pool, number of bytes)


class Kind(IntEnum):
    """What a request is."""

    CHUNK = 1
    WRITTEN = 2
    PLACED = 3
    STOP = 4
    JOIN = 5
    COMING = 6


class Status(IntEnum):
    """How the target answered."""

    OK = 0
    REFUSED = 1
    DAMAGED = 2
    LOST = 3


@dataclass(frozen=True, slots=True)
class Request:
    """One message of the source.

    number    of the push or stop, unique per stream; the reply carries it
    header    names the ticket; a STOP uses only its `source` and `attempt`
    runs      where the bytes belong (CHUNK, COMING) or lie (WRITTEN, PLACED), in the order of the checksum
    checksum  xxh3_64 over the bytes of `runs`; None when there are none or checksums are switched off
    """

    kind: Kind
    number: int
    header: Header
    runs: Runs = ()
    checksum: int | None = None

    def pack(self, payload: Iterable[memoryview] = ()) -> bytes:
        """As one frame. The payload is copied exactly once."""
        header, note = self.header, self.header.note
        head: bytes = msgpack.packb(
            (
                self.kind,
                self.number,
                (header.attempt.request_id, header.attempt.number),
                (header.source.worker_id, header.source.epoch),
                (header.target.worker_id, header.target.epoch),
                header.generation,
                (note.first_block, note.num_blocks, note.last, note.first_token),
                self.runs,
                self.checksum,
            )
        )
        return b"".join((_prefix(head), head, *payload))

    @classmethod
    def unpack(cls, frame: bytes) -> tuple[Request, memoryview]:
        """The request and its payload. Raises TransferDamaged when the frame is not one."""
        head, payload = _split(frame)
        try:
            kind, number, attempt, source, target, generation, note, runs, checksum = msgpack.unpackb(head, use_list=False)
            header = Header(Attempt(*attempt), WorkerRef(*source), WorkerRef(*target), generation, Note(*note))
            return cls(Kind(kind), number, header, runs, checksum), payload
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise TransferDamaged(f"a head of {len(head)} bytes cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class Reply:
    """One message of the target."""

    number: int
    status: Status
    reason: str = ""

    def pack(self) -> bytes:
        head: bytes = msgpack.packb((self.number, self.status, self.reason))
        return _prefix(head) + head

    @classmethod
    def unpack(cls, frame: bytes) -> Reply:
        """Raises TransferDamaged when the frame is not a reply."""
        head, _ = _split(frame)
        try:
            number, status, reason = msgpack.unpackb(head)
            return cls(number, Status(status), reason)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise TransferDamaged(f"a reply of {len(head)} bytes cannot be read: {error}") from error

    @classmethod
    def to_error(cls, number: int, error: TransferError) -> Reply:
        """The reply that makes the source raise `error`."""
        return cls(number, Status.DAMAGED if isinstance(error, TransferDamaged) else Status.REFUSED, str(error))

    def raise_for_status(self) -> None:
        """Raise what went wrong at the target."""
        match self.status:
            case Status.OK:
                return
            case Status.DAMAGED:
                raise TransferDamaged(self.reason)
            case Status.LOST:
                raise PeerLost(self.reason)
            case Status.REFUSED:
                raise TransferRefused(self.reason)


def checksum_of(pieces: Iterable[memoryview]) -> int:
    """xxh3_64 over the bytes of `pieces` in order."""
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


def _prefix(head: bytes) -> bytes:
    return len(head).to_bytes(4, "big") + xxhash.xxh32_intdigest(head).to_bytes(4, "big")


def _split(frame: bytes) -> tuple[memoryview, memoryview]:
    view = memoryview(frame)
    length = int.from_bytes(view[:4], "big")
    head = view[_PREFIX : _PREFIX + length]
    if len(head) < length or xxhash.xxh32_intdigest(head) != int.from_bytes(view[4:_PREFIX], "big"):
        raise TransferDamaged(f"a frame of {len(frame)} bytes has a damaged head")
    return head, view[_PREFIX + length :]
