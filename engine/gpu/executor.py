"""Runs the model on a device that works beside the host: a step is launched while the tokens of the one before travel back.

Three threads, none of which waits for another in the steady state. The caller plans. The launching thread turns a plan into
one copy and a replayed graph (decode) or a row of kernels (anything else), and never asks the device for a result: the
token of a pending row never leaves the device. The finishing thread waits for each step's end and hands its tokens over.

Only rows whose sampling needs the host (`inputs.takes_long`) make the launching thread wait, for their own step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from queue import SimpleQueue
from threading import Thread

import torch
from torch import Tensor

from ...core.errors import InternalError
from ...core.kv import KVLayout
from ...core.request import Attempt, TokenLogprob
from ...core.step import RowOutput, StepOutput, StepPlan, StepRow
from ...kernels.batch import RowSpan
from ...kernels.device import Device, Event
from ...kernels.draw_words import pack
from ..executor import check_row, warm_up_plans
from ..grammar import Grammars
from ..model.interface import CausalModel
from ..row_sampler import RowSampler, with_prompts
from .decode import DecodeGraphs
from .inputs import Sizes, StepInputs, device_specs, takes_long
from .slots import Slots

SLOTS_PER_SEAT = 8  # attempts whose last token is kept, for each sequence of a step: held ones among them


@dataclass(slots=True)
class _Launched:
    """A step on its way.

    sampling    the rows that sample
    tokens      uint8 of pinned memory: int64 [sampling], there once `done` is reached
    sampled     which row of `logits` each of them samples from
    logits      [N, V] on the device, of every place asked for; there once `done` is reached
    answers     what the host has sampled, by index in `sampling`
    of_prompts  for each row of the plan what was asked of its prompt, if anything was asked in this step
    """

    plan: StepPlan
    sampling: list[StepRow]
    begun: Event
    done: Event
    tokens: Tensor
    sampled: Sequence[int] = ()
    logits: Tensor | None = None
    answers: dict[int, RowOutput] = field(default_factory=dict)
    of_prompts: list[tuple[TokenLogprob, ...]] = field(default_factory=list)


class DeviceExecutor:
    """Runs a model over one pool of KV on its device; see `executor.Executor`.

    kv        [N, L, 2, K, S, D]
    arrivals  the last write to the pool from outside that was launched; steps run behind it
    """

    def __init__(
        self,
        model: CausalModel,
        kv: Tensor,
        layout: KVLayout,
        device: Device,
        max_num_seqs: int,
        grammars: Grammars | None = None,
        step_delay: float = 0.0,
        arrivals: Event | None = None,
    ) -> None:
        if kv.shape[1:] != (layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim):
            raise InternalError(f"a KV tensor of shape {list(kv.shape)} does not have the layout {layout}")
        self._model, self._device, self._layout = model, device, layout
        self._kv: Tensor | None = kv
        self._step_delay = step_delay
        self._arrivals = arrivals
        self._stream = device.stream(urgent=True)
        num_slots = SLOTS_PER_SEAT * max_num_seqs
        self._slots = Slots(num_slots)
        # One more than there are slots: what padding rows sample goes there.
        self._last = torch.zeros(num_slots + 1, dtype=torch.int64, device=device.torch_device)
        self._graphs = DecodeGraphs(model, kv, layout, device, self._stream, self._last, max_num_seqs)
        self._sampler = RowSampler(model.kernels, grammars)
        self._known: dict[Attempt, int] = {}  # the last token, of attempts whose sampling needs the host
        self._launcher = ThreadPoolExecutor(1, "executor")
        self._queue: SimpleQueue[tuple[_Launched, Future[StepOutput]] | None] = SimpleQueue()
        self._finisher = Thread(target=self._finish_all, name="finisher", daemon=True)
        self._finisher.start()

    def submit(self, plan: StepPlan) -> Future[StepOutput]:
        future: Future[StepOutput] = Future()
        try:
            queued = self._launcher.submit(self._launch, plan, future)
        except RuntimeError:  # the thread is shut down
            future.set_exception(InternalError(f"step {plan.step} was submitted to an executor that is closed"))
        else:
            queued.add_done_callback(lambda done: future.cancel() if done.cancelled() else None)
        return future

    def forget(self, attempt: Attempt) -> None:
        try:
            self._launcher.submit(self._forget, attempt)
        except RuntimeError:
            return  # closed: nothing is remembered any more

    def close(self) -> None:
        self._launcher.shutdown(wait=True, cancel_futures=True)
        if self._finisher.is_alive():
            self._queue.put(None)
            self._finisher.join()
        self._sampler.clear()
        self._known.clear()
        self._kv = None

    def warm_up(self, max_step_tokens: int = 512) -> list[tuple[StepPlan, float]]:
        """Record the graphs, then as `TorchExecutor.warm_up`. Call it before any sequence holds blocks. Blocks the caller."""
        self._launcher.submit(self._graphs.record).result()
        num_blocks = 0 if self._kv is None else self._kv.shape[0]
        measured = []
        for plan in warm_up_plans(self._model, self._layout, num_blocks, max_step_tokens):
            self.submit(plan).result()
            measured.append((plan, self.submit(plan).result().seconds))
            self.forget(plan.rows[0].attempt)
        return measured

    # ---- the launching thread ------------------------------------------------------------------

    def _launch(self, plan: StepPlan, future: Future[StepOutput]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            step = self._start(plan)
        except Exception as error:
            future.set_exception(error)
        else:
            self._queue.put((step, future))

    def _start(self, plan: StepPlan) -> _Launched:
        if self._kv is None:
            raise InternalError(f"step {plan.step} ran after the executor was closed")
        spans, tokens = self._rows(plan)
        sampling = [row for row in plan.rows if row.sample]
        fresh = [row.attempt for row in sampling if self._slots.of(row.attempt) is None]
        slots = self._slots.take([row.attempt for row in sampling])
        try:
            pinned = self._device.pinned(8 * len(sampling))
            step = _Launched(plan, sampling, self._stream.event(), self._stream.event(), pinned)
            work = self._work(step, spans, tokens, slots)
            if self._arrivals is not None:
                self._stream.wait_for(self._arrivals)
            step.begun.record()
            self._stream.launch(work)
            step.done.record()
            self._ask_host(step, slots)
        except Exception:
            for attempt in fresh:  # nothing was sampled for them
                self._slots.forget(attempt)
            raise
        return step

    def _rows(self, plan: StepPlan) -> tuple[list[RowSpan], list[int]]:
        """Check the rows and describe them to the kernels; the tokens fed, pending ones as -1 - slot."""
        spans: list[RowSpan] = []
        tokens: list[int] = []
        for row in plan.rows:
            needed = check_row(row, self._layout, self._model.max_model_len)
            table = row.block_table
            spans.append(RowSpan(len(tokens), row.num_tokens, row.start, table if len(table) == needed else table[:needed]))
            if row.pending:
                slot = self._slots.of(row.attempt)
                if slot is None:
                    raise InternalError(f"row of {row.attempt} is pending, but no token was sampled for that attempt here")
                tokens.append(-1 - slot)
            else:
                tokens += row.tokens
        return spans, tokens

    def _work(self, step: _Launched, spans: Sequence[RowSpan], tokens: Sequence[int], slots: Sequence[int]) -> Callable[[], None]:
        """What the device is to do. Everything it takes from the host is packed now, not when it runs."""
        rows = step.plan.rows
        if not rows:
            return lambda: None
        drawn = any(not row.sampling.greedy and not takes_long(row) for row in step.sampling)
        if len(step.sampling) == len(rows) == len(tokens) <= self._graphs.max_rows and not _asks_of_prompt(rows):
            step.sampled = range(len(rows))
            packed = self._graphs.pack(rows, tokens, slots, spans, drawn)

            def decode() -> None:
                chosen, step.logits = self._graphs.run(packed)
                _bring_back(step.tokens, chosen)

            return _inference(decode)
        places, step.sampled = _places(rows, spans)
        sizes = Sizes(len(tokens), len(places), len(slots))
        memory = self._device.pinned(sizes.num_bytes)
        host = StepInputs.over(memory, sizes)
        positions = [position for span in spans for position in range(span.start, span.end)]
        host.write(tokens, positions, places, step.sampled, slots)
        if drawn:
            pack(device_specs(step.sampling), host.draws)
        return _inference(partial(self._run, step, spans, memory, sizes, drawn))

    def _run(self, step: _Launched, spans: Sequence[RowSpan], memory: Tensor, sizes: Sizes, drawn: bool) -> None:
        """On the stream: a step of any rows, kernel by kernel."""
        assert self._kv is not None  # closing waits for what was launched
        model, step_kernels = self._model, self._model.kernels.step
        inputs = StepInputs.over(memory.to(self._device.torch_device, non_blocking=True), sizes)
        attention = model.kernels.attention(self._kv, spans)
        logits = step.logits = model.forward(inputs.fed(self._last), inputs.positions, attention, inputs.places)  # [N, V]
        if sizes.num_rows:
            ours = logits if sizes.num_rows == sizes.num_places else logits.index_select(0, inputs.sampled)
            assert step_kernels is not None  # the graphs have asked for them
            chosen = step_kernels.sample(ours, inputs.draws) if drawn else model.kernels.argmax(ours)
            self._last.index_copy_(0, inputs.slots, chosen)
            _bring_back(step.tokens, chosen)

    def _ask_host(self, step: _Launched, slots: Sequence[int]) -> None:
        """Sample the rows that take long, and look up what is asked of prompts. Waits for the device, if there are any."""
        slow = [i for i, row in enumerate(step.sampling) if takes_long(row)]
        if not slow and not _asks_of_prompt(step.plan.rows):
            return
        step.done.wait()
        finished = self._stream.event()
        self._stream.launch(_inference(partial(self._sample_slowly, step, slow, slots)))
        finished.record()
        finished.wait()

    def _sample_slowly(self, step: _Launched, slow: Sequence[int], slots: Sequence[int]) -> None:
        """On the stream. `slow` and `slots` count the rows that sample."""
        assert step.logits is not None  # the step's work has run
        if _asks_of_prompt(step.plan.rows):
            outputs = with_prompts(step.plan.rows, [RowOutput()] * len(step.plan.rows), step.logits)
            step.of_prompts = [output.prompt_logprobs for output in outputs]
        if not slow:
            return
        rows = [step.sampling[i] for i in slow]
        made = self._sampler.sample(step.logits.index_select(0, self._indices(step.sampled[i] for i in slow)), rows, self._known)
        tokens = [output.tokens[-1] for output in made]
        self._last.index_copy_(0, self._indices(slots[i] for i in slow), self._indices(tokens))
        self._known.update((row.attempt, token) for row, token in zip(rows, tokens, strict=True))
        step.answers.update(zip(slow, self._sampler.take(rows, made), strict=True))

    def _indices(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64).to(self._device.torch_device)

    def _forget(self, attempt: Attempt) -> None:
        self._slots.forget(attempt)
        self._sampler.forget(attempt)
        self._known.pop(attempt, None)

    # ---- the finishing thread ------------------------------------------------------------------

    def _finish_all(self) -> None:
        while (item := self._queue.get()) is not None:
            step, future = item
            try:
                output = self._finish(step)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(output)

    def _finish(self, step: _Launched) -> StepOutput:
        step.done.wait()
        if self._step_delay > 0:
            time.sleep(self._step_delay)
        made = [RowOutput((token,)) for token in step.tokens.view(torch.int64).tolist()]
        for i, answer in step.answers.items():
            made[i] = answer
        sampled = iter(made)
        rows = [next(sampled) if row.sample else RowOutput() for row in step.plan.rows]
        if step.of_prompts:
            pairs = zip(rows, step.of_prompts, strict=True)
            rows = [replace(row, prompt_logprobs=reports) if reports else row for row, reports in pairs]
        return StepOutput(step.plan.step, tuple(rows), step.done.seconds_since(step.begun) + self._step_delay)


def _places(rows: Sequence[StepRow], spans: Sequence[RowSpan]) -> tuple[list[int], list[int]]:
    """Packed tokens whose logits are wanted, ascending; which of these the sampling rows sample from."""
    places: list[int] = []
    sampled: list[int] = []
    for row, span in zip(rows, spans, strict=True):
        if row.needs is not None and row.needs.targets:
            places += range(span.offset, span.offset + len(row.needs.targets))
        if row.sample:
            sampled.append(len(places))
            places.append(span.offset + span.num_tokens - 1)
    return places, sampled


def _asks_of_prompt(rows: Sequence[StepRow]) -> bool:
    return any(row.needs is not None and row.needs.targets for row in rows)


def _bring_back(host: Tensor, chosen: Tensor) -> None:
    """Copy sampled tokens int64 [R] into uint8 [8 * R] of pinned memory."""
    host.view(torch.int64).copy_(chosen, non_blocking=True)


def _inference(work: Callable[[], None]) -> Callable[[], None]:
    """Work whose operations leave nothing for gradients, on whatever thread it runs."""

    def run() -> None:
        with torch.inference_mode():
            work()

    return run
