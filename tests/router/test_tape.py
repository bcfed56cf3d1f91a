"""Packing events and actions, and the comparison of a replay."""

from __future__ import annotations

from pathlib import Path

import pytest
from baton.core.errors import InternalError
from baton.core.request import Attempt, Request, SamplingParams, WorkerRef
from baton.core.slo import Slo
from baton.core.view import Role, WorkerLoad
from baton.router import events as ev
from baton.router.tape import TapeWriter, pack, read_tape, replay

WORKER, ATTEMPT = WorkerRef("p0", 1 << 60), Attempt("r", 3)
REQUEST = Request("r", (1, 2), SamplingParams(stop_token_ids=(7,), logprobs=None), 1.5, Slo(0.1, 0.2), deadline=9.0)
ENTRIES: list[tuple[ev.Event, list[ev.Action]]] = [
    (ev.Arrived(1.5, REQUEST, 0.25), [ev.SendReserve(WORKER, ATTEMPT, WORKER), ev.SetTimer(ev.Timer("deadline", "r"), 9.0)]),
    (ev.WorkerJoined(2.0, WORKER, Role.DECODE, 32, 100), []),
    (ev.WorkerReported(2.0, WORKER, WorkerLoad(step=3, in_step=True)), [ev.SendRenew(WORKER, (ATTEMPT, ATTEMPT))]),
    (ev.Granted(3.0, WORKER, ATTEMPT, b"\x00ticket"), [ev.SendGrant(WORKER, ATTEMPT, b"\x00ticket")]),
    (ev.TimerFired(4.0, ev.Timer("stage", "r", 3, "prefill")), [ev.Complete("r", "unavailable", "gone", 0.5)]),
]


class Scripted:
    """Answers as the tape says, but for one entry."""

    def __init__(self, wrong: int | None = None) -> None:
        self._entries = iter(enumerate(ENTRIES))
        self._wrong = wrong

    def handle(self, event: ev.Event) -> list[ev.Action]:
        number, (expected, actions) = next(self._entries)
        assert event == expected
        return [] if number == self._wrong else actions


def test_round_trip_keeps_values_and_types(tmp_path: Path) -> None:
    writer = TapeWriter(tmp_path / "tape")
    for event, actions in ENTRIES:
        writer(event, actions)
    writer.close()
    entries = list(read_tape(tmp_path / "tape"))
    assert entries == ENTRIES
    assert entries == list(read_tape(b"".join(pack(event, actions) for event, actions in ENTRIES)))
    joined = entries[1][0]
    assert isinstance(joined, ev.WorkerJoined)
    assert joined.role is Role.DECODE


def test_replay_finds_the_first_mismatch() -> None:
    assert replay(ENTRIES, Scripted()) is None
    mismatch = replay(ENTRIES, Scripted(wrong=2))
    assert mismatch is not None
    assert (mismatch.index, mismatch.recorded, mismatch.replayed) == (2, ENTRIES[2][1], [])


def test_unknown_values_are_refused() -> None:
    with pytest.raises(InternalError, match="complex"):
        pack(ev.Cancelled(1.0, 1j), [])
