"""What the tests of the command line share: a model folder, a topology, and a `baton` whose members are fakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from baton.cli.main import app
from click.testing import Result
from typer.testing import CliRunner

HERE = Path(__file__).resolve().parent
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
TOPOLOGY = """\
cluster: clitest
model: {path: ./model}
pools:
  prefill: {kv_memory: 16MiB}
  decode: {kv_memory: 16MiB}
router: {grpc: "127.0.0.1:0", http: "127.0.0.1:0"}
launcher: subprocess
"""


@pytest.fixture
def topology(tmp_path: Path) -> Path:
    """A topology file beside a model folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x" * 100)
    file = tmp_path / "t.yaml"
    file.write_text(TOPOLOGY)
    return file


class Baton:
    """The command. `run` calls it in this process, which saves the seconds that an interpreter takes to start; what it
    starts are processes all the same."""

    def __init__(self, tmp_path: Path) -> None:
        self.state = tmp_path / "state" / "baton"

    def run(self, *arguments: str | Path) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "baton.cli.main", *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def clusters(self) -> list[dict]:
        return json.loads(self.run("status", "--json").stdout)

    def record(self) -> dict:
        return json.loads((self.state / "clitest.json").read_text())

    def processes(self) -> list[psutil.Process]:
        """Everything that was started with this state folder, members too."""
        mine = ("XDG_STATE_HOME", str(self.state.parent))
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and mine in process.environ().items() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found


@pytest.fixture
def baton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Baton]:
    """The command; whatever it leaves behind is a failure, and is ended."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE / "fakes"), str(HERE.parent / "deploy")]))
    monkeypatch.setenv("COLUMNS", "200")
    command = Baton(tmp_path)
    yield command
    left = command.processes()
    for process in left:
        process.kill()
    assert left == []
