"""The engine benchmark on a small model: right outputs pass, anything else ends it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from baton.engine import loader
from baton.engine.random_model import Shape, make_model
from baton.kernels.cpu import CpuAttention, CpuLinear
from baton.kernels.table import KERNELS, Kernels
from engine_rig import BASE_TOKENS, Rig, Truth, WrongOutput
from stopwatch import ATTENTION, GATED, LINEAR, Stopwatch

CONTEXTS = [(0, 300), (1, 352), (0, 331)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, Shape(128, 3, 2, 1, 256, vocab_size=512), seed=3)
    return folder


@pytest.fixture(scope="module")
def bases() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(512) for _ in range(BASE_TOKENS)] for _ in range(2)]


@pytest.fixture(scope="module")
def truth(model: Path, bases: list[list[int]]) -> Truth:
    return Truth(model, bases, 256, model / "truth.pt")


def test_right_outputs_pass(model: Path, bases: list[list[int]], truth: Truth) -> None:
    with closing(Rig(model, "cpu", 1, bases, 4)) as rig:
        prefill = rig.prefill(1, 256)
        decode = rig.decode(CONTEXTS, 5, seed=4)
    assert truth.check("prefill", prefill.rows) == 1
    assert truth.check("decode", decode.rows) == 15
    assert [step.plan.num_tokens for step in prefill.steps + decode.steps] == [256, 3, 3, 3, 3, 3]
    assert all(step.seconds >= step.device > 0 for step in decode.steps)
    tables = [row.block_table for row in decode.steps[-1].plan.rows]
    assert len({block for table in tables for block in table}) == sum(len(table) for table in tables)
    assert any(table != tuple(sorted(table)) for table in tables)
    assert [row.length for row in decode.rows] == [300, 352, 331]


def test_what_was_saved_checks_as_well(model: Path, bases: list[list[int]], truth: Truth) -> None:
    again = Truth(model, bases, 256, model / "truth.pt")
    with closing(Rig(model, "cpu", 1, bases, 4)) as rig:
        assert again.check("decode", rig.decode(CONTEXTS, 3, seed=1).rows) == 9


class _Zeros(CpuAttention):
    """Attends to nothing in decode steps."""

    def run(self, layer: int, qkv: torch.Tensor, spec: object, turn: object) -> torch.Tensor:
        mixed = super().run(layer, qkv, spec, turn)
        return mixed * 0.0 if qkv.shape[0] == len(CONTEXTS) else mixed


class _Swapped(_Zeros):
    """Mixes up the rows of decode steps."""

    def run(self, layer: int, qkv: torch.Tensor, spec: object, turn: object) -> torch.Tensor:
        mixed = CpuAttention.run(self, layer, qkv, spec, turn)
        return mixed.flip(0) if qkv.shape[0] == len(CONTEXTS) else mixed


class _OtherGate(CpuLinear):
    def gated(self, activation: str, x: torch.Tensor) -> torch.Tensor:
        return super().gated("gelu_tanh", x)


class _NoNumber(CpuLinear):
    def gated(self, activation: str, x: torch.Tensor) -> torch.Tensor:
        return super().gated(activation, x) * float("nan")


GOOD = KERNELS["cpu"]
BROKEN = {
    "no attention": replace(GOOD, attention=_Zeros),
    "rows swapped": replace(GOOD, attention=_Swapped),
    "another activation": replace(GOOD, linear=_OtherGate),
    "nan": replace(GOOD, linear=_NoNumber),
}


@pytest.mark.parametrize("kernels", BROKEN.values(), ids=BROKEN.keys())
def test_wrong_outputs_end_the_run(
    model: Path, bases: list[list[int]], truth: Truth, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "make_kernels", lambda *_, **__: kernels)
    with closing(Rig(model, "broken", 1, bases, 4)) as rig:
        sample = rig.decode(CONTEXTS, 4, seed=4)
    with pytest.raises(WrongOutput, match="decode, context of"):
        truth.check("decode", sample.rows)


def test_wrong_tokens_end_the_run(model: Path, bases: list[list[int]], truth: Truth) -> None:
    with closing(Rig(model, "cpu", 1, bases, 4)) as rig:
        (row,) = rig.prefill(0, 256).rows
    with pytest.raises(WrongOutput, match="below the best"):
        truth.check("prefill", [replace(row, sampled=((row.sampled[0] + 1) % 512,))])
    with pytest.raises(WrongOutput, match="vocabulary"):
        truth.check("prefill", [replace(row, sampled=(512,))])


def test_the_stopwatch_sees_every_step(model: Path, bases: list[list[int]], truth: Truth) -> None:
    watch = Stopwatch()
    with closing(Rig(model, "cpu", 1, bases, 4, watch)) as rig:
        watch.reset()
        sample = rig.decode(CONTEXTS, 3, seed=4)
    truth.check("decode", sample.rows)
    assert len(watch.forwards) == 3
    for step, forward in zip(sample.steps, watch.forwards, strict=True):
        assert {ATTENTION, LINEAR, GATED, "add_rms_norm"} <= forward.kernels.keys()
        assert sum(forward.kernels.values()) < forward.ended - forward.began < step.device
        assert step.submitted < forward.began
