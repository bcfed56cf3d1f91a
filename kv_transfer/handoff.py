"""The handoff of a sequence from a prefill to a decode worker: one state machine at each end, no I/O.

::

    Sender (prefill worker)                       Receiver (decode worker)
    Opened                                        ReserveAsked -> waits for blocks, or
    Computed, Computed, ...                       Grant(ticket)
    Granted(ticket)  <--------- router ------------'
    Push(note) ------------- transport ---------> check(header), Landed(header)
    PushDone <---------- acknowledgement ---------'
    Push(last note) -----------------------------> Landed -> Adopt
    PushDone -> Unpin, HandedOver

Who owns what: the sender's blocks are pinned from `Opened` until `Unpin`. The receiver's blocks belong to a
ticket from `Grant` until `Adopt`, release, or the end of their quarantine. One-sided writes cannot be refused,
so a source must ask (any push does) before its first write under a ticket; once the receiver has agreed, only
`SourceStopped` or `SourceGone` ends the quarantine of a ticket that dies.
"""

from .handoff_events import (
    Adopt,
    Cancelled,
    Computed,
    Damaged,
    Fail,
    FirstToken,
    Grant,
    Granted,
    HandedOver,
    Landed,
    LeaseRenewed,
    Opened,
    Push,
    PushDone,
    PushFailed,
    ReceiverAction,
    ReceiverEvent,
    ReserveAsked,
    RoomFreed,
    SenderAction,
    SenderEvent,
    SendStop,
    SourceGone,
    SourceStopped,
    TargetGone,
    Tick,
    Unpin,
)
from .receiver import Receiver
from .sender import Sender

__all__ = [
    "Adopt",
    "Cancelled",
    "Computed",
    "Damaged",
    "Fail",
    "FirstToken",
    "Grant",
    "Granted",
    "HandedOver",
    "Landed",
    "LeaseRenewed",
    "Opened",
    "Push",
    "PushDone",
    "PushFailed",
    "Receiver",
    "ReceiverAction",
    "ReceiverEvent",
    "ReserveAsked",
    "RoomFreed",
    "SendStop",
    "Sender",
    "SenderAction",
    "SenderEvent",
    "SourceGone",
    "SourceStopped",
    "TargetGone",
    "Tick",
    "Unpin",
]
