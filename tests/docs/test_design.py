"""docs/design.md speaks of files and events that exist, and of every event that does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from baton.kv_transfer import handoff
from baton.router import events

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


def listed(*headings: str) -> set[str]:
    """The names in the table rows with these headings."""
    rows = dict(re.findall(r"^\| ([a-z, ]+) \| ([A-Z][A-Za-z, ]+) \|$", TEXT, re.MULTILINE))
    return {name for heading in headings for name in rows[heading].split(", ")}


def names(union: object) -> set[str]:
    return {each.__name__ for each in get_args(union)}


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|md|proto))`", TEXT))
    assert len(named) > 30
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_the_lifecycles_vocabulary_is_complete() -> None:
    assert listed("events of clients", "events of attempts", "events of workers", "time") == names(events.Event)
    assert listed("actions") == names(events.Action)


def test_the_handoffs_vocabulary_is_complete() -> None:
    assert listed("receiver, events") == names(handoff.ReceiverEvent)
    assert listed("receiver, actions") == names(handoff.ReceiverAction)
    assert listed("sender, events") == names(handoff.SenderEvent)
    assert listed("sender, actions") == names(handoff.SenderAction)
