"""What the bounds count."""

from __future__ import annotations

import pytest
from baton.engine.model_config import load_config
from baton.engine.random_model import Shape, make_model
from bounds import Linears, fastest


@pytest.fixture(scope="module")
def linears(tmp_path_factory: pytest.TempPathFactory) -> Linears:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, Shape(128, 3, 2, 1, 256, vocab_size=512))
    return Linears(load_config(folder))


QKV, REST, HEAD = 256 * 128, 128 * 128 + 2 * 256 * 128 + 256 * 128, 512 * 128


def test_bytes_and_operations_are_those_of_the_model(linears: Linears) -> None:
    assert linears.num_bytes == 2 * (3 * (QKV + REST) + HEAD)
    assert linears.decode_flop(8) == 2 * 8 * (3 * (QKV + REST) + HEAD)


def test_a_prefill_needs_only_its_last_token_behind_the_last_cache(linears: Linears) -> None:
    assert linears.prefill_flop(64) == 2 * (64 * (3 * QKV + 2 * REST) + REST + HEAD)


def test_they_run(linears: Linears) -> None:
    assert linears.measure_prefill(16, 1).seconds > 0
    assert linears.measure_decode(2, 1).method in ("linear", "packed")


def test_the_fastest_method_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("bounds.time.perf_counter", lambda: clock[0])

    def takes(seconds: float) -> object:
        clock[0] += seconds
        return None

    timed = fastest({"slow": lambda: takes(2.0), "fast": lambda: takes(1.0)}, 3)
    assert (timed.method, timed.seconds) == ("fast", 1.0)
