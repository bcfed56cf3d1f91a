"""Every error that Baton raises on purpose, as one tree.

::

    BatonError
    ├── InvalidRequest        the client asked for something impossible       gRPC INVALID_ARGUMENT    HTTP 400
    ├── ModelNotFound         the client named a model that is not served     gRPC NOT_FOUND           HTTP 404
    ├── Overloaded            shed at admission, before any work              gRPC RESOURCE_EXHAUSTED  HTTP 429
    ├── DeadlineExceeded      the client's or a stage's deadline passed       gRPC DEADLINE_EXCEEDED   HTTP 504
    ├── Cancelled             the client went away or asked for an abort      gRPC CANCELLED           HTTP 499
    ├── Unavailable           no worker can take the request                  gRPC UNAVAILABLE         HTTP 503
    ├── InternalError         a rule of the house was broken                  gRPC INTERNAL            HTTP 500
    ├── TopologyError         a topology file that cannot be deployed         (command line)
    ├── ModelError            a model directory that cannot be loaded         (command line)
    └── TransferError         KV bytes did not arrive
        ├── TransferRefused   the receiver said no: stale epoch, ticket or generation
        ├── TransferDamaged   a checksum did not match
        └── PeerLost          the connection to the other end broke

A message says what was wrong, where, and what would be right.
"""

from __future__ import annotations


class BatonError(Exception):
    """Root of the tree."""

    code = "internal"


class InvalidRequest(BatonError):
    """The request can never be served as it stands; `field` names the offending field."""

    code = "invalid_argument"

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ModelNotFound(BatonError):
    """The named model is not the one this cluster serves."""

    code = "not_found"


class Overloaded(BatonError):
    """Shed at admission. `retry_after` is the number of seconds after which a retry is sensible."""

    code = "resource_exhausted"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(BatonError):
    """A deadline passed before the request finished."""

    code = "deadline_exceeded"


class Cancelled(BatonError):
    """The client cancelled or disconnected."""

    code = "cancelled"


class Unavailable(BatonError):
    """Nobody can serve the request now; a retry may succeed."""

    code = "unavailable"


class InternalError(BatonError):
    """An invariant of Baton was broken; a bug."""

    code = "internal"


class TopologyError(BatonError):
    """A topology that cannot be deployed. The message lists every problem with file, line and key."""

    code = "invalid_argument"


class ModelError(BatonError):
    """A model directory that is missing, damaged or of an unsupported kind."""

    code = "invalid_argument"


class TransferError(BatonError):
    """KV bytes did not arrive."""

    code = "unavailable"


class TransferRefused(TransferError):
    """The receiver holds no such ticket (expired, cancelled, other epoch or generation)."""


class TransferDamaged(TransferError):
    """Bytes arrived but their checksum differs."""


class PeerLost(TransferError):
    """The connection to the other worker broke during a transfer."""
