"""`baton simulate`: what it prints and writes, and what it says to a clumsy person."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from baton.cli.main import app
from baton.cli.simulate_report import Sample
from baton.placement.model_shape import shape_of_folder
from baton.placement.profile import MeasuredCost, Profile, write_profile
from baton.simulator.cost import LinearCost
from baton.simulator.records import RequestOutcome
from typer.testing import CliRunner, Result

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
TOPOLOGY = """\
cluster: simtest
model: {path: ./model}
slo: {ttft: 0.5, tpot: 0.05}
pools:
  prefill: {kv_memory: 16MiB}
  decode: {kv_memory: 16MiB, replicas: 2}
"""
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02}.0,{100 + second},{5 + second % 7}\n" for second in range(60)
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "t.yaml").write_text(TOPOLOGY)
    (tmp_path / "trace.csv").write_text(TRACE)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", "t.yaml", *arguments])


def profile(folder: Path, step: float, **changes: object) -> str:
    cost = LinearCost(step=step, token=1e-5)
    made = Profile("m", shape_of_folder(folder / "model").fingerprint, "cpu", "bfloat16", "native", 1, 32, 0.0,
                   {"shm": 1e10}, (MeasuredCost(1, 1, cost, {}),))  # fmt: skip
    write_profile(replace(made, **changes), folder / "p.yaml")  # type: ignore[arg-type]
    return "p.yaml"


def test_a_workload_is_simulated_and_reported(folder: Path) -> None:
    shown = run("--profile", profile(folder, 0.004), "--rate", "20", "--requests", "200", "--output-tokens", "uniform:2,30")
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.stdout.split())
    assert "simtest with model: 1 prefill (measured on 1 core of a CPU), 2 decode" in text
    assert "200 offered, 200 finished, 0 failed" in text
    assert "attainment 100.0% of all offered (target 90%; 0 missed TTFT, 0 missed TPOT)" in text
    assert "what binds nothing; nearest to its limit is" in text
    for word in ("TTFT", "TPOT", "queue", "prefill", "handoff", "decode", "goodput", "per device", "links"):
        assert word in text


def test_the_same_seed_prints_the_same_and_another_another(folder: Path) -> None:
    first, again, other = (run("--requests", "50", "--burstiness", "2", "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other


def test_slow_steps_miss_the_objectives_and_the_report_says_why(folder: Path) -> None:
    shown = run("--profile", profile(folder, 0.2), "--rate", "2", "--requests", "40")
    text = " ".join(shown.stdout.split())
    assert shown.exit_code == 0
    assert "40 missed TPOT" in text
    assert "what binds decode batch: " in text


def test_a_trace_is_replayed_faster(folder: Path) -> None:
    slow = " ".join(run("--trace", "trace.csv").stdout.split())
    fast = " ".join(run("--trace", "trace.csv", "--speed", "10", "--requests", "30").stdout.split())
    assert "60 offered, 60 finished" in slow
    assert "of 1.02 offered" in slow
    assert "30 offered, 30 finished" in fast
    assert "of 10.34 offered" in fast


def test_a_trace_is_repeated(folder: Path) -> None:
    text = " ".join(run("--trace", "trace.csv", "--repeat", "3", "--speed", "10").stdout.split())
    assert "180 offered, 180 finished" in text
    assert "of 10.06 offered" in text, "rounds follow each other at the trace's own rate"


def test_published_lengths(folder: Path) -> None:
    shown = run("--lengths", "splitwise-code", "--requests", "20")
    assert "20 offered, 12 finished, 8 failed: 8 x invalid_argument" in " ".join(shown.stdout.split())
    assert "8 of 20 requests are longer than the model's 1024 tokens and were refused, as the service would" in shown.stderr


def test_a_request_that_just_fits_the_model_is_served(folder: Path) -> None:
    assert "2 finished" in run("--input-tokens", "1000", "--output-tokens", "24", "--requests", "2").stdout
    assert "0 finished" in run("--input-tokens", "1000", "--output-tokens", "25", "--requests", "2").stdout


def test_a_timeline_figures_and_a_page_are_written(folder: Path) -> None:
    shown = run("--requests", "30", "--timeline", "out/t.json", "--html", "out/r.html", "--out", "out/r.json")
    assert shown.exit_code == 0, shown.output
    assert "wrote out/t.json" in shown.stdout
    events = json.loads((folder / "out" / "t.json").read_text())["traceEvents"]
    groups = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"workers", "requests"} <= groups
    figures = json.loads((folder / "out" / "r.json").read_text())
    assert figures["report"]["num_offered"] == 30
    assert figures["report"]["pools"][0]["role"] == "prefill"
    assert figures["settings"]["workload"] == "Poisson, 1 requests/s, 512 tokens in, 128 out"
    page = (folder / "out" / "r.html").read_text()
    for text in (
        "simtest in simulation",
        "nearest to its limit",
        "Where the time goes",
        "Workers",
        "TTFT distribution",
        "t.yaml",
    ):
        assert text in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rate", "0"), "rate: 0.0 requests/s; it must be above 0"),
        (("--rate", "inf", "--duration", "5"), "the workload has no end"),
        (("--input-tokens", "many"), "input-tokens: 'many' is no length; allowed is a number, uniform:LOW,HIGH"),
        (("--lengths", "gsm8k"), "--lengths: 'gsm8k' is not known; allowed are sharegpt, splitwise-code"),
        (("--lengths", "sharegpt", "--input-tokens", "5"), "--lengths excludes --input-tokens"),
        (("--speed", "2"), "--speed and --trace belong together: there is no trace"),
        (("--trace", "trace.csv", "--rate", "2"), "--rate and --trace exclude each other"),
        (("--trace", "trace.csv", "--speed", "0"), "--speed: 0.0; it must be a number above 0"),
        (("--trace", "nowhere.csv"), "nowhere.csv: cannot be read: No such file"),
        (("--trace", "bad.csv"), "bad.csv, line 2: ContextTokens 'x' is no whole number of tokens"),
        (("--trace", "empty.jsonl"), "empty.jsonl: holds no request"),
        (("--trace", "trace.txt"), "its ending does not tell the format"),
        (("--profile", "nowhere.yaml"), "nowhere.yaml: a profile cannot be read here"),
        (("--html", "model"), "--html: model cannot be written"),
        (("--timeline", "trace.csv/x/t.json"), "trace.csv is no place for a file"),
    ],
)
def test_a_clumsy_person_is_told_what_would_be_right(arguments: tuple[str, ...], said: str, folder: Path) -> None:
    (folder / "bad.csv").write_text(TRACE.splitlines()[0] + "\n2023-11-16 18:15:00.0,x,1\n")
    (folder / "empty.jsonl").write_text("")
    before = sorted(folder.rglob("*"))
    shown = run(*arguments)
    assert shown.exit_code == 2
    assert said in " ".join(shown.stderr.split())
    assert sorted(folder.rglob("*")) == before, "nothing half-written"


def test_a_topology_or_a_profile_that_does_not_fit(folder: Path) -> None:
    other = profile(folder, 0.01, fingerprint="0123456789abcdef")
    assert "measured with m" in run("--profile", other).stderr
    (folder / "t.yaml").write_text(TOPOLOGY.replace("decode: {kv_memory: 16MiB", "decode: {kv_memory: 100KiB"))
    shown = run()
    assert shown.exit_code == 2
    assert "pools.decode.kv_memory" in shown.stderr
    (folder / "t.yaml").write_text(TOPOLOGY.replace("./model", "somebody/unheard-of-9B"))
    assert "is neither a folder here nor a well-known model" in run().stderr


def test_nothing_finished_is_a_failure(folder: Path) -> None:
    shown = run("--input-tokens", "2000", "--requests", "5")
    assert shown.exit_code == 1
    assert "5 offered, 0 finished, 5 failed" in shown.stdout


def test_a_sample_is_fair_and_bounded() -> None:
    sample = Sample(100)
    for index in range(1000):
        sample.add(RequestOutcome(index, "", float(index), 1, 1))
    kept = [outcome.index for outcome in sample.kept]
    assert kept == list(range(0, 1000, 16))
