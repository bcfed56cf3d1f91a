"""The permission to land KV in reserved blocks of a decode worker."""

from __future__ import annotations

from dataclasses import dataclass

import msgpack

from ..core.errors import TransferRefused
from ..core.kv import Endpoint, KVLayout
from ..core.request import Attempt, WorkerRef


@dataclass(frozen=True, slots=True)
class Ticket:
    """Issued by the decode worker (`target`) to one prefill worker (`source`).

    blocks      the decode worker's blocks for the prompt, in order; KV of tokens
                [i * block_size, (i + 1) * block_size) belongs in blocks[i]
    num_held    leading blocks whose KV the decode worker already holds: never written to
    num_tokens  tokens whose KV is to land (prompt and the output of earlier attempts)
    generation  unique per decode worker life; a ticket that expired never becomes valid again
    lease       seconds the ticket lives without being renewed
    endpoints   one per rank of the decode worker
    """

    attempt: Attempt
    source: WorkerRef
    target: WorkerRef
    blocks: tuple[int, ...]
    num_held: int
    num_tokens: int
    generation: int
    lease: float
    endpoints: tuple[Endpoint, ...]

    def pack(self) -> bytes:
        """As bytes for the wire (msgpack)."""
        endpoints = [
            (e.worker.worker_id, e.worker.epoch, e.address, e.host, e.shm_path, e.num_blocks, _layout_fields(e.layout), e.handle)
            for e in self.endpoints
        ]
        fields = (
            (self.attempt.request_id, self.attempt.number),
            (self.source.worker_id, self.source.epoch),
            (self.target.worker_id, self.target.epoch),
            self.blocks,
            self.num_held,
            self.num_tokens,
            self.generation,
            self.lease,
            endpoints,
        )
        packed: bytes = msgpack.packb(fields)
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Ticket:
        """The inverse of `pack`. Raises TransferRefused when `data` is not a ticket."""
        try:
            attempt, source, target, blocks, num_held, num_tokens, generation, lease, endpoints = msgpack.unpackb(
                data, use_list=False
            )
            return cls(
                Attempt(*attempt),
                WorkerRef(*source),
                WorkerRef(*target),
                tuple(blocks),
                num_held,
                num_tokens,
                generation,
                lease,
                tuple(
                    Endpoint(WorkerRef(w, ep), address, host, path, n, KVLayout(*layout), handle)
                    for w, ep, address, host, path, n, layout, handle in endpoints
                ),
            )
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise TransferRefused(f"these {len(data)} bytes are not a ticket: {error}") from error


def _layout_fields(layout: KVLayout) -> tuple[int | str, ...]:
    return (
        layout.num_layers,
        layout.num_kv_heads,
        layout.head_dim,
        layout.block_size,
        layout.dtype,
        layout.first_layer,
        layout.first_head,
    )
