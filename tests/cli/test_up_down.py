"""A cluster's life from the command line: real processes, fake members."""

from __future__ import annotations

import json
import os
import signal
import socket
from dataclasses import asdict

import pytest
from baton.deploy.process import WatchedProcess
from baton.deploy.state import ClusterRecord

pytestmark = pytest.mark.cluster


def _read_until(pipe, text: str) -> str:
    """What `pipe` says up to a line with `text`."""
    lines = []
    for line in pipe:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"ended without {text!r}: {''.join(lines)}")


def test_up_runs_until_ctrl_c_and_leaves_nothing(baton, topology):
    process = baton.start("up", topology)
    said = _read_until(process.stdout, "curl")
    record = baton.record()
    assert (record["cluster"], record["status"], record["pid"]) == ("clitest", "ready", process.pid)
    assert "clitest is ready" in said
    assert f"http://{record['http']}/v1/chat/completions" in said
    assert len(baton.processes()) == 4  # itself, two workers, one router

    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "prefill-0 starting" in complaints
    assert "decode-0 ready" in complaints
    assert baton.processes() == []
    assert not (baton.state / "clitest.json").exists()


def test_detach_status_second_up_and_down(baton, topology):
    up = baton.run("up", topology, "--detach")
    assert up.exit_code == 0, up.stderr
    assert "clitest is ready" in up.stdout
    (cluster,) = baton.clusters()
    assert (cluster["cluster"], cluster["waiting_for"], cluster["launcher"]) == ("clitest", "", "subprocess")
    members = {member["member"]: member for member in cluster["members"]}
    assert {name: (m["role"], m["state"], m["restarts"]) for name, m in members.items()} == {
        "prefill-0": ("prefill", "ready", 0),
        "decode-0": ("decode", "ready", 0),
        "router-0": ("router", "ready", 0),
    }
    decode = members["decode-0"]
    assert [decode[key] for key in ("running", "free_blocks", "total_blocks", "tickets")] == [2, 7, 9, 1]
    assert members["prefill-0"]["free_blocks"] is None

    table = baton.run("status")
    assert table.exit_code == 0
    assert "clitest ready" in table.stdout
    assert "7/9" in table.stdout

    for detach in ((), ("--detach",)):
        second = baton.run("up", topology, *detach)
        assert second.exit_code == 1
        assert f"cluster clitest is already running (process {cluster['pid']}, gRPC {cluster['grpc']}" in second.stderr

    os.kill(decode["pid"], signal.SIGKILL)
    while (after := {m["member"]: m for m in baton.clusters()[0]["members"]})["decode-0"]["restarts"] == 0:
        continue  # each look is a call to the controller, so this does not spin for long
    assert after["prefill-0"]["pid"] == members["prefill-0"]["pid"]

    down = baton.run("down", topology)
    assert (down.exit_code, down.stderr) == (0, "clitest has ended\n")
    assert baton.processes() == []
    assert baton.clusters() == []
    again = baton.run("down", "clitest")
    assert again.exit_code == 1
    assert "cluster clitest is not running on this machine" in again.stderr


def test_what_a_killed_up_left_behind_is_cleaned_up(baton, topology):
    assert baton.run("up", topology, "--detach").exit_code == 0
    _kill(baton.record()["pid"])
    orphans = {process.pid for process in baton.processes()}
    assert len(orphans) == 3
    assert baton.clusters() == []  # the record of the dead process does not count
    assert baton.run("up", topology, "--detach").exit_code == 0
    assert not orphans & {process.pid for process in baton.processes()}

    # A second one beside it: now they have to be told apart.
    assert baton.run("up", topology, "--detach", "--name", "other").exit_code == 0
    unclear = baton.run("down")
    assert unclear.exit_code == 2
    assert "several clusters are running, say which: clitest, other" in unclear.stderr
    assert baton.run("down", "other").exit_code == 0
    assert baton.run("down").exit_code == 0


def _kill(pid: int) -> None:
    process = WatchedProcess(pid)
    process.signal(signal.SIGKILL)
    assert process.wait(10)
    process.close()


def test_a_cluster_that_cannot_start_says_why(baton, topology, monkeypatch):
    monkeypatch.setenv("FAKE_MEMBER", "exit")
    up = baton.run("up", topology, "--detach")
    assert up.exit_code == 1
    assert "has failed to start 5 times: ended with exit status 7" in up.stderr
    assert "a fake member that will not start" in up.stderr
    assert baton.processes() == []
    assert baton.clusters() == []


@pytest.mark.parametrize("detach", [(), ("--detach",)], ids=["foreground", "detached"])
def test_a_bad_topology_is_bad_usage(baton, topology, detach):
    topology.write_text(topology.read_text().replace("clitest", "Bad Name").replace("subprocess", "k8s"))
    up = baton.run("up", topology, *detach)
    assert up.exit_code == 2
    assert f"{topology}:1: cluster: 'Bad Name' is not allowed" in up.stderr
    assert f"{topology}:7: launcher: 'k8s' is not allowed; allowed: one of ray, subprocess" in up.stderr


def test_a_taken_port_is_named(baton, topology):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        topology.write_text(topology.read_text().replace('http: "127.0.0.1:0"', f'http: "127.0.0.1:{port}"'))
        up = baton.run("up", topology)
    assert up.exit_code == 2
    assert f"{topology}:6: router.http: port {port} on 127.0.0.1 is taken" in up.stderr


@pytest.mark.parametrize(
    "arguments", [("up",), ("up", "nowhere.yaml"), ("up", "x.yaml", "--launcher", "k8s"), ("frobnicate",), ("down", "a", "b")]
)
def test_bad_usage(baton, arguments):
    assert baton.run(*arguments).exit_code == 2


def test_a_cluster_whose_ray_is_gone_can_be_forgotten(baton, topology):
    pytest.importorskip("ray")
    baton.state.mkdir(parents=True)
    gone = ClusterRecord("clitest", 0, "ray", "ready", "", "127.0.0.1:1", "", "127.0.0.1:1", ray_address="127.0.0.1:1")
    (baton.state / "clitest.json").write_text(json.dumps(asdict(gone)))
    assert "clitest" in baton.run("status").stdout
    down = baton.run("down", "clitest")
    assert down.exit_code == 1
    assert "no Ray cluster at 127.0.0.1:1 (ray.address): Connection refused" in down.stderr
    assert "is not running" in baton.run("down", "clitest").stderr


def test_no_ray_at_the_address(baton, topology):
    pytest.importorskip("ray")
    topology.write_text(topology.read_text().replace("subprocess", "ray") + "ray: {address: '127.0.0.1:1'}\n")
    up = baton.run("up", topology)
    assert up.exit_code == 1
    assert "no Ray cluster at 127.0.0.1:1 (ray.address): Connection refused" in up.stderr
