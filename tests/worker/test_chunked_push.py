"""KV leaves chunk by chunk while later chunks of the prompt are still being computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from baton.core.view import Role
from baton.kv_transfer.ticket import Ticket
from baton.kv_transfer.transport import Copy, Note, TransferStats
from baton.proto import worker_pb2 as pb
from baton.tests.worker.test_handoff_live import hand_over

NUM_PROMPT = 100


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_blocks_are_pushed_before_the_last_chunk_is_computed(
    rig: Any, make_spec: Callable[..., pb.SequenceSpec], monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    prefill = await rig.start(Role.PREFILL, transport=transport, max_step_tokens=16, step_delay=0.02)
    decode = await rig.start(Role.DECODE, transport=transport)
    member = rig.members["prefill-0"]
    push, acknowledged = member._transports[transport].push, list[tuple[Note, int]]()

    async def watched(copies: Sequence[Copy], ticket: Ticket, note: Note) -> TransferStats:
        stats: TransferStats = await push(copies, ticket, note)
        acknowledged.append((note, member.engine.scheduler.info(ticket.attempt).num_computed))
        return stats

    monkeypatch.setattr(member._transports[transport], "push", watched)
    await hand_over(prefill, decode, make_spec("r", NUM_PROMPT))
    await decode.finished("r")
    early = [note for note, num_computed in acknowledged if num_computed < NUM_PROMPT and not note.last]
    assert sum(note.num_blocks for note in early) >= 3
    last, _ = acknowledged[-1]
    assert last.last
    assert last.num_blocks <= 2
