"""A closed loop against one colocated engine in virtual time: `concurrency` clients, each with one request at a time.

What published measurements of serving systems are made with. Requests are all alike, so that a step is a few additions: the
running ones are told by the step at which they end. Lengths of outputs scatter a little, as otherwise requests that began in one
step would end in one step for ever, which real clients and their network do not let them do.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass

from baton.core.shape import StepShape
from baton.simulator.shape import StepCost


@dataclass(frozen=True, slots=True)
class Engine:
    """How an engine batches.

    chunk          tokens of a step at most
    prefill_first  steps are either prompts or decode rows, prompts first; else both share a step
    kv_tokens      of its cache; a request starts when its prompt and `reserve` of its output fit
    max_seqs       rows at most
    spread         output lengths lie within this share around their mean
    request        seconds from a client to the queue and back, beside the steps
    """

    cost: StepCost
    kv_tokens: int
    chunk: int = 8192
    prefill_first: bool = False
    max_seqs: int = 1024
    request: float = 0.0
    reserve: float = 1.0
    spread: float = 0.0


def closed_loop(engine: Engine, concurrency: int, isl: int, osl: int, waves: int) -> tuple[float, float]:
    """Mean TTFT and mean TPOT over `waves` requests of each client."""
    loop = _Loop(engine, concurrency, isl, osl, waves)
    while loop.step():
        pass
    done = loop.first_tokens
    return sum(first - arrival for arrival, first, _ in done) / len(done) + engine.request, sum(t for _, _, t in done) / len(done)


class _Loop:
    """Clients, a queue, a batch. Times in seconds; `steps` counts steps in which decode rows ran."""

    def __init__(self, engine: Engine, concurrency: int, isl: int, osl: int, waves: int) -> None:
        self._engine, self._isl, self._osl = engine, isl, osl
        self._now = 0.0
        self._left = concurrency * (waves - 1)
        self._waiting: deque[float] = deque([0.0] * concurrency)  # arrivals
        self._begun: deque[list[float]] = deque()  # [arrival, tokens of the prompt still to feed]
        self._draw = random.Random(0)
        self._running: list[
            tuple[int, float, float, int]
        ] = []  # (step after which it ends, arrival, first token, tokens), a heap
        self._steps = 0
        self._context = 0  # tokens in the cache of running requests
        self._most = max(1, min(engine.max_seqs, int(engine.kv_tokens / (isl + engine.reserve * osl))))
        self.first_tokens: list[tuple[float, float, float]] = []  # arrival, first token, TPOT

    def step(self) -> bool:
        """One step, or many decode steps at once. False when there is nothing left."""
        while self._waiting and self._waiting[0] <= self._now and len(self._begun) + len(self._running) < self._most:
            self._begun.append([self._waiting.popleft(), float(self._isl)])
        if not self._begun:
            if self._running:
                self._decode()
            elif self._waiting:
                self._now = max(self._now, self._waiting[0])
            return bool(self._running or self._waiting)
        rows = 0 if self._engine.prefill_first else len(self._running)
        self._prefill(rows)
        return True

    def _decode(self) -> None:
        """Until a request ends, or one that has room comes."""
        rows, steps = len(self._running), self._running[0][0] - self._steps
        price = self._engine.cost.decode_seconds
        seconds = price(rows, self._context + rows, steps)
        if self._waiting and rows < self._most and self._now + seconds > self._waiting[0]:
            steps = max(1, min(steps, round(steps * (self._waiting[0] - self._now) / seconds + 0.5)))
            seconds = price(rows, self._context + rows, steps)
        self._now += seconds
        self._advance(rows, steps)

    def _prefill(self, rows: int) -> None:
        """A step of as many prompt tokens as it takes, with `rows` decode rows beside them."""
        budget = self._engine.chunk - rows
        tokens = pairs = context = fed_rows = sampled = 0
        ended = []
        for prompt in self._begun:
            if budget <= 0:
                break
            fed = int(min(budget, prompt[1]))
            start = self._isl - int(prompt[1])
            prompt[1] -= fed
            budget -= fed
            tokens += fed
            pairs += fed * start + fed * (fed + 1) // 2
            context += start + fed
            fed_rows += 1
            if prompt[1] == 0:
                ended.append(prompt[0])
                sampled += 1
        shape = StepShape(fed_rows, tokens, pairs, context, rows, self._context + rows if rows else 0, sampled + rows)
        self._now += self._engine.cost.seconds(shape)
        if rows:
            self._advance(rows, 1)
        for arrival in ended:
            self._begun.popleft()
            spread = self._engine.spread
            length = max(2, round(self._osl * self._draw.uniform(1 - spread, 1 + spread))) if spread else self._osl
            heapq.heappush(self._running, (self._steps + length - 1, arrival, self._now, length))
            self._context += self._isl

    def _advance(self, rows: int, steps: int) -> None:
        self._steps += steps
        self._context += rows * steps
        while self._running and self._running[0][0] <= self._steps:
            _, arrival, first, length = heapq.heappop(self._running)
            self._context -= self._isl + length - 1
            self.first_tokens.append((arrival, first, (self._now - first) / (length - 1)))
            if self._left:
                self._left -= 1
                self._waiting.append(self._now + self._engine.request)
