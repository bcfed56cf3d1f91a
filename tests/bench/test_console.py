"""The live line: one that changes on a terminal, whatever its width, and plain lines in a file."""

from __future__ import annotations

import io

import pytest
from baton.bench.console import LiveProgress
from baton.bench.records import LoadProgress
from rich.console import Console


def _progress(elapsed: float) -> LoadProgress:
    return LoadProgress(elapsed, 133, 100, 90, 2, 5000, 0.0361)


def test_a_file_gets_a_plain_line_now_and_then() -> None:
    file = io.StringIO()
    with LiveProgress(Console(file=file, width=40), 133) as live:
        for tenth in range(120):
            live.update(_progress(tenth / 10))
    lines = file.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0] == "  5 s  offered 100/133 · 90 finished · 8 running · 2 failed · TTFT p50 36.1 ms · 1000 tok/s"


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_terminal_gets_one_line_and_the_counts_whole(width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with LiveProgress(console, 133) as live:
        live.update(_progress(5.0))
        live._progress.refresh()
        shown = file.getvalue()
    assert "100/133" in shown
    assert "90 finished" in shown
    assert all(len(line) <= width for line in console.render_str(shown).plain.split("\r") if "\x1b" not in line)
    assert ("━" in shown) == (width == 160)
    assert "\n" not in shown.strip("\n")
