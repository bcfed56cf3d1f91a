"""The committed stubs are what the .proto files give today."""

from __future__ import annotations

from pathlib import Path

from baton.proto.generate import HERE, generate


def test_committed_stubs_are_fresh(tmp_path: Path) -> None:
    written = generate(tmp_path)
    assert {path.name for path in written} == {path.name for path in HERE.glob("*_pb2*")}
    stale = [path.name for path in written if path.read_text() != (HERE / path.name).read_text()]
    assert stale == [], "run `make stubs`"
