"""Goodput curves: what counts as goodput, the file, and what the picture says of itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from baton.core.errors import InvalidRequest
from curve import Curve, Point, Setting, read_curve, write_curve
from curve_plot import _footnotes, draw

SETTING = Setting("llama", 512, 128, 1.0, 0.05, 0.9, "2 cores")


def point(rate: float, attainment: float, label: str = "a") -> Point:
    return Point(label, rate, "2026-01-02T03:04:05+00:00", 60, 59, attainment, 0.2, 0.4, 0.03, 0.04, rate)


def test_goodput_ends_at_the_first_rate_under_the_target() -> None:
    curve = Curve(SETTING, [point(0.5, 1.0), point(1.0, 0.9), point(2.0, 0.95), point(1.5, 0.89), point(3.0, 0.1)])
    assert curve.goodput("a") == 1.0
    assert Curve(SETTING, [point(0.5, 0.5)]).goodput("a") == 0.0


def test_goodput_takes_the_median_of_a_rates_turns() -> None:
    turns = [point(1.0, attainment) for attainment in (0.2, 1.0, 0.95)]
    assert Curve(SETTING, turns).goodput("a") == 1.0
    assert Curve(SETTING, turns[:2]).goodput("a") == 0.0


def test_a_curve_survives_its_file(tmp_path: Path) -> None:
    curve = Curve(SETTING, [point(1.0, 0.9), replace(point(2.0, 0.0), ttft_p50=None, complaints=("x",))], ["b: failed"])
    path = tmp_path / "new" / "curve.json"
    write_curve(path, curve)
    assert read_curve(path) == curve
    assert [file.name for file in path.parent.iterdir()] == ["curve.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"format": "else"}', '{"format": "baton-goodput/1"}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "curve.json"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=r"curve\.json"):
        read_curve(path)


def test_settings_say_in_what_they_differ() -> None:
    assert SETTING.difference(SETTING) is None
    assert SETTING.difference(replace(SETTING, ttft=0.5)) == "ttft 1.0, not 0.5"


def test_the_picture_says_what_is_missing(tmp_path: Path) -> None:
    late = replace(point(2.0, 0.0, "b"), ttft_p50=None, ttft_p99=None, tpot_p50=None, tpot_p99=None, complaints=("60 failed",))
    curve = Curve(SETTING, [point(1.0, 0.9), point(2.0, 0.8), point(1.0, 1.0, "c"), late], ["c: rates above 1/s not tried"])
    notes = "\n".join(_footnotes(curve))
    assert "Not measured: b at 1/s." in notes
    assert "c: rates above 1/s not tried" in notes
    assert "b at 2/s: 60 failed" in notes
    assert "Not measured: c" not in notes  # its note says why
    draw(curve, tmp_path / "deep" / "picture")
    assert (tmp_path / "deep" / "picture.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "deep" / "picture.svg").read_text()
    assert "<svg" in svg
