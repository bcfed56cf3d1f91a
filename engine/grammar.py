"""Structured output: which tokens may come next, so that the whole output matches a grammar (llguidance).

`Grammars` compiles on a thread of its own and keeps what it has compiled. `Constraints` holds the state of the sequences that
run here, on the executor's thread. That state is a cache: it is rebuilt from the output tokens that every row under a
grammar brings, so a handoff, a resume or an eviction costs a replay and nothing else. Never raises into a step: what cannot
go on is told in the row's own output. Rows without a grammar cost nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InvalidRequest
from ..core.request import Attempt
from ..core.step import RowOutput, StepRow

if TYPE_CHECKING:  # imported by whoever compiles the first grammar: an engine that is asked for none runs without the library
    from llguidance import LLMatcher, LLTokenizer

MAX_COMPILED = 64  # grammars that are kept, the latest used
MAX_SEQUENCES = 1 << 10  # sequences whose state is kept, the latest used

Mask = NDArray[np.bool_]  # [V]: True for the tokens that are allowed


class Grammars:
    """The compiled grammars of one model. Safe to use from any thread.

    folder         of the model; its tokenizer.json is read when the first grammar comes
    vocab_size     V: the width of the model's logits
    eos_token_ids  tokens by which the model ends its answers
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._source = folder / "tokenizer.json"
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(token for token in eos_token_ids if token < vocab_size)
        self._tokenizer: LLTokenizer | None = None  # the compiling thread's
        self._lock = Lock()
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "grammar")

    def prepare(self, grammar: str) -> None:
        """Begin to compile, beside the steps: complex grammars take a second."""
        self._begin(grammar)

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of its output. Raises InvalidRequest; waits while it is being compiled."""
        return self._begin(grammar).result().deep_copy()

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _begin(self, grammar: str) -> Future[LLMatcher]:
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is None:
                compiled = self._compiled[grammar] = self._thread.submit(self._compile, grammar)
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            else:
                self._compiled.move_to_end(grammar)
            return compiled

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        if self._tokenizer is None:
            self._tokenizer = self._load()
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidRequest(f"the grammar cannot be compiled: {first_line(matcher.get_error())}")
        return matcher

    def _load(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if not self._source.is_file():
            raise InvalidRequest(f"structured output needs a tokenizer.json, and {self._source.parent} has none")
        if not self.eos_token_ids:
            raise InvalidRequest("structured output needs a model whose config names an eos_token_id, by which it ends")
        eos = list(self.eos_token_ids)
        try:
            try:
                return LLTokenizer(str(self._source), n_vocab=self.vocab_size, eos_token=eos)
            except ValueError:  # tokens beyond the model's logits
                return LLTokenizer(str(self._source), eos_token=eos)
        except ValueError as error:
            raise InvalidRequest(f"structured output cannot use {self._source}: {first_line(str(error))}") from error


class Constraints:
    """Where each sequence stands in its grammar. For one thread."""

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars
        self._states: OrderedDict[Attempt, _State] = OrderedDict()

    def masks(self, rows: Sequence[StepRow], last: Mapping[Attempt, int]) -> dict[int, Mask]:
        """What rows[i] may sample, for every i whose sequence has a grammar and can go on.

        `last` has the token sampled last for an attempt: a pending row was planned before it was known.
        """
        masks: dict[int, Mask] = {}
        for i, row in enumerate(rows):
            if row.sampling.grammar is not None:
                state = self._state(row, row.sampling.grammar, last)
                mask = state.mask(row.sampling.stop_token_ids)
                if mask is not None:
                    masks[i] = mask
        return masks

    def take(self, rows: Sequence[StepRow], outputs: Sequence[RowOutput]) -> list[RowOutput]:
        """The sampled tokens move their sequences on. Returns the outputs, with an error for each row that cannot go on."""
        return [
            output if row.sampling.grammar is None else self._states[row.attempt].take(output, row.sampling.stop_token_ids)
            for row, output in zip(rows, outputs, strict=True)
        ]

    def forget(self, attempt: Attempt) -> None:
        self._states.pop(attempt, None)

    def _state(self, row: StepRow, grammar: str, last: Mapping[Attempt, int]) -> _State:
        state = self._states.get(row.attempt)
        if state is None or state.num_tokens != row.output_index:
            state = self._states[row.attempt] = self._replayed(row, grammar, last)
            if len(self._states) > MAX_SEQUENCES:
                self._states.popitem(last=False)
        self._states.move_to_end(row.attempt)
        return state

    def _replayed(self, row: StepRow, grammar: str, last: Mapping[Attempt, int]) -> _State:
        """The state after the tokens that earlier attempts, or other workers, have sampled."""
        if self._grammars is None:
            return _State(None, (), error="this worker has no grammars")
        try:
            state = _State(self._grammars.matcher(grammar), self._grammars.eos_token_ids, self._grammars.vocab_size)
        except InvalidRequest as error:
            return _State(None, (), error=str(error))
        tokens = row.output
        if row.pending and len(tokens) == row.output_index - 1 and row.attempt in last:
            tokens += (last[row.attempt],)
        if len(tokens) != row.output_index:
            state.error = f"{row.output_index} tokens were sampled, but {len(tokens)} are known"
        for token in tokens:
            state.move(token, row.sampling.stop_token_ids)
        return state


@dataclass(slots=True)
class _State:
    """One sequence. `over` once a stop token has come: then only those may follow, until the scheduler has noticed."""

    matcher: LLMatcher | None
    eos: tuple[int, ...]
    vocab_size: int = 0
    num_tokens: int = 0
    over: bool = False
    error: str = ""

    def mask(self, stops: Sequence[int]) -> Mask | None:
        """None when it cannot go on: `error` says why."""
        if self.error or self.matcher is None:
            return None
        allowed = np.zeros(self.vocab_size, np.bool_)
        may_end = self.over
        if not self.over:
            bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
            if self.matcher.is_error():
                self.error = f"the output cannot go on under its grammar: {first_line(self.matcher.get_error())}"
                return None
            allowed = np.unpackbits(bits, count=self.vocab_size, bitorder="little").view(np.bool_)
            may_end = bool(allowed[list(self.eos)].any())
            allowed[list(self.eos)] = False  # only those EOS tokens end this sequence that are among its stop tokens
        if may_end:
            allowed[[token for token in stops if token < self.vocab_size]] = True
        if not allowed.any():
            self.error = "no token of the vocabulary can continue the output under its grammar, and no stop token can end it"
            return None
        return allowed

    def take(self, output: RowOutput, stops: Sequence[int]) -> RowOutput:
        for token in output.tokens:
            self.move(token, stops)
        return replace(output, tokens=(), logprobs=(), error=self.error) if self.error else output

    def move(self, token: int, stops: Sequence[int]) -> None:
        """One more token. Stop tokens are no part of the text that must match."""
        self.num_tokens += 1
        if self.error or self.matcher is None or self.over:
            return
        if token in stops:
            self.over = True
        elif not self.matcher.consume_token(token):
            self.error = f"token {token} does not match the grammar: {first_line(self.matcher.get_error())}"


def first_line(text: str) -> str:
    """The library adds the state of its parser to what went wrong."""
    return text.partition("\n")[0]
