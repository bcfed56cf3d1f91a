"""A Ray cluster that was there before Baton, as after `ray up`: Baton lives on it, heals on it, and leaves it as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from baton.deploy.ports import free_port

pytest.importorskip("ray")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

MODEL = Path(__file__).parents[2] / "examples" / "model" / "pydoc-llama"
TOPOLOGY = """\
cluster: guest
model: {{path: {model}, max_model_len: 256}}
pools:
  prefill: {{kv_memory: 16MiB, block_size: 16}}
  decode: {{kv_memory: 16MiB, block_size: 16}}
router: {{grpc: "127.0.0.1:0", http: "127.0.0.1:0"}}
launcher: ray
ray: {{address: "{address}", placement: spread}}
"""
# Asked in a process of its own: a driver here would change what the next test files find.
WHAT_IS_LEFT = """
import json, ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
actors = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True)]
groups = [g["name"] for g in ray.util.placement_group_table().values() if g["state"] not in ("REMOVED",)]
nodes = [n["Alive"] for n in ray.nodes()]
print(json.dumps({"actors": actors, "groups": groups, "nodes": nodes, "cpus": ray.available_resources().get("CPU")}))
"""


@dataclass(frozen=True)
class RunningRay:
    """A Ray of two nodes on this host, one CPU each, and a `baton` that keeps its state in `folder`."""

    address: str
    folder: Path
    processes: list[subprocess.Popen[bytes]]

    def python(self, *arguments: str, timeout: float = 90) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-W", "ignore", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment(self.folder))

    def baton(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "baton.cli.main", *arguments)

    def left(self) -> dict[str, object]:
        asked = self.python("-c", WHAT_IS_LEFT, self.address)
        assert asked.returncode == 0, asked.stderr
        return json.loads(asked.stdout.splitlines()[-1])

    def members(self) -> dict[str, dict]:
        asked = self.baton("status", "guest", "--json")
        (cluster,) = json.loads(asked.stdout)
        return {member["member"]: member for member in cluster["members"]} if not cluster["waiting_for"] else {}


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"XDG_STATE_HOME": str(folder), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture
def running_ray() -> Iterator[RunningRay]:
    with tempfile.TemporaryDirectory(prefix="rt-", dir="/tmp", ignore_cleanup_errors=True) as name:  # Ray's sockets want it short
        folder = Path(name)
        address = f"127.0.0.1:{free_port('127.0.0.1')}"
        ray = RunningRay(address, folder, [])
        common = ["--block", "--num-cpus=1", "--object-store-memory=80000000", "--node-ip-address=127.0.0.1"]
        head = ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false", f"--temp-dir={folder / 'ray'}"]
        try:
            for options in (head, [f"--address={address}"]):
                ray.processes.append(_start(ray, [*options, *common]))
            yield ray
        finally:
            _end(ray.processes)


def _start(ray: RunningRay, options: list[str]) -> subprocess.Popen[bytes]:
    """`ray start` in the foreground; returns when it says that it runs."""
    log = ray.folder / f"start-{len(ray.processes)}.log"
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *options]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(ray.folder), start_new_session=True)
    deadline = time.monotonic() + 60
    while b"Ray runtime started" not in log.read_bytes():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return process


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to each `ray start`, which ends its node; then whatever is left of them."""
    family = [psutil.Process(process.pid) for process in processes if process.poll() is None]
    family += [child for parent in family for child in parent.children(recursive=True)]
    for process in reversed(processes):
        process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=15)
    for process in alive:
        process.kill()
    for process in processes:
        process.wait(10)


def test_baton_is_a_guest_on_a_running_ray(running_ray: RunningRay) -> None:
    topology = running_ray.folder / "guest.yaml"
    topology.write_text(TOPOLOGY.format(model=MODEL, address=running_ray.address))
    up = running_ray.baton("up", str(topology), "--detach")
    assert up.returncode == 0, up.stdout + up.stderr
    first = running_ray.members()
    assert {name: member["state"] for name, member in first.items()} == dict.fromkeys(
        ("prefill-0", "decode-0", "router-0"), "ready"
    )
    answer = running_ray.baton("chat", "--cluster", "guest", "Hello!", "--max-tokens", "8")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()

    second = running_ray.baton("up", str(topology), "--detach")
    assert second.returncode == 1
    assert "guest is already running" in second.stderr

    for victim in ("decode-0", "router-0"):
        os.kill(first[victim]["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not (now := running_ray.members()) or any(now[name]["restarts"] == 0 for name in ("decode-0", "router-0")):
        assert time.monotonic() < deadline, running_ray.baton("status").stdout
    assert now["prefill-0"]["pid"] == first["prefill-0"]["pid"]

    down = running_ray.baton("down", "guest")
    assert down.returncode == 0, down.stderr
    assert not any(psutil.pid_exists(member["pid"]) for member in now.values())
    left = running_ray.left()
    assert (left["actors"], left["groups"], left["nodes"]) == ([], [], [True, True])
    assert left["cpus"] == 2.0
    assert all(process.poll() is None for process in running_ray.processes)
    assert running_ray.baton("down", "guest").returncode == 1
