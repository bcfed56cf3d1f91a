"""The device's executor on a device that lags: the tokens of the plain executor, and a host that does not wait for them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from baton.core.errors import InternalError
from baton.core.request import Attempt, SamplingParams, SequenceSpec, TokenLogprob
from baton.core.step import RowNeeds, SequenceEvent, StepOutput, StepPlan, StepRow, TokenEvent
from baton.engine.blocks import BlockPool
from baton.engine.cache import kv_layout, kv_tensor
from baton.engine.executor import Executor, TorchExecutor
from baton.engine.gpu.decode import bucket_sizes
from baton.engine.gpu.executor import DeviceExecutor
from baton.engine.grammar import Grammars
from baton.engine.loader import load_model
from baton.engine.model.interface import CausalModel
from baton.engine.random_model import Shape, make_model
from baton.engine.scheduler import Scheduler, SchedulerConfig
from baton.kernels.device import CudaDevice, Device, HostDevice
from baton.policy.ordering import ORDERING
from baton.tests.engine.lagging_device import LaggingDevice
from torch import Tensor

LIMIT, BLOCK, NUM_BLOCKS, SEATS = 128, 16, 48, 6
SHAPE = Shape(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=48, vocab_size=300, head_dim=16)
GREEDY = SamplingParams(temperature=0.0, max_tokens=14)
PROMPT = tuple(range(10, 27))
TABLE = (7, 3, 11, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    make_model(out, SHAPE, dtype="float32", max_model_len=LIMIT)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> CausalModel:
    return load_model(folder, "float32", kernels="cpu")


def make_kv(model: CausalModel) -> Tensor:
    """A pool of NaN: what nobody wrote must not be seen."""
    layout = kv_layout(model.config, BLOCK, "float32")
    return kv_tensor(bytearray(NUM_BLOCKS * layout.block_bytes), layout, NUM_BLOCKS).fill_(float("nan"))


def on_device(model: CausalModel, device: Device, grammars: Grammars | None = None) -> DeviceExecutor:
    executor = DeviceExecutor(model, make_kv(model), kv_layout(model.config, BLOCK, "float32"), device, SEATS, grammars)
    executor.warm_up(40)
    return executor


def plain(model: CausalModel, grammars: Grammars | None = None) -> TorchExecutor:
    return TorchExecutor(model, make_kv(model), kv_layout(model.config, BLOCK, "float32"), grammars=grammars)


@pytest.fixture
def device() -> LaggingDevice:
    return LaggingDevice()


@pytest.fixture
def executor(model: CausalModel, device: LaggingDevice) -> Iterator[DeviceExecutor]:
    made = on_device(model, device)
    device.log.clear()
    yield made
    device.gate.set()
    made.close()


@dataclass
class Made:
    """What came of the sequences."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    of_prompts: dict[str, list[TokenLogprob]] = field(default_factory=dict)


def serve(executor: Executor, specs: list[SequenceSpec], depth: int, every: int = 2) -> Made:
    """Run the sequences, one joining every few steps, with `depth` plans in flight."""
    pool = BlockPool(NUM_BLOCKS, BLOCK)
    scheduler = Scheduler(pool, SchedulerConfig(24, SEATS, LIMIT), ORDERING["fcfs"])
    waiting, made = deque(specs), Made()
    in_flight: deque[tuple[StepPlan, Future[StepOutput]]] = deque()

    def note(events: list[SequenceEvent]) -> None:
        for event in events:
            assert isinstance(event, TokenEvent), event
            name = event.attempt.request_id
            made.tokens.setdefault(name, []).extend(event.tokens)
            made.logprobs.setdefault(name, []).extend(event.logprobs)
            made.of_prompts.setdefault(name, []).extend(event.prompt_logprobs)
            if event.finish is not None:
                executor.forget(event.attempt)

    for step in range(10_000):
        if waiting and step % every == 0:
            scheduler.add(waiting.popleft(), 0.0)
        plan = scheduler.plan(0.0)
        if plan is not None:
            in_flight.append((plan, executor.submit(plan)))
        elif not in_flight and not waiting:
            return made
        if in_flight and (plan is None or len(in_flight) >= depth):
            oldest, future = in_flight.popleft()
            note(scheduler.commit(oldest, future.result(60), 0.0))
    raise AssertionError("no end")


def spec(name: str, length: int, sampling: SamplingParams) -> SequenceSpec:
    return SequenceSpec(Attempt(name, 1), tuple(5 + (i * 31 + length) % 250 for i in range(length)), sampling)


DRAWN = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=1 << 40, max_tokens=20)
PLAIN = [
    spec("a", 5, GREEDY),
    spec("b", 40, replace(GREEDY, max_tokens=30)),
    spec("c", 17, DRAWN),
    spec("d", 9, replace(DRAWN, seed=3, sequence_index=2, temperature=1.3, top_k=0, top_p=1.0, min_p=0.0)),
    spec("e", 33, replace(GREEDY, max_tokens=1)),
    spec("f", 2, replace(GREEDY, max_tokens=9)),
    spec("g", 16, replace(DRAWN, max_tokens=33)),
    spec("h", 3, replace(GREEDY, min_tokens=4, stop_token_ids=())),
]
ASKING = [
    spec("a", 5, replace(GREEDY, logprobs=3)),
    spec("b", 40, replace(DRAWN, prompt_logprobs=2, max_tokens=12)),
    spec("c", 17, replace(DRAWN, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2)),
    spec("d", 9, replace(GREEDY, min_tokens=6, stop_token_ids=tuple(range(0, 300, 2)))),
    spec("e", 12, replace(GREEDY, logit_bias=((20, 4.0), (21, 4.0)), bad_words=((20, 21), (21, 20)))),
    spec("f", 21, GREEDY),
    spec("g", 8, DRAWN),
]


def close_to(found: dict[str, list[TokenLogprob]], wanted: dict[str, list[TokenLogprob]]) -> bool:
    assert found.keys() == wanted.keys()
    pairs = [pair for name in wanted for pair in zip(found[name], wanted[name], strict=True)]
    return all(
        f.token == w.token and f.logprob == pytest.approx(w.logprob, abs=1e-4) and [i for i, _ in f.top] == [i for i, _ in w.top]
        for f, w in pairs
    )


@pytest.mark.parametrize("specs", [PLAIN, ASKING], ids=["plain", "asking"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tokens_are_those_of_the_plain_executor(model: CausalModel, specs: list[SequenceSpec], depth: int) -> None:
    """Every bucket, padding, pending rows, mixed steps; and whatever needs the host, beside rows that do not."""
    oracle, tested = plain(model), on_device(model, LaggingDevice())
    wanted = serve(oracle, specs, 1)
    found = serve(tested, specs, depth)
    assert found.tokens == wanted.tokens
    assert {name: len(tokens) for name, tokens in found.tokens.items() if name != "d"} == {
        each.attempt.request_id: each.sampling.max_tokens for each in specs if each.attempt.request_id != "d"
    }
    assert close_to(found.logprobs, wanted.logprobs)
    assert close_to(found.of_prompts, wanted.of_prompts)
    oracle.close()
    tested.close()


def test_the_host_as_a_device_makes_them_too(model: CausalModel) -> None:
    oracle, tested = plain(model), on_device(model, HostDevice())
    assert serve(tested, PLAIN, 2).tokens == serve(oracle, PLAIN, 1).tokens
    oracle.close()
    tested.close()


def test_kernels_of_the_gpu_make_them_too(folder: Path, model: CausalModel) -> None:
    """Interpreted where there is no GPU; on one, the real graphs."""
    pytest.importorskip("triton")
    there = torch.cuda.is_available()
    device: Device = CudaDevice() if there else LaggingDevice()
    compiled = load_model(folder, "float32", kernels="triton", device=device.torch_device)
    layout = kv_layout(model.config, BLOCK, "float32")
    kv = make_kv(model).to(device.torch_device)
    tested = DeviceExecutor(compiled, kv, layout, device, SEATS)
    oracle = plain(model)
    tested.warm_up(24)
    few = [replace(each, sampling=replace(each.sampling, max_tokens=4)) for each in (*PLAIN[:4], ASKING[0], ASKING[2])]
    few = [replace(each, attempt=Attempt(str(i), 1)) for i, each in enumerate(few)]
    assert serve(tested, few, 2, every=1).tokens == serve(oracle, few, 1, every=1).tokens
    oracle.close()
    tested.close()


@pytest.mark.parametrize("depth", [1, 2])
def test_grammars_hold_for_pending_rows_and_beside_free_ones(model: CausalModel, folder: Path, depth: int) -> None:
    grammars = Grammars(folder, model.config.vocab_size, model.config.eos_token_ids)
    stops = tuple(model.config.eos_token_ids)
    digits = replace(DRAWN, grammar="%llguidance {}\nstart: /[0-9]{6}/", stop_token_ids=stops, max_tokens=10)
    specs = [spec("free", 7, GREEDY), spec("bound", 9, digits)]
    oracle, tested = plain(model, grammars), on_device(model, LaggingDevice(), grammars)
    wanted = serve(oracle, specs, 1)
    assert serve(tested, specs, depth).tokens == wanted.tokens
    assert wanted.tokens["bound"][-1] in stops
    for each in (oracle, tested):
        each.close()
    grammars.close()


# ---- the order of things -------------------------------------------------------------------------


def attempt(name: str = "a") -> Attempt:
    return Attempt(name, 1)


def prefill(step: int = 1, of: Attempt = attempt(), params: SamplingParams = GREEDY) -> StepPlan:
    return StepPlan(step, (StepRow(of, 0, PROMPT, TABLE, params, 0, True),))


def decode(step: int, index: int, token: int | None = None, of: Attempt = attempt(), params: SamplingParams = GREEDY) -> StepPlan:
    tokens = () if token is None else (token,)
    start = len(PROMPT) + index - 1
    return StepPlan(step, (StepRow(of, start, tokens, TABLE, params, index, True, pending=token is None),))


def test_nothing_waits_between_launches(executor: DeviceExecutor, device: LaggingDevice) -> None:
    """With the device at a stand, a prefill and its decode steps are launched one behind the other; then their tokens come."""
    device.gate.clear()
    futures = [executor.submit(prefill())] + [executor.submit(decode(1 + i, i)) for i in range(1, 8)]
    executor._launcher.submit(lambda: None).result(30)  # all of them are launched
    launching = [what for what, who in list(device.log) if who == "executor"]
    assert launching == ["launch"] * 8
    assert not any(future.done() for future in futures)
    device.gate.set()
    tokens = [future.result(30).rows[0].tokens[0] for future in futures]
    assert len(set(tokens)) > 1
    assert [what for what, _ in device.log if what == "replay"] == ["replay"] * 7
    assert "wait" not in [what for what, who in device.log if who == "executor"]  # only the finisher ever waited
    assert [what for what, who in device.log if who == "finisher"] == ["wait"] * 8
    # The same steps one by one, with every token given by the host.
    known = [executor.submit(prefill(20)).result(30).rows[0].tokens[0]]
    for i in range(1, 8):
        known.append(executor.submit(decode(20 + i, i, known[-1])).result(30).rows[0].tokens[0])
    assert tokens == known


def test_only_rows_that_need_the_host_make_it_wait_and_only_for_their_own_step(
    executor: DeviceExecutor, device: LaggingDevice
) -> None:
    asking = replace(GREEDY, logprobs=1)
    steps = [prefill(), decode(2, 1), decode(3, 2, params=asking), decode(4, 3), decode(5, 4)]
    outputs = [future.result(30) for future in [executor.submit(plan) for plan in steps]]
    assert [len(output.rows[0].logprobs) for output in outputs] == [0, 0, 1, 0, 0]
    waits = [i for i, (what, _) in enumerate(e for e in device.log if e[1] == "executor") if what == "wait"]
    assert waits == [3, 5]  # behind its third launch, and behind the launch that sampled for it


def test_a_pending_row_of_nobody_fails_alone(executor: DeviceExecutor) -> None:
    with pytest.raises(InternalError, match="b#1 is pending"):
        executor.submit(decode(1, 1, of=attempt("b"))).result(30)
    assert executor.submit(prefill(2)).result(30).rows[0].tokens


def test_rows_are_checked(executor: DeviceExecutor) -> None:
    row = StepRow(attempt(), 0, PROMPT, TABLE[:1], GREEDY, 0, True)
    with pytest.raises(InternalError, match="need 2 blocks of 1 given"):
        executor.submit(StepPlan(1, (row,))).result(30)
    assert executor.submit(StepPlan(2, ())).result(30).rows == ()


def test_what_failed_to_launch_leaves_no_token(executor: DeviceExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(executor._device, "pinned", lambda num_bytes: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            executor.submit(prefill()).result(30)
    with pytest.raises(InternalError, match="is pending"):
        executor.submit(decode(2, 1)).result(30)


def test_a_failure_on_the_device_arrives_through_the_future(model: CausalModel, device: LaggingDevice) -> None:
    executor = on_device(model, device)

    def burst(*_: object) -> Callable[[], None]:
        return lambda: torch.ones(2).view(3, 3)  # type: ignore[return-value]

    executor._work = burst  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shape"):
        executor.submit(prefill()).result(30)
    executor.close()


def test_what_is_forgotten_is_not_pending_any_more(executor: DeviceExecutor) -> None:
    executor.submit(prefill()).result(30)
    executor.forget(attempt())
    with pytest.raises(InternalError, match="is pending"):
        executor.submit(decode(2, 1)).result(30)


def test_a_place_goes_to_the_next_attempt_only_behind_its_last_step(executor: DeviceExecutor, device: LaggingDevice) -> None:
    """Forgotten while its last step is still to run: whoever gets its place must not disturb it, nor be disturbed."""
    lone = [executor.submit(plan).result(30).rows[0].tokens for plan in (prefill(), decode(2, 1))]
    executor.forget(attempt())
    device.gate.clear()
    futures = [executor.submit(prefill(3)), executor.submit(decode(4, 1))]
    executor.forget(attempt())
    other = attempt("b")
    futures += [executor.submit(prefill(5, of=other)), executor.submit(decode(6, 1, of=other))]
    device.gate.set()
    assert [future.result(30).rows[0].tokens for future in futures] == lone * 2


def test_closing_finishes_what_was_launched_and_cancels_the_rest(
    model: CausalModel, device: LaggingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = on_device(model, device)
    begun, pinned = threading.Event(), device.pinned
    monkeypatch.setattr(executor._device, "pinned", lambda num_bytes: (begun.set(), pinned(num_bytes))[1])
    device.gate.clear()
    running = executor.submit(prefill(params=replace(GREEDY, logprobs=0)))  # holds the launching thread
    queued = [executor.submit(decode(2 + i, 1 + i)) for i in range(3)]
    assert begun.wait(30)
    closing = threading.Thread(target=executor.close)
    closing.start()
    for future in queued:
        with pytest.raises(CancelledError):
            future.result(30)
    device.gate.set()
    closing.join(30)
    assert running.result(0).rows[0].tokens
    late = executor.submit(prefill())
    with pytest.raises(InternalError, match="closed"):
        late.result(0)
    executor.forget(attempt())
    executor.close()


def test_writes_from_outside_come_before_the_steps_launched_behind_them(model: CausalModel, device: LaggingDevice) -> None:
    """A step must see KV whose copy was launched before it, though nobody on the host waits for the copy."""
    source = plain(model)
    first = source.submit(prefill()).result(30).rows[0].tokens[0]
    expected = source.submit(decode(2, 1, first)).result(30).rows[0].tokens[0]
    layout, kv = kv_layout(model.config, BLOCK, "float32"), make_kv(model)
    incoming = device.stream()
    arrived = incoming.event()
    executor = DeviceExecutor(model, kv, layout, device, SEATS, arrivals=arrived)
    executor.warm_up(40)
    kv.fill_(float("nan"))
    taken = source._kv
    assert taken is not None
    device.gate.clear()
    incoming.launch(lambda: kv.copy_(taken))  # type: ignore[arg-type, return-value]
    arrived.record()
    future = executor.submit(decode(3, 1, first))
    device.gate.set()
    assert future.result(30).rows[0].tokens == (expected,)
    executor.close()
    source.close()


def test_prompt_logprobs_of_an_unfinished_chunk(executor: DeviceExecutor) -> None:
    params = replace(GREEDY, prompt_logprobs=1)
    row = StepRow(attempt(), 0, PROMPT[:9], TABLE, params, 0, False, needs=RowNeeds(targets=PROMPT[1:10]))
    (output,) = executor.submit(StepPlan(1, (row,))).result(30).rows
    assert output.tokens == ()
    assert [entry.token for entry in output.prompt_logprobs] == list(PROMPT[1:10])


def test_more_rows_than_the_largest_bucket_run_without_a_graph(executor: DeviceExecutor, device: LaggingDevice) -> None:
    names = [attempt(str(i)) for i in range(SEATS + 2)]
    table = TABLE[:1]
    rows = tuple(StepRow(name, 0, (5,), (i,), GREEDY, 0, True) for i, name in enumerate(names))
    device.log.clear()
    outputs = executor.submit(StepPlan(1, rows)).result(30).rows
    assert "replay" not in [what for what, _ in device.log]
    alone = executor.submit(StepPlan(2, (StepRow(attempt("x"), 0, (5,), table, GREEDY, 0, True),))).result(30)
    assert {output.tokens for output in outputs} == {alone.rows[0].tokens}


def test_buckets() -> None:
    assert bucket_sizes(1) == (1,)
    assert bucket_sizes(6) == (1, 2, 4, 6)
    assert bucket_sizes(64) == (1, 2, 4, 8, 16, 32, 64)


def test_a_step_is_timed_by_the_device(executor: DeviceExecutor) -> None:
    output = executor.submit(prefill()).result(30)
    assert 0 < output.seconds < 30
