"""One mixed worker without sockets or processes: the text that every cluster must reproduce, token for token."""

from __future__ import annotations

from collections.abc import Sequence

from baton.core.request import Attempt, SamplingParams, SequenceSpec
from baton.core.step import TokenEvent
from baton.core.topology import KvTransferSpec, ModelSpec, PoolSpec, WorkerConfig
from baton.core.view import Role
from baton.tests.cluster.live_cluster import MODEL
from baton.worker.build import build_engine


class Solo:
    """Serves one sequence after the other, undisturbed; remembers what it has served."""

    def __init__(self) -> None:
        pool = PoolSpec(Role.MIXED, block_size=16, kv_memory_bytes=24 << 20, prefix_cache=False)
        config = WorkerConfig("solo", "solo", ModelSpec(str(MODEL), dtype="float32"), pool, KvTransferSpec(), "")
        self._engine = build_engine(config)
        self._served: dict[tuple[tuple[int, ...], SamplingParams], tuple[int, ...]] = {}

    def tokens(self, prompt: Sequence[int], max_tokens: int, **sampling: float) -> tuple[int, ...]:
        """The tokens of a sequence that ignores EOS."""
        params = SamplingParams(**{"temperature": 0.0, **sampling}, max_tokens=max_tokens)  # type: ignore[arg-type]
        key = (tuple(prompt), params)
        if key not in self._served:
            self._served[key] = self._serve(*key)
        return self._served[key]

    def close(self) -> None:
        self._engine.close()

    def _serve(self, prompt: tuple[int, ...], params: SamplingParams) -> tuple[int, ...]:
        scheduler, tokens, finished = self._engine.scheduler, list[int](), False
        scheduler.add(SequenceSpec(Attempt("solo", len(self._served)), prompt, params), 0.0)
        while not finished:
            plan = scheduler.plan(0.0)
            assert plan is not None
            for event in scheduler.commit(plan, self._engine.executor.submit(plan).result(), 0.0):
                assert isinstance(event, TokenEvent)
                tokens += event.tokens
                finished = event.finish is not None
        return tuple(tokens)
