"""Which systems a command line asks for, and how a peer comes up and goes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from baton.core.errors import Unavailable
from baton.engine.random_model import Shape, make_model
from baton.tests.bench.conftest import FakeServer, serving
from systems import System, add_system_options, chosen_systems, vocab_size


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, Shape(64, 1, 1, 1, 64, vocab_size=300))
    return folder


def choose(model: Path, *options: str) -> list[System]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_system_options(parser, ["1p1d"])
    arguments = parser.parse_args(["--model", str(model), *options])
    assert vocab_size(arguments) == 300
    return chosen_systems(parser, arguments, ["1p1d"])


def test_baton_serves_the_model_that_peers_are_given(model: Path) -> None:
    (system,) = choose(model)
    assert system.label == "1p1d"
    assert system.topology is not None
    assert system.topology.model.path == str(model)
    assert [pool.threads for pool in system.topology.pools] == [1, 1]


def test_baton_and_peers_in_turn(model: Path) -> None:
    options = ["--baton", "mixed", "--peer", "p=http://h:1", "--peer-model", "p=m", "--start", "p=run x=1", "--stop", "p=end"]
    mixed, peer = choose(model, *options)
    assert mixed.topology is not None
    assert (mixed.title, mixed.topology.pools[0].threads) == ("Baton mixed", 2)
    assert peer == System("p", None, "http://h:1", "m", "run x=1", "end")
    assert [system.label for system in choose(model, "--baton", "", "--peer", "p=http://h:1")] == ["p"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--baton", "2p1d"], "neither 1p1d nor mixed"),
        (["--baton", "x=/nowhere.yaml"], "/nowhere.yaml"),
        (["--baton", ""], "nothing to measure"),
        (["--peer", "http://h:1"], "--peer http://h:1: give LABEL=VALUE"),
        (["--start", "p=run"], "there is no --peer p=URL"),
        (["--peer", "1p1d=http://h:1"], "the same label"),
    ],
)
def test_bad_options_are_named(model: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str) -> None:
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        choose(model, *options)
    assert complaint in capsys.readouterr().err


async def test_a_peer_is_started_asked_for_its_model_and_stopped(fake_peer: FakeServer, tmp_path: Path) -> None:
    system = System("p", None, fake_peer.url, "", f"touch {tmp_path}/up", f"mv {tmp_path}/up {tmp_path}/down")
    async with system.up() as endpoint:
        assert (endpoint.url, endpoint.model) == (fake_peer.url, "fake")
        assert (tmp_path / "up").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["down"]


async def test_a_peer_is_stopped_when_its_turn_fails(fake_peer: FakeServer, tmp_path: Path) -> None:
    system = System("p", None, fake_peer.url, "named", "", f"touch {tmp_path}/down")

    async def lose_it() -> None:
        async with system.up() as endpoint:
            raise Unavailable(f"{endpoint.model} was lost")

    with pytest.raises(Unavailable, match="named was lost"):
        await lose_it()
    assert (tmp_path / "down").exists()


async def test_a_start_that_fails_is_said() -> None:
    with pytest.raises(Unavailable, match="p: `exit 3` ended with status 3"):
        async with System("p", None, "http://127.0.0.1:9", "", "exit 3").up():
            raise AssertionError


@pytest.fixture
async def fake_peer() -> FakeServer:
    async with serving() as server:
        yield server
