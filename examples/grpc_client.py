"""Talk to a running Baton over gRPC: `python examples/grpc_client.py [host:port]` (default 127.0.0.1:8900)."""

from __future__ import annotations

import sys

from baton.client.client import Client


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8900"
    with Client(address) as client:
        model = client.model()
        print(f"{model.name}: {model.vocab_size} tokens, up to {model.max_model_len} per sequence\n")

        for chunk in client.stream([{"role": "user", "content": "What does str.join do?"}], max_tokens=60, temperature=0.0):
            print(chunk.text, end="", flush=True)
            if chunk.stages is not None:
                last = chunk
        stages, usage = last.stages, last.usage
        print(
            f"\n\n{usage.completion_tokens} tokens, {last.finish_reason}: first token after "
            f"{1000 * (stages.queue + stages.prefill):.0f} ms, handed over in {1000 * stages.handoff:.1f} ms"
        )

        for worker in client.load().workers:
            print(f"{worker.worker_id}: {worker.free_blocks} of {worker.total_blocks} blocks free")


if __name__ == "__main__":
    main()
