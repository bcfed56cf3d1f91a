"""Structured output in the engine: what may be sampled, and that no handoff, resume, preemption or eviction changes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from baton.core.errors import InvalidRequest
from baton.core.request import Attempt, FinishReason, SamplingParams, SequenceSpec
from baton.core.step import ComputedEvent, FailedEvent, RowOutput, SequenceEvent, StepPlan, StepRow, TokenEvent
from baton.engine import grammar as grammar_module
from baton.engine.blocks import BlockPool
from baton.engine.cache import kv_layout, kv_tensor
from baton.engine.executor import TorchExecutor
from baton.engine.grammar import Constraints, Grammars
from baton.engine.loader import load_model
from baton.engine.model.interface import CausalModel
from baton.engine.sampler import sample
from baton.engine.scheduler import Scheduler, SchedulerConfig
from baton.policy.ordering import ORDERING
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from tokenizers import Tokenizer

MODEL = Path(__file__).resolve().parents[2] / "examples" / "model" / "pydoc-llama"
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
VOCABULARY, EOS = 4096, (1, 4)
BLOCK, NUM_BLOCKS = 8, 64
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["list", "dict", "tuple"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 3},
        "ordered": {"type": "boolean"},
    },
    "required": ["kind", "sizes", "ordered"],
    "additionalProperties": False,
}
JSON = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA), defaults={"whitespace_flexible": False})
GREEDY = SamplingParams(temperature=0.0, max_tokens=80, stop_token_ids=EOS, grammar=JSON)
SEEDED = replace(GREEDY, temperature=1.5, seed=11, top_p=0.95)
PROMPT = tuple(TOKENIZER.encode("Return a list of the names of the entries").ids)


def regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


TOO_COMPLEX = regex("(a?){3000}a{3000}")


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False).ids)


def text_of(tokens: Sequence[int]) -> str:
    text: str = TOKENIZER.decode(list(tokens), skip_special_tokens=True)
    return text


def row(
    grammar: str | None, output: tuple[int, ...] = (), name: str = "r", index: int | None = None, **params: object
) -> StepRow:
    """A row that samples output token `index`; the last of the tokens before it may not be known yet."""
    sampling = replace(SamplingParams(stop_token_ids=EOS, grammar=grammar), **params)  # type: ignore[arg-type]
    pending = index is not None and index != len(output)
    at = len(output) if index is None else index
    return StepRow(Attempt(name, 1), at, () if pending else (5,), (0,), sampling, at, True, pending=pending, output=output)


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    made = Grammars(MODEL, VOCABULARY, EOS)
    yield made
    made.close()


def allowed(constraints: Constraints, asked: StepRow, last: int | None = None) -> set[str]:
    """The texts of the tokens that a row may sample."""
    mask = constraints.masks([asked], {} if last is None else {asked.attempt: last})[0]
    return {TOKENIZER.decode([token], skip_special_tokens=False) for token in mask.nonzero()[0].tolist()}


# ---- masks --------------------------------------------------------------------------------------------


def test_only_what_can_still_match_is_allowed(grammars: Grammars) -> None:
    constraints = Constraints(grammars)
    grammar = regex("(yes|no)!")
    assert allowed(constraints, row(grammar)) <= {"y", "ye", "yes", "n", "no", "no!", "yes!"}
    assert "n" in allowed(constraints, row(grammar))
    assert "!" in allowed(constraints, row(grammar, ids("no")))
    assert allowed(constraints, row(grammar, ids("no!"))) == {"<|eos|>", "<|end|>"}  # it can only end
    assert allowed(constraints, row(grammar, ids("no!"), stop_token_ids=(4,))) == {"<|end|>"}


def test_stop_tokens_are_allowed_where_the_output_matches(grammars: Grammars) -> None:
    constraints, digits = Constraints(grammars), regex("[0-9]{2,4}")
    may_end = [bool({"<|eos|>"} & allowed(constraints, row(digits, ids("1") * count))) for count in (1, 2, 3)]
    assert may_end == [False, True, True]
    assert "<|eos|>" not in allowed(constraints, row(digits, ids("11"), stop_token_ids=(9,)))  # the client has put it off


def test_rows_without_a_grammar_have_no_mask(grammars: Grammars) -> None:
    constraints = Constraints(grammars)
    rows = [row(None, name="a"), row(regex("x+"), name="b"), row(None, name="c")]
    assert list(constraints.masks(rows, {})) == [1]
    outputs = [RowOutput((token,)) for token in (7, *ids("x"), 8)]
    assert constraints.take(rows, outputs) == outputs


def test_the_state_is_a_cache_of_the_output(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """Advanced token by token, replayed at once, or evicted in between: the same masks."""
    text = ids('{"kind":"list","sizes":[1,2],"ordered":true}')
    walked = Constraints(grammars)
    monkeypatch.setattr(grammar_module, "MAX_SEQUENCES", 2)
    evicted = Constraints(grammars)
    for count, token in enumerate(text):
        asked = row(JSON, text[:count])
        masks = [each.masks([asked], {})[0] for each in (walked, Constraints(grammars), evicted)]
        assert all((mask == masks[0]).all() for mask in masks)
        walked.take([asked], [RowOutput((token,))])
        for name in "xyz":
            evicted.masks([row(regex("x*"), name=name)], {})
        assert len(evicted._states) == 2


def test_pending_rows_know_the_token_before_them(grammars: Grammars) -> None:
    """A plan made ahead of the commit: the last token is the executor's, whether or not the state is still there."""
    first, second = row(regex("(ab|cd)e")), row(regex("(ab|cd)e"), (), index=1)
    for forget in (False, True):
        constraints, (token,) = Constraints(grammars), ids("c")
        constraints.masks([first], {})
        constraints.take([first], [RowOutput((token,))])
        if forget:
            constraints.forget(first.attempt)
        assert allowed(constraints, second, last=token) <= {"d", "de"}


def test_what_cannot_go_on_is_told_in_its_own_row(grammars: Grammars, tmp_path: Path) -> None:
    without, no_end = Grammars(tmp_path, VOCABULARY, EOS), Grammars(MODEL, VOCABULARY, ())
    cases = [
        (grammars, row('start: "a" (('), "cannot be compiled"),
        (grammars, row(regex("a"), ids("b")), "does not match"),
        (grammars, row(regex("a"), ids("a"), stop_token_ids=()), "no stop token can end it"),
        (grammars, row(regex("a"), (), index=3), "3 tokens were sampled, but 0 are known"),
        (without, row(regex("a")), f"{tmp_path} has none"),
        (no_end, row(regex("a")), "eos_token_id"),
        (None, row(regex("a")), "no grammars"),
    ]
    for known, asked, words in cases:
        constraints = Constraints(known)
        other = row(regex("x"), name="other")
        masks = constraints.masks([asked, other], {})
        assert 0 not in masks, words
        answer, rest = constraints.take([asked, other], [RowOutput((5,)), RowOutput(ids("x"))])
        assert words in answer.error
        assert "\n" not in answer.error
        assert answer.tokens == ()
        assert bool(rest.tokens) is (known is grammars)  # the neighbour goes on
    with pytest.raises(InvalidRequest):
        grammars.matcher('start: "a" ((')
    for each in (without, no_end):
        each.close()


def test_what_turns_out_too_complex_ends_with_an_error(grammars: Grammars) -> None:
    constraints, asked = Constraints(grammars), row(TOO_COMPLEX)
    constraints.masks([asked], {})
    (answer,) = constraints.take([asked], [RowOutput(ids("a"))])
    assert "too many expressions" in answer.error
    again = row(TOO_COMPLEX, index=1)  # planned ahead; what it says is thrown away
    assert constraints.masks([again], {again.attempt: ids("a")[0]}) == {}


def test_compiled_grammars_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Grammars(MODEL, VOCABULARY, EOS)
    monkeypatch.setattr(grammar_module, "MAX_COMPILED", 2)
    for pattern in ("a", "b", "a", "c"):
        made.prepare(regex(pattern))
    kept = [made._compiled[regex(pattern)] for pattern in ("a", "c")]
    assert len(made._compiled) == 2
    made.prepare(regex("a"))
    assert made._compiled[regex("a")] is kept[0]
    made.close()


# ---- sampling -----------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    pattern=st.sampled_from(["(red|green|blue)", "[0-9]{1,3}-[a-f]{2}", "é[😀🙂]{1,2}", r"\{( ?[0-9],){2,3}\}"]),
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 0.3, 2.0]),
)
def test_random_logits_write_what_matches(grammars: Grammars, pattern: str, seed: int, temperature: float) -> None:
    constraints, generator = Constraints(grammars), torch.Generator().manual_seed(seed)
    output: tuple[int, ...] = ()
    while not output or output[-1] not in EOS:
        assert len(output) < 40
        asked = row(regex(pattern), output, temperature=temperature, seed=seed, top_k=40, top_p=0.9)
        logits = torch.randn(1, VOCABULARY, generator=generator) * 4
        (made,) = constraints.take([asked], sample(logits, [asked], constraints.masks([asked], {})))
        output += made.tokens
    assert re.fullmatch(pattern, text_of(output))


def test_a_grammar_wins_over_other_bans_and_leaves_logprobs_alone(grammars: Grammars) -> None:
    constraints, asked = Constraints(grammars), row(regex("a"), temperature=0.0, logprobs=1, logit_bias=((*ids("a"), -100.0),))
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    raw = torch.log_softmax(logits, -1)[0]
    (made,) = sample(logits.clone(), [asked], constraints.masks([asked], {}))
    assert made.tokens == ids("a")
    assert made.logprobs[0].logprob == pytest.approx(float(raw[made.tokens[0]]))
    assert made.logprobs[0].top[0][0] == int(raw.argmax())
    ending = row(regex("a"), ids("a"), temperature=0.0, min_tokens=5)
    (made,) = sample(logits.clone(), [ending], constraints.masks([ending], {}))
    assert made.tokens[0] in EOS


# ---- scheduler and executor ---------------------------------------------------------------------------


@dataclass
class Worker:
    """A scheduler and an executor; what a worker does with them, without sockets."""

    model: CausalModel
    grammars: Grammars
    num_blocks: int = NUM_BLOCKS
    depth: int = 1
    tokens: dict[Attempt, list[int]] = field(default_factory=dict)
    finish: dict[Attempt, FinishReason] = field(default_factory=dict)
    failed: dict[Attempt, str] = field(default_factory=dict)
    blocks: dict[Attempt, tuple[int, ...]] = field(default_factory=dict)
    num_pending: int = 0

    def __post_init__(self) -> None:
        layout = kv_layout(self.model.config, BLOCK, "float32")
        self.kv = kv_tensor(bytearray(self.num_blocks * layout.block_bytes), layout, self.num_blocks)
        self.executor = TorchExecutor(self.model, self.kv, layout, grammars=self.grammars)
        self.pool = BlockPool(self.num_blocks, BLOCK)
        config = SchedulerConfig(max_step_tokens=64, max_num_seqs=8, max_model_len=200, watermark=0.0)
        self.scheduler = Scheduler(self.pool, config, ORDERING["fcfs"])

    def run(self, steps: int = 1000) -> None:
        """At most `steps` steps, planned up to `depth` ahead."""
        in_flight: list[tuple[StepPlan, object]] = []
        for _ in range(steps):
            while len(in_flight) < self.depth and (plan := self.scheduler.plan(0.0)) is not None:
                in_flight.append((plan, self.executor.submit(plan)))
                self.num_pending += sum(row.pending for row in plan.rows)
            if not in_flight:
                return
            plan, future = in_flight.pop(0)
            self.take(self.scheduler.commit(plan, future.result(60), 0.0))  # type: ignore[attr-defined]

    def take(self, events: Sequence[SequenceEvent]) -> None:
        for event in events:
            if isinstance(event, TokenEvent):
                self.tokens.setdefault(event.attempt, []).extend(event.tokens)
                if event.finish is not None:
                    self.finish[event.attempt] = event.finish
                    self.executor.forget(event.attempt)
            elif isinstance(event, FailedEvent):
                self.failed[event.attempt] = event.reason
            elif isinstance(event, ComputedEvent):
                self.blocks[event.attempt] = event.blocks

    def close(self) -> None:
        self.executor.close()


@pytest.fixture(scope="module")
def model() -> CausalModel:
    torch.set_num_threads(1)
    return load_model(MODEL, "float32")


@pytest.fixture
def workers(model: CausalModel, grammars: Grammars) -> Iterator[list[Worker]]:
    made = [Worker(model, grammars) for _ in range(2)]
    yield made
    for worker in made:
        worker.close()


def spec(sampling: SamplingParams, number: int = 1, output: tuple[int, ...] = (), **options: object) -> SequenceSpec:
    return SequenceSpec(Attempt("r", number), PROMPT, sampling, output, **options)  # type: ignore[arg-type]


def alone(worker: Worker, sampling: SamplingParams) -> tuple[int, ...]:
    """The undisturbed output."""
    attempt = Attempt("alone", len(worker.tokens))
    worker.scheduler.add(SequenceSpec(attempt, PROMPT, sampling), 0.0)
    worker.run()
    assert worker.finish[attempt] is FinishReason.STOP
    return tuple(worker.tokens[attempt])


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_schema_holds_over_a_handoff_and_a_resume(workers: list[Worker], sampling: SamplingParams) -> None:
    prefill, decode = workers
    undisturbed = alone(prefill, sampling)
    value = json.loads(text_of(undisturbed))
    assert value["kind"] in ("list", "dict", "tuple")
    assert 2 <= len(value["sizes"]) <= 3
    assert undisturbed[-1] in EOS
    known: tuple[int, ...] = ()
    for number in range(1, 4):  # attempts: each hands over, and all but the last die after a few tokens
        asked = spec(sampling, number, known, hand_over=True)
        prefill.scheduler.add(asked, 0.0)
        prefill.run()
        (first,) = prefill.tokens[asked.attempt]
        landed = decode.pool.allocate(len(prefill.blocks[asked.attempt]) + 1)
        assert landed is not None
        for source, target in zip(prefill.blocks[asked.attempt], landed, strict=False):
            decode.kv[target].copy_(prefill.kv[source])
        decode.scheduler.adopt(replace(asked, hand_over=False), landed, first, 0.0)
        prefill.scheduler.release(asked.attempt)
        decode.run(1000 if number == 3 else 5)
        known += (first, *decode.tokens[asked.attempt])
        decode.scheduler.abort(asked.attempt)
    assert known == undisturbed
    assert decode.finish == {Attempt("r", 3): FinishReason.STOP}
    for worker in workers:
        assert worker.pool.num_free == NUM_BLOCKS


def test_plans_made_ahead_sample_the_same(model: CausalModel, grammars: Grammars) -> None:
    outputs = []
    for depth in (1, 2):
        worker = Worker(model, grammars, depth=depth)
        outputs.append((alone(worker, GREEDY), alone(worker, SEEDED)))
        assert (worker.num_pending > 0) == (depth == 2)
        worker.close()
    assert outputs[0] == outputs[1]


def test_preempted_sequences_go_on_where_they_were(model: CausalModel, grammars: Grammars) -> None:
    """A pool that is too small for both: the younger one loses its blocks, and is computed again from its tokens."""
    long = replace(SEEDED, grammar=regex("([a-z]{3}-){12}"), max_tokens=60)
    calm = Worker(model, grammars)
    tight = Worker(model, grammars, num_blocks=10)
    for worker in (calm, tight):
        for number in (1, 2):
            worker.scheduler.add(spec(replace(long, seed=number), number), 0.0)
        worker.run()
        worker.close()
    assert tight.tokens == calm.tokens
    assert all(re.fullmatch("([a-z]{3}-){12}", text_of(tokens)) for tokens in tight.tokens.values())
    fed = [len(PROMPT) + len(tokens) for tokens in tight.tokens.values()]
    assert sum(-(-count // BLOCK) for count in fed) > 10, "the pool was large enough for both"


def test_one_that_cannot_go_on_leaves_and_the_others_do_not_notice(workers: list[Worker]) -> None:
    worker = workers[0]
    broken = replace(GREEDY, grammar='start: "a" ((')
    undisturbed = alone(worker, SEEDED)
    for depth in (1, 2):
        worker.depth = depth
        worker.scheduler.add(spec(broken, depth), 0.0)
        worker.scheduler.add(SequenceSpec(Attempt("other", depth), PROMPT, SEEDED), 0.0)
        worker.run()
        assert "cannot be compiled" in worker.failed[Attempt("r", depth)]
        assert tuple(worker.tokens[Attempt("other", depth)]) == undisturbed
    assert Attempt("r", 1) not in worker.tokens
    assert worker.pool.num_free == NUM_BLOCKS
    worker.scheduler.check()
