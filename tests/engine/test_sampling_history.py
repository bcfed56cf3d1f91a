"""Scheduler and executor together: what was sampled before counts the same wherever, and however often, a sequence runs.

Every way in which a sequence can be disturbed is compared, token by token, with a run that was not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
from baton.core.errors import InternalError
from baton.core.request import Attempt, SamplingParams, SequenceSpec, TokenLogprob
from baton.core.step import ComputedEvent, PreemptedEvent, RowNeeds, SequenceEvent, StepOutput, StepPlan, StepRow, TokenEvent
from baton.engine import row_sampler as row_sampler_module
from baton.engine.batching import KNOWN
from baton.engine.blocks import BlockPool
from baton.engine.cache import kv_layout, kv_tensor
from baton.engine.executor import TorchExecutor
from baton.engine.loader import load_model
from baton.engine.model.interface import CausalModel
from baton.engine.random_model import Shape, make_model
from baton.engine.scheduler import Scheduler, SchedulerConfig
from baton.policy.ordering import ORDERING
from torch import Tensor

BLOCK = 8
SHAPE = Shape(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=48, vocab_size=300, head_dim=16)
PROMPT = tuple(3 + i * 7 % 50 for i in range(21))
PENALISED = SamplingParams(
    max_tokens=40,
    seed=7,
    temperature=0.9,
    min_p=0.02,
    presence_penalty=0.3,
    frequency_penalty=0.4,
    repetition_penalty=1.1,
    logit_bias=tuple((token, 3.0) for token in range(20, 28)),  # so that tokens come again
    bad_words=((22,), (20, 21), (21, 20), (24, 25, 26)),
)
GREEDY = replace(PENALISED, temperature=0.0)
KINDS = pytest.mark.parametrize("params", [PENALISED, GREEDY], ids=["sampled", "greedy"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    out: Path = tmp_path_factory.mktemp("model")
    make_model(out, SHAPE, dtype="float32", max_model_len=128, seed=5)
    return load_model(out, "float32")


@dataclass
class Worker:
    """A scheduler and an executor, driven as the engine's loop drives them: `depth` plans at a time."""

    scheduler: Scheduler
    pool: BlockPool
    executor: TorchExecutor
    kv: Tensor
    depth: int
    plans: list[StepPlan] = field(default_factory=list)
    tokens: dict[Attempt, list[int]] = field(default_factory=dict)
    of_prompts: dict[Attempt, list[tuple[TokenLogprob, ...]]] = field(default_factory=dict)
    logprobs: dict[Attempt, list[TokenLogprob]] = field(default_factory=dict)
    preempted: list[Attempt] = field(default_factory=list)
    computed: dict[Attempt, ComputedEvent] = field(default_factory=dict)
    in_flight: deque[tuple[StepPlan, Future[StepOutput]]] = field(default_factory=deque)

    def add(self, spec: SequenceSpec) -> None:
        self.tokens[spec.attempt] = list(spec.output)
        self.of_prompts[spec.attempt] = []
        self.logprobs[spec.attempt] = []
        self.scheduler.add(spec, 0.0)

    def run(self, max_steps: int = 1000) -> None:
        """Until nothing is left to do."""
        for _ in range(max_steps):
            plan = self.scheduler.plan(0.0) if len(self.in_flight) < self.depth else None
            self._take(self.scheduler.take_events())
            if plan is not None:
                self.plans.append(plan)
                self.in_flight.append((plan, self.executor.submit(plan)))
            elif self.in_flight:
                oldest, future = self.in_flight.popleft()
                self._take(self.scheduler.commit(oldest, future.result(30), 0.0))
            else:
                return
        raise AssertionError("no end")

    def _take(self, events: list[SequenceEvent]) -> None:
        for event in events:
            if isinstance(event, TokenEvent):
                assert event.position == len(self.tokens[event.attempt])
                self.tokens[event.attempt] += event.tokens
                self.of_prompts[event.attempt].append(event.prompt_logprobs)
                self.logprobs[event.attempt] += event.logprobs
                if event.finish is not None:
                    self.executor.forget(event.attempt)
            elif isinstance(event, PreemptedEvent):
                self.executor.forget(event.attempt)
                self.preempted.append(event.attempt)
            elif isinstance(event, ComputedEvent):
                self.computed[event.attempt] = event


@contextmanager
def worker(model: CausalModel, num_blocks: int = 40, depth: int = 1, **config: object) -> Iterator[Worker]:
    layout = kv_layout(model.config, BLOCK, "float32")
    kv = kv_tensor(bytearray(num_blocks * layout.block_bytes), layout, num_blocks)
    pool = BlockPool(num_blocks, BLOCK)
    limits: dict[str, object] = {"max_step_tokens": 64, "max_num_seqs": 8, "max_model_len": 128, "watermark": 0.0}
    scheduler = Scheduler(pool, SchedulerConfig(**(limits | config)), ORDERING["fcfs"])  # type: ignore[arg-type]
    executor = TorchExecutor(model, kv, layout)
    made = Worker(scheduler, pool, executor, kv, depth)
    try:
        yield made
        scheduler.check()
    finally:
        executor.close()


def spec(
    params: SamplingParams, output: tuple[int, ...] = (), name: str = "a", number: int = 1, hand_over: bool = False
) -> SequenceSpec:
    return SequenceSpec(Attempt(name, number), PROMPT, params, output, hand_over=hand_over)


def undisturbed(model: CausalModel, params: SamplingParams) -> list[int]:
    with worker(model) as alone:
        alone.add(spec(params))
        alone.run()
        return alone.tokens[Attempt("a", 1)]


@KINDS
def test_every_parameter_shapes_the_output(model: CausalModel, params: SamplingParams) -> None:
    expected = undisturbed(model, params)
    assert len(expected) == 40
    for neutral in (
        {"presence_penalty": 0.0},
        {"frequency_penalty": 0.0},
        {"repetition_penalty": 1.0},
        {"logit_bias": ()},
        {"bad_words": ()},
    ):
        assert undisturbed(model, replace(params, **neutral)) != expected, neutral
    pairs = list(pairwise(expected))
    assert 22 not in expected
    assert (20, 21) not in pairs
    assert (21, 20) not in pairs
    assert max(expected.count(token) for token in expected) > 1


@KINDS
def test_planning_ahead_changes_nothing(model: CausalModel, params: SamplingParams) -> None:
    with worker(model, depth=2) as ahead:
        ahead.add(spec(params))
        ahead.run()
    assert any(row.pending for plan in ahead.plans for row in plan.rows)
    assert ahead.tokens[Attempt("a", 1)] == undisturbed(model, params)


@KINDS
@pytest.mark.parametrize("depth", [1, 2])
def test_preemption_changes_nothing(model: CausalModel, params: SamplingParams, depth: int) -> None:
    """Four sequences that together need twice the pool: they are preempted and start over, again and again."""
    each = [replace(params, seed=seed) for seed in range(4)]
    expected = [undisturbed(model, one) for one in each]
    with worker(model, num_blocks=14, depth=depth) as crowded:
        for seed, one in enumerate(each):
            crowded.add(spec(one, name=str(seed)))
        crowded.run()
    assert [crowded.tokens[Attempt(str(seed), 1)] for seed in range(4)] == expected
    histories = [row for plan in crowded.plans for row in plan.rows if row.needs is not None and row.needs.history is not None]
    assert len(histories) > 4  # the history was brought again after each new start
    assert any(row.output_index > 0 for row in histories)


@KINDS
def test_a_resume_elsewhere_changes_nothing(model: CausalModel, params: SamplingParams) -> None:
    expected = undisturbed(model, params)
    for known in (1, 13, 39):
        with worker(model, depth=2) as second:
            second.add(spec(params, tuple(expected[:known]), number=2))
            second.run()
        assert second.tokens[Attempt("a", 2)] == expected


@KINDS
def test_a_returned_preemption_changes_nothing(model: CausalModel, params: SamplingParams) -> None:
    each = [replace(params, seed=seed) for seed in range(3)]
    with worker(model, num_blocks=14, depth=2, return_preempted=True) as crowded:
        for seed, one in enumerate(each):
            crowded.add(spec(one, name=str(seed)))
        crowded.run()
        for attempt in crowded.preempted:
            resumed = Attempt(attempt.request_id, 2)
            one = each[int(attempt.request_id)]
            crowded.add(spec(one, tuple(crowded.tokens[attempt]), attempt.request_id, 2))
            crowded.run()
            assert crowded.tokens[resumed] == undisturbed(model, one)
    assert crowded.preempted


@KINDS
def test_a_handoff_changes_nothing(model: CausalModel, params: SamplingParams) -> None:
    expected = undisturbed(model, params)
    asked = replace(params, prompt_logprobs=0)
    with worker(model, max_step_tokens=9) as prefill, worker(model, depth=2) as decode:
        prefill.add(spec(asked, hand_over=True))
        prefill.run()
        attempt = Attempt("a", 1)
        assert len(prefill.of_prompts[attempt][0]) == len(PROMPT) - 1
        assert prefill.tokens[attempt] == expected[:1]
        held = prefill.computed[attempt].blocks
        blocks = decode.pool.allocate(len(held) + 1)
        assert blocks is not None
        decode.kv[list(blocks[: len(held)])] = prefill.kv[list(held)]
        decode.tokens[attempt], decode.of_prompts[attempt], decode.logprobs[attempt] = expected[:1], [], []
        decode.scheduler.adopt(spec(asked), blocks, expected[0], 0.0)
        decode.run()
        prefill.scheduler.release(attempt)
    assert decode.tokens[attempt] == expected
    assert set(decode.of_prompts[attempt]) == {()}


def test_the_history_comes_once_and_its_state_goes_with_the_sequence(model: CausalModel) -> None:
    with worker(model, max_step_tokens=16) as once:
        once.add(spec(PENALISED))
        once.add(spec(SamplingParams(max_tokens=5), name="plain"))
        once.run()
        needs = [row.needs for plan in once.plans for row in plan.rows if row.attempt.request_id == "a"]
        assert needs[:2] == [None, RowNeeds(PROMPT)]  # two chunks
        assert set(needs[2:]) == {KNOWN}
        assert all(row.needs is None for plan in once.plans for row in plan.rows if row.attempt.request_id == "plain")
        once.executor.submit(StepPlan(999, ())).result(30)  # what was to be forgotten is
        assert once.executor._sampler._shapers == {}


def test_a_row_without_its_history_is_refused(model: CausalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sampler_module, "MAX_SHAPERS", 2)

    def step(name: str, needs: RowNeeds) -> StepOutput:
        row = StepRow(Attempt(name, 1), 0, PROMPT, (0, 1, 2), GREEDY, 0, True, needs=needs)
        return bounded.executor.submit(StepPlan(1, (row,))).result(30)

    with worker(model) as bounded:
        with pytest.raises(InternalError, match="a#1 is sampled by its tokens"):
            step("a", KNOWN)
        for name in "abc":
            step(name, RowNeeds(PROMPT))
        assert step("c", KNOWN).rows[0].tokens
        with pytest.raises(InternalError, match="a#1"):  # the oldest was dropped, and does not go on without it
            step("a", KNOWN)


# ---- log probabilities of the prompt ---------------------------------------------------------------


def exact_logprobs(model: CausalModel) -> list[TokenLogprob]:
    """From one pass over the whole prompt."""
    layout = kv_layout(model.config, BLOCK, "float32")
    executor = TorchExecutor(model, kv_tensor(bytearray(8 * layout.block_bytes), layout, 8), layout)
    asked = SamplingParams(prompt_logprobs=3)
    row = StepRow(Attempt("x", 1), 0, PROMPT, (4, 2, 1), asked, 0, False, needs=RowNeeds(targets=PROMPT[1:]))
    entries = executor.submit(StepPlan(1, (row,))).result(30).rows[0].prompt_logprobs
    executor.close()
    return list(entries)


def assert_close(entries: tuple[TokenLogprob, ...], exact: list[TokenLogprob]) -> None:
    assert [entry.token for entry in entries] == list(PROMPT[1:])
    for entry, wanted in zip(entries, exact, strict=True):
        assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)
        assert [value for _, value in entry.top] == pytest.approx([value for _, value in wanted.top], abs=1e-4)


def test_prompt_logprobs_are_the_models(model: CausalModel) -> None:
    exact = exact_logprobs(model)
    assert sum(len(entry.top) == 3 for entry in exact) == len(PROMPT) - 1
    with worker(model) as alone:
        for length in range(1, len(PROMPT)):  # each foretold by what lies before it
            alone.add(SequenceSpec(Attempt(str(length), 1), PROMPT[:length], SamplingParams(max_tokens=1, logprobs=20)))
        alone.run()
    for length in range(1, len(PROMPT)):
        (sampled,) = alone.logprobs[Attempt(str(length), 1)]
        assert [value for _, value in sampled.top[:3]] == pytest.approx([value for _, value in exact[length - 1].top], abs=1e-4)
        if PROMPT[length] in dict(sampled.top):
            assert dict(sampled.top)[PROMPT[length]] == pytest.approx(exact[length - 1].logprob, abs=1e-4)


@pytest.mark.parametrize("config", [{}, {"max_step_tokens": 5}, {"depth": 2, "max_step_tokens": 7}])
def test_prompt_logprobs_survive_chunks_and_the_prefix_cache(model: CausalModel, config: dict[str, int]) -> None:
    asked = SamplingParams(max_tokens=3, prompt_logprobs=3)
    with worker(model, **config) as warm:  # type: ignore[arg-type]
        warm.add(spec(SamplingParams(max_tokens=1), name="before"))
        warm.run()  # the prompt is in the prefix cache now
        warm.add(spec(asked))
        warm.add(spec(SamplingParams(max_tokens=1), name="after"))
        warm.run()
    first, *others = warm.of_prompts[Attempt("a", 1)]
    assert_close(first, exact_logprobs(model))
    assert set(others) == {()}
    starts = {row.attempt.request_id: row.start for plan in reversed(warm.plans) for row in plan.rows}
    assert (starts["a"], starts["after"]) == (0, 16)


def test_prompt_logprobs_are_reported_once_however_often_a_sequence_starts_over(model: CausalModel) -> None:
    asked = SamplingParams(max_tokens=40, prompt_logprobs=3)
    exact = exact_logprobs(model)
    with worker(model, num_blocks=14, depth=2, max_step_tokens=16) as crowded:
        for seed in range(4):
            crowded.add(spec(replace(asked, seed=seed), name=str(seed)))
        crowded.run()
    for entries in crowded.of_prompts.values():
        assert_close(entries[0], exact)
        assert set(entries[1:]) == {()}
    with worker(model) as resumed:  # the client of an attempt that goes on has them already
        resumed.add(spec(asked, (4, 5), number=2))
        resumed.run()
    assert set(resumed.of_prompts[Attempt("a", 2)]) == {()}


def test_reports_are_shared_out_over_steps(model: CausalModel) -> None:
    """A step computes few rows of logits, whoever asks; plain sequences are not held up."""
    asked = SamplingParams(max_tokens=2, prompt_logprobs=3)
    exact = exact_logprobs(model)
    with worker(model, max_reported=6) as shared:
        for name in "abc":
            shared.add(spec(asked, name=name))
        shared.add(spec(SamplingParams(max_tokens=2), name="plain"))
        shared.run()
    for name in "abc":
        assert_close(shared.of_prompts[Attempt(name, 1)][0], exact)
    reported = [sum(len(row.needs.targets) for row in plan.rows if row.needs is not None) for plan in shared.plans]
    assert max(reported) == 6
    assert sum(reported) == 3 * (len(PROMPT) - 1)
    assert any(row.attempt.request_id == "plain" and row.sample for row in shared.plans[0].rows)


def test_a_prompt_of_one_token_has_nothing_to_report(model: CausalModel) -> None:
    with worker(model) as alone:
        alone.add(SequenceSpec(Attempt("a", 1), (7,), SamplingParams(max_tokens=2, prompt_logprobs=2)))
        alone.run()
    assert set(alone.of_prompts[Attempt("a", 1)]) == {()}
