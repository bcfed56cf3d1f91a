"""The commands in README.md are ones that `baton` takes, and its plans for small hardware are found."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from baton.cli.main import app
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("baton ")]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 8
    assert sum(command.startswith("baton plan") for command in COMMANDS) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str) -> None:
    verb, *arguments = shlex.split(command, comments=True)[1:]
    group = typer.main.get_command(app)
    found = group.get_command(group.make_context("baton", [verb]), verb)  # type: ignore[attr-defined]
    assert found is not None
    found.make_context(verb, arguments)  # raises for an option that is not there and a value of the wrong kind


def test_the_first_plan_is_found(tmp_path: Path) -> None:
    """As it stands there, with the least effort."""
    command = next(command for command in COMMANDS if command.startswith("baton plan"))
    arguments = shlex.split(command, comments=True)[1:]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "plan")
    done = CliRunner().invoke(app, [*arguments, "--quick", "--workers", "1", "--requests", "20"])
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "plan").iterdir()} == {"plan.html", "topology.yaml"}
