"""A closed loop against one colocated engine in virtual time: `concurrency` clients, each with one request at a time.

What published measurements of serving systems are made with: all clients begin at once, and each sends its next request when the
last one has ended. Decode rows are told by the step at which they end, so that steps in which nothing else happens are taken
many at a time. Requests that end within a moment of each other come back together and share a step: with lengths all alike
such groups last, with lengths that scatter they dissolve.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from baton.core.shape import StepShape
from baton.simulator.shape import StepCost

KEPT_APART = 16  # tokens of a known prompt that are computed again


@dataclass(frozen=True, slots=True)
class Engine:
    """How an engine batches.

    chunk          tokens of a step at most
    whole          prompts are fed whole: one that no longer fits into a step waits for the next
    prefill_first  steps are either prompts or decode rows, prompts first; else both share a step
    kv_tokens      of its cache; a request starts when its prompt and `reserve` of its output fit beside those that run
    max_seqs       rows at most
    gather_steps   decode steps for which waiting prompts are held back, unless they fill `gather` of a step
    request        seconds from a client to the queue, beside the steps
    """

    cost: StepCost
    kv_tokens: int
    chunk: int = 8192
    whole: bool = False
    prefill_first: bool = False
    max_seqs: int = 1024
    request: float = 0.0
    reserve: float = 1.0
    gather_steps: int = 0
    gather: float = 1.0


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients ask for: `waves` requests each, lengths drawn between `shortest` of the nominal ones and these. `cached`:
    the engine keeps all prompts from earlier requests but for their last block."""

    concurrency: int
    isl: int
    osl: int
    waves: int
    shortest: float = 1.0
    cached: bool = False


class _Running(NamedTuple):
    """A row, ordered by the step after which it ends; `number` makes equal ones comparable."""

    ends: int
    number: int
    first: float
    isl: int
    osl: int


@dataclass(slots=True)
class _Prompt:
    sent: float
    arrival: float
    isl: int
    osl: int
    fed: int = 0


def closed_loop(engine: Engine, load: Load) -> tuple[float, float]:
    """Mean TTFT and mean TPOT over all requests."""
    loop = _Loop(engine, load)
    while loop.step():
        pass
    return loop.ttft_sum / loop.num_first, loop.tpot_sum / loop.num_ended


class _Loop:
    """Clients, a queue, a batch. Times in seconds; `steps` counts steps in which decode rows ran."""

    def __init__(self, engine: Engine, load: Load) -> None:
        self._engine, self._load = engine, load
        self._draw = random.Random(0)
        self._now = 0.0
        self._left = load.concurrency * (load.waves - 1)
        self._waiting = deque(self._request(0.0) for _ in range(load.concurrency))
        self._begun: deque[_Prompt] = deque()
        self._running: list[_Running] = []
        self._number = 0
        self._steps = 0
        self._context = 0  # tokens in the cache of running requests
        self._reserved = 0.0  # tokens for which room is kept, of all that have begun
        self._held = 0  # steps for which prompts have been held back
        self.ttft_sum = self.tpot_sum = 0.0
        self.num_first = self.num_ended = 0

    def step(self) -> bool:
        """One step, or many decode steps at once. False when there is nothing left."""
        self._begin()
        if self._begun and not self._hold_back():
            self._prefill(0 if self._engine.prefill_first else len(self._running))
        elif self._running:
            self._decode()
        elif self._waiting:
            self._now = max(self._now, self._waiting[0].arrival)
        else:
            return False
        return True

    def _begin(self) -> None:
        engine = self._engine
        while self._waiting and self._waiting[0].arrival <= self._now:
            prompt = self._waiting[0]
            wanted = self._room(prompt.isl, prompt.osl)
            others = len(self._begun) + len(self._running)
            if others and (others >= engine.max_seqs or self._reserved + wanted > engine.kv_tokens):
                return
            self._reserved += wanted
            self._begun.append(self._waiting.popleft())

    def _hold_back(self) -> bool:
        """Whether waiting prompts go on waiting for others to come."""
        engine = self._engine
        fresh = sum(prompt.isl - prompt.fed for prompt in self._begun) + len(self._running)
        if not self._running or self._held >= engine.gather_steps or fresh >= engine.gather * engine.chunk:
            self._held = 0
            return False
        self._held += 1
        return True

    def _decode(self) -> None:
        """Until a request ends, or one comes that has room."""
        rows, steps = len(self._running), self._running[0].ends - self._steps
        price = self._engine.cost.decode_seconds
        if self._begun:
            steps = 1
        seconds = price(rows, self._context + rows, steps)
        if self._waiting and self._now < self._waiting[0].arrival < self._now + seconds:
            steps = max(1, min(steps, round(steps * (self._waiting[0].arrival - self._now) / seconds + 0.5)))
            seconds = price(rows, self._context + rows, steps)
        self._now += seconds
        self._advance(rows, steps)

    def _prefill(self, rows: int) -> None:
        """A step of as many prompt tokens as it takes, with `rows` decode rows beside them."""
        budget = max(1, self._engine.chunk - rows)
        tokens = pairs = context = fed_rows = 0
        ended = []
        for prompt in self._begun:
            left = prompt.isl - prompt.fed
            fed = min(budget, left)
            if fed <= 0 or (fed < left and self._engine.whole and fed_rows):
                break
            if self._engine.whole:
                fed = left
            pairs += fed * prompt.fed + fed * (fed + 1) // 2
            prompt.fed += fed
            budget -= fed
            tokens += fed
            context += prompt.fed
            fed_rows += 1
            if prompt.fed == prompt.isl:
                ended.append(prompt)
        shape = StepShape(fed_rows, tokens, pairs, context, rows, self._context + rows if rows else 0, len(ended) + rows)
        self._now += self._engine.cost.seconds(shape)
        if rows:
            self._advance(rows, 1)
        for prompt in ended:
            self._begun.popleft()
            self._start(prompt)

    def _start(self, prompt: _Prompt) -> None:
        self.ttft_sum += self._now - prompt.sent
        self.num_first += 1
        self._number += 1
        row = _Running(self._steps + prompt.osl - 1, self._number, self._now, prompt.isl, prompt.osl)
        heapq.heappush(self._running, row)
        self._context += prompt.isl

    def _advance(self, rows: int, steps: int) -> None:
        self._steps += steps
        self._context += rows * steps
        while self._running and self._running[0].ends <= self._steps:
            row = heapq.heappop(self._running)
            self._context -= row.isl + row.osl - 1
            self._reserved -= self._room(row.isl, row.osl)
            self.tpot_sum += (self._now - row.first) / (row.osl - 1)
            self.num_ended += 1
            if self._left:
                self._left -= 1
                self._waiting.append(self._request(self._now))

    def _request(self, sent: float) -> _Prompt:
        shortest = self._load.shortest
        isl, osl = (
            nominal if shortest == 1.0 else round(nominal * self._draw.uniform(shortest, 1.0))
            for nominal in (self._load.isl, self._load.osl)
        )
        known = max(0, isl - KEPT_APART) if self._load.cached else 0
        return _Prompt(sent, sent + self._engine.request, isl, max(2, osl), known)

    def _room(self, isl: int, osl: int) -> float:
        return isl + self._engine.reserve * osl
