"""A device that computes nothing and checks everything: the oracle of the scheduler's tests.

Its KV memory holds, in every slot, a digest of all tokens up to and including the slot's own. So whether a row
reads the right KV can be checked slot by slot: a block that was freed too early, a wrong prefix hit, a stale
table or a token in the wrong place all show as a digest that is not the expected one. The token that a request
samples as output k depends on the request and k alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

from baton.core.request import Attempt, FinishReason, SamplingParams, SequenceSpec, TokenLogprob
from baton.core.step import RowNeeds, RowOutput, StepOutput, StepPlan, StepRow
from baton.engine.blocks import BlockPool

VOCABULARY = 7


def token_of(request_id: str, output_index: int) -> int:
    """The token that a request samples, whatever happens to it."""
    return crc32(f"{request_id}/{output_index}".encode()) % VOCABULARY


def expected_end(
    request_id: str, prompt: Sequence[int], sampling: SamplingParams, max_model_len: int
) -> tuple[list[int], FinishReason]:
    """The whole output of a request and why it ends, by the rules as a client knows them."""
    output: list[int] = []
    while True:
        output.append(token_of(request_id, len(output)))
        if output[-1] in sampling.stop_token_ids and len(output) >= sampling.min_tokens:
            return output, FinishReason.STOP
        if len(output) == sampling.max_tokens or len(prompt) + len(output) == max_model_len:
            return output, FinishReason.LENGTH


@dataclass
class _Submitted:
    plan: StepPlan
    generations: list[dict[int, int]]  # per row: block -> its generation when the plan was made
    output: StepOutput | None = None


@dataclass
class FakeDevice:
    """Runs submitted plans in order, as late as somebody wants; `landed` plays the worker that sends KV."""

    pool: BlockPool
    prompts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    num_fed: int = 0

    def __post_init__(self) -> None:
        self._memory: list[list[int | None]] = [[None] * self.pool.block_size for _ in range(self.pool.num_blocks)]
        self._submitted: deque[_Submitted] = deque()
        self._last_step = 0
        self._last_token: dict[Attempt, tuple[int, int]] = {}  # step, token
        self._failed: set[Attempt] = set()
        self._known: dict[Attempt, int] = {}  # output tokens that an executor knows for the attempt

    def knows(self, spec: SequenceSpec) -> None:
        """Tell the device of a sequence's prompt, against which it checks every token it is fed."""
        self.prompts[spec.attempt.request_id] = spec.prompt

    def landed(self, request_id: str, blocks: Sequence[int], num_tokens: int, num_held: int = 0) -> None:
        """Another worker has written the KV of the first `num_tokens` tokens into `blocks`, all but the first `num_held`."""
        for position, digest in enumerate(self._digests(request_id, num_tokens)):
            if position // self.pool.block_size >= num_held:
                self._write(blocks, position, digest)

    def submit(self, plan: StepPlan) -> None:
        """Take a plan; it runs no earlier than now and no later than when `output` is asked for."""
        assert plan.step == self._last_step + 1, f"step {plan.step} follows step {self._last_step}"
        assert plan.rows, "an empty plan"
        assert len({row.attempt for row in plan.rows}) == len(plan.rows), f"two rows of one sequence: {plan}"
        self._last_step = plan.step
        generations = [{block: self.pool.generation(block) for block in row.block_table} for row in plan.rows]
        self._submitted.append(_Submitted(plan, generations))

    def run_one(self) -> None:
        """Run the oldest plan that has not run."""
        for submitted in self._submitted:
            if submitted.output is None:
                rows = [self._run(row, submitted) for row in submitted.plan.rows]
                submitted.output = StepOutput(submitted.plan.step, tuple(rows))
                return

    def output(self) -> StepOutput:
        """The output of the oldest plan, which is forgotten. No block it used may have changed hands meanwhile."""
        submitted = self._submitted[0]
        if submitted.output is None:
            self.run_one()
        assert submitted.output is not None
        self._check_untouched(submitted)
        self._submitted.popleft()
        return submitted.output

    def drop(self) -> None:
        """The oldest plan fails. What it wrote, if it wrote at all, nobody may rely on."""
        submitted = self._submitted.popleft()
        self._check_untouched(submitted)
        for row in submitted.plan.rows:
            self._failed.add(row.attempt)
            self._spoil(row)

    def check_holds(self, request_id: str, blocks: Sequence[int], num_tokens: int) -> None:
        """Assert that `blocks` hold the KV of the request's first `num_tokens` tokens."""
        for position, digest in enumerate(self._digests(request_id, num_tokens)):
            found = self._memory[blocks[position // self.pool.block_size]][position % self.pool.block_size]
            assert found == digest, f"{request_id}: block {blocks[position // self.pool.block_size]} is wrong at {position}"

    # ---- inside --------------------------------------------------------------------------------

    def _spoil(self, row: StepRow) -> None:
        for position in range(row.start, row.end):
            self._write(row.block_table, position, None)

    def _run(self, row: StepRow, submitted: _Submitted) -> RowOutput:
        if row.attempt in self._failed:  # planned ahead of the failure: must be discarded
            self._spoil(row)
            return RowOutput((0,) if row.sample else ())
        request_id, prompt = row.attempt.request_id, self.prompts[row.attempt.request_id]
        table = row.block_table
        assert len(set(table)) == len(table), f"a block twice in one table: {row}"
        assert len(table) * self.pool.block_size >= row.end, f"the table does not cover the row: {row}"
        tokens = row.tokens
        if row.pending:
            step, token = self._last_token[row.attempt]
            assert step == submitted.plan.step - 1, f"{row} is pending, but was last sampled in step {step}"
            assert not tokens, f"a pending row with tokens: {row}"
            tokens = (token,)
        assert tokens == tuple(self._tokens(request_id, row.end)[row.start :]), f"wrong tokens fed: {row}"
        self.check_holds(request_id, table, row.start)
        published = self.pool.snapshot().hashed
        for position, digest in list(enumerate(self._digests(request_id, row.end)))[row.start :]:
            assert table[position // self.pool.block_size] not in published, f"writes to a published block: {row}"
            self._write(table, position, digest)
        self.num_fed += len(tokens)
        of_prompt = self._check_needs(row)
        if not row.sample:
            return RowOutput(prompt_logprobs=of_prompt)
        assert row.output_index == row.end - len(prompt), f"wrong output index: {row}"
        token = token_of(request_id, row.output_index)
        self._last_token[row.attempt] = (submitted.plan.step, token)
        return RowOutput((token,), prompt_logprobs=of_prompt)

    def _check_needs(self, row: StepRow) -> tuple[TokenLogprob, ...]:
        """What an executor would make of the row's needs: it must know every token before it samples by them."""
        needs = row.needs or RowNeeds()
        request_id, prompt = row.attempt.request_id, self.prompts[row.attempt.request_id]
        if row.sampling.shaped and row.sample:
            if needs.history is None:
                assert row.needs is not None, f"the executor is not told that it must know the tokens: {row}"
                assert self._known[row.attempt] == row.output_index, f"the executor has not seen every token: {row}"
            else:
                assert needs.history == tuple(self._tokens(request_id, row.end)), f"a wrong history: {row}"
            self._known[row.attempt] = row.output_index + 1
        else:
            assert needs.history is None, f"a history that nobody needs: {row}"
        expected = () if row.sampling.prompt_logprobs is None else prompt[row.start + 1 : row.end + 1]
        assert needs.targets == (expected if needs.targets else ()), f"other tokens follow in the prompt: {row}"
        return tuple(TokenLogprob(token, -1.0) for token in needs.targets)

    def _check_untouched(self, submitted: _Submitted) -> None:
        for row, generations in zip(submitted.plan.rows, submitted.generations, strict=True):
            for block, generation in generations.items():
                assert self.pool.generation(block) == generation, f"block {block} changed hands under {row}"
                assert self.pool.references(block) > 0, f"block {block} was freed under {row}"

    def _tokens(self, request_id: str, num_tokens: int) -> list[int]:
        prompt = self.prompts[request_id]
        output = [token_of(request_id, index) for index in range(num_tokens - len(prompt))]
        return [*prompt, *output][:num_tokens]

    def _digests(self, request_id: str, num_tokens: int) -> list[int]:
        digests = []
        digest = 0
        for token in self._tokens(request_id, num_tokens):
            digest = hash((digest, token))
            digests.append(digest)
        return digests

    def _write(self, blocks: Sequence[int], position: int, digest: int | None) -> None:
        self._memory[blocks[position // self.pool.block_size]][position % self.pool.block_size] = digest
