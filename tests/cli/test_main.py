"""The command itself: its verbs, what it imports, and what it says to a clumsy person."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from baton.cli.main import app
from baton.deploy import checks
from typer.testing import CliRunner, Result

VERBS = ("up", "down", "status", "chat", "bench", "demo", "simulate", "make-model")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "local_gpus", tuple)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_help_shows_every_verb_with_a_sentence(state: Path) -> None:
    shown = run("--help").stdout
    for verb in VERBS:
        assert f"│ {verb} " in shown
    assert "Start the cluster that FILE describes" in shown


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_the_real_one(verb: str, state: Path) -> None:
    shown = run(verb, "--help")
    assert shown.exit_code == 0
    assert "--" in shown.stdout.replace("--help", "") or verb in ("down",)


def test_a_verb_imports_no_other() -> None:
    code = "import sys, baton.cli.main as m; m.app(['status'], standalone_mode=False); print([*sys.modules])"
    asked = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("torch", "ray", "transformers", "fastapi", "httpx", "jinja2", "baton.cli.bench", "baton.cli.demo"):
        assert f"'{heavy}'" not in asked.stdout, heavy
    assert "'baton.cli.status'" in asked.stdout


CLUMSY = [
    (("stat",), "No such command 'stat'. Did you mean 'status'?"),
    (("up", "nowhere.yaml"), "nowhere.yaml: there is no such file; needed: a topology file"),
    (("up", "folder"), "folder: this is a folder; needed: a topology file"),
    (("up", "binary.yaml"), "binary.yaml: this is not text; needed: a topology file"),
    (("up", "empty.yaml"), "empty.yaml:1: a topology is a mapping with at least cluster, model, pools; this file holds nothing"),
    (("up", "tab.yaml"), "tab.yaml:2: this is not YAML: found character '\\t' that cannot start any token; indent with spaces"),
    (
        ("up", "quoted.yaml"),
        "quoted.yaml:3: pools.mixed.replicas: '2' is not allowed; allowed: a whole number from 1 to 1024, wri",
    ),
    (("up", "gpu.yaml"), "gpu.yaml:3: pools.mixed.accelerator: 'H100' asks for a GPU, and nvidia-smi finds none on this machine"),
    (("status", "nowhere.yaml"), "nowhere.yaml: there is no such file"),
    (("demo", "--rate", "0"), "Invalid value for '--rate'"),
    (("demo", "--seconds", "-3"), "Invalid value for '--seconds'"),
    (("demo", "--prompts", "nowhere.txt"), "--prompts: nowhere.txt cannot be read: No such file or directory"),
    (("bench",), "give either --url http://host:port or --grpc host:port"),
    (("bench", "--grpc", "127.0.0.1:1", "--slo-ttft", "-1"), "Invalid value for '--slo-ttft'"),
    (("make-model", "--out", "folder/file", "--params", "1M"), "--out: folder/file is a file; needed: a folder"),
    (("make-model", "--out", "folder", "--params", "1M"), "--out: folder holds something else than a model; needed: a folder"),
    (("make-model", "--out", "/proc/x", "--params", "1M"), "--out: /proc/x cannot be written"),
    (("make-model", "--out", "new", "--params", "abc"), "model size 'abc' cannot be read; write a number and K, M or B"),
]


@pytest.mark.parametrize(
    ("arguments", "said"), CLUMSY, ids=lambda value: "-".join(value)[:30] if isinstance(value, tuple) else ""
)
def test_a_clumsy_person_is_told_what_would_be_right(arguments: tuple[str, ...], said: str, state: Path) -> None:
    (state / "folder").mkdir()
    (state / "folder" / "file").write_text("mine")
    (state / "binary.yaml").write_bytes(b"\xff\xfe\x00\xe1")
    (state / "empty.yaml").write_text("")
    (state / "tab.yaml").write_text("cluster: x\n\tmodel: y\n")
    (state / "quoted.yaml").write_text('cluster: x\nmodel: {path: ./m}\npools: {mixed: {replicas: "2"}}\n')
    (state / "gpu.yaml").write_text("cluster: x\nmodel: {path: ./m}\npools: {mixed: {accelerator: H100}}\nlauncher: subprocess\n")
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split()).replace("│ ", "") or said in result.stderr
    assert not (state / "new").exists()


def test_a_server_that_is_not_there(state: Path) -> None:
    result = run("bench", "--grpc", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "no Baton router answers at 127.0.0.1:1 (`baton status` shows where one does)" in result.stderr
