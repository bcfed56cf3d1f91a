"""The command as a person types it, with real workers and the shipped model: nothing is faked, and nothing may be left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200)]

MODEL = Path(__file__).parents[2] / "examples" / "model" / "pydoc-llama"
TOPOLOGY = f"""\
cluster: real
model: {{path: {MODEL}, max_model_len: 512}}
slo: {{ttft: 30, tpot: 30}}
pools:
  prefill: {{kv_memory: 16MiB, block_size: 16}}
  decode: {{kv_memory: 16MiB, block_size: 16}}
router: {{grpc: "127.0.0.1:0", http: "127.0.0.1:0"}}
launcher: subprocess
"""


class Baton:
    """The command in processes of its own, with a state folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"XDG_STATE_HOME": str(folder / "state"), "COLUMNS": "80"}
        self.topology = folder / "real.yaml"
        self.topology.write_text(TOPOLOGY)

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-W", "ignore", "-m", "baton.cli.main", *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=self.folder, env=self.environment)

    def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        process = self.start(*arguments)
        said, complaints = process.communicate(timeout=120)
        return process.returncode, said, complaints

    def processes(self) -> list[psutil.Process]:
        """Everything that was started with this state folder."""
        mine = ("XDG_STATE_HOME", self.environment["XDG_STATE_HOME"])
        found = []
        for process in psutil.process_iter():
            try:
                if mine in process.environ().items() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found


def leftovers() -> set[str]:
    """Shared memory and Ray folders of anybody."""
    return {str(path) for folder, names in (("/dev/shm", "*"), ("/tmp", "baton-ray-*")) for path in Path(folder).glob(names)}


@pytest.fixture
def baton(tmp_path: Path) -> Iterator[Baton]:
    """The command; what it leaves behind is a failure, and is ended."""
    before, command = leftovers(), Baton(tmp_path)
    yield command
    left = command.processes()
    for process in left:
        process.kill()
    assert left == []
    in_use = {memory.path for process in psutil.process_iter() for memory in _maps(process)}
    assert {path for path in leftovers() - before if path not in in_use} == set()


def _maps(process: psutil.Process) -> list:
    try:
        return process.memory_maps()
    except (psutil.Error, OSError):
        return []


def test_up_status_chat_bench_down(baton: Baton) -> None:
    code, said, complaints = baton.run("up", baton.topology, "--detach")
    assert code == 0, complaints
    assert "real is ready" in said
    grpc = re.search(r"gRPC  (\S+)", said)[1]

    code, said, _ = baton.run("status", "--json")
    (cluster,) = json.loads(said)
    assert (code, cluster["waiting_for"]) == (0, "")
    assert {m["member"]: m["free_blocks"] for m in cluster["members"]}["decode-0"] > 0

    code, said, _ = baton.run("chat", "What does os.path.join do?", "--temperature", "0")
    assert code == 0
    assert "os.path.join" in said

    load = ("--requests", "6", "--rate", "50", "--input-len", "20", "--output-len", "8")
    code, said, complaints = baton.run("bench", "--grpc", grpc, *load, "--html", "bench.html")
    assert code == 0, complaints
    assert "6 offered, 6 finished, 0 failed" in said
    assert not re.search(r"[\x1b\r]|━━ *\d+/", said), "escape codes or a progress bar in a pipe"
    assert "<svg" in (baton.folder / "bench.html").read_text()

    code, _, complaints = baton.run("up", baton.topology)
    assert code == 1
    assert f"cluster real is already running (process {cluster['pid']}, gRPC {grpc}" in complaints
    other = (
        baton.topology.read_text().replace('grpc: "127.0.0.1:0"', f'grpc: "{grpc}"').replace("cluster: real", "cluster: other")
    )
    (baton.folder / "other.yaml").write_text(other)
    code, _, complaints = baton.run("up", "other.yaml", "--detach")
    assert code == 2
    assert f"other.yaml:7: router.grpc: port {grpc.rpartition(':')[2]} on 127.0.0.1 is taken" in complaints

    assert baton.run("down") == (0, "", "real has ended\n")
    assert baton.processes() == []
    code, _, complaints = baton.run("down", "real")
    assert (code, complaints) == (1, "error: cluster real is not running on this machine; none is\n")


def test_ctrl_c_ends_a_foreground_up(baton: Baton) -> None:
    process = baton.start("up", baton.topology)
    assert process.stdout is not None
    for line in process.stdout:
        if "curl" in line:
            break
    assert len(baton.processes()) == 4  # itself, two workers, one router
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=60)
    assert process.returncode == 0, complaints
    assert baton.processes() == []


def test_a_demo_on_ray(baton: Baton) -> None:
    pytest.importorskip("ray")
    baton.topology.write_text(TOPOLOGY.replace("launcher: subprocess", "launcher: ray"))
    (baton.folder / "prompts.txt").write_text("Hello!\n")
    demo = ("demo", baton.topology, "--prompts", "prompts.txt", "--seconds", "3", "--rate", "3")
    code, said, complaints = baton.run(*demo)
    assert code == 0, said + complaints
    assert "> Hello!" in said
    assert "finished, 0 failed" in said
    assert re.search(r"handoffs +\d+ over shm", said)
    assert "back at baseline" in said
    assert "\x1b" not in said
    assert (baton.folder / "out" / "demo.html").is_file()
