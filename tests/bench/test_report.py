"""What a run leaves on disk, and on the terminal."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from baton.bench.console import LiveProgress, describe, print_summary
from baton.bench.metrics import summarise
from baton.bench.plots import figures
from baton.bench.records import LoadProgress, LoadResult, RequestRecord
from baton.bench.report import seconds, write_html, write_json
from baton.core.slo import Slo
from rich.console import Console

SLO = Slo(ttft=0.5, tpot=0.05, attainment=0.9)


@pytest.fixture
def result() -> LoadResult:
    good = []
    for number in range(8):
        at = number * 0.5
        times = tuple(at + 0.1 + 0.02 * token for token in range(3))
        good.append(RequestRecord(number, 10, 3, at, at + 0.001, times, (), 3, 10, at + 0.15, "length"))
    late = replace(good[0], index=8, offered=4.0, sent=4.0, chunk_times=(5.0, 5.02, 5.0412345678), end=5.05)
    shed = RequestRecord(9, 10, 3, 4.5, 4.5, end=4.6, error="http 429", message="<script>alert(1)</script> & more")
    return LoadResult("http://server/v1 (m)", "2031-01-01T00:00:00+00:00", 5.1, 10, (*good, late, shed), (0.001,) * 20)


def test_json_holds_settings_figures_and_every_raw_time(result: LoadResult, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_json(path, result, summarise(result, SLO), SLO, {"seed": 3, "workload": "Poisson"})
    document = json.loads(path.read_text())
    assert document["settings"] == {"target": "http://server/v1 (m)", "seed": 3, "workload": "Poisson"}
    assert document["slo"] == {"ttft": 0.5, "tpot": 0.05, "attainment": 0.9}
    assert document["summary"]["attainment"] == 0.8
    assert document["summary"]["errors"] == {"http 429": 1}
    assert document["summary"]["client_lag"]["p99"] == pytest.approx(0.001)
    assert len(document["requests"]) == 10
    assert document["requests"][8]["chunk_times"] == [5.0, 5.02, 5.041235]
    assert document["requests"][9]["message"].startswith("<script>")
    again = [
        RequestRecord(**(raw | {"chunk_times": tuple(raw["chunk_times"]), "chunk_tokens": ()})) for raw in document["requests"]
    ]
    figured = summarise(replace(result, records=tuple(again)), SLO)
    assert figured.num_met == 8, "the figures can be had again from the file"


def test_html_is_one_file_with_the_figures_and_safe_from_what_servers_say(result: LoadResult, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    summary = summarise(result, SLO, 2)
    write_html(path, result, summary, SLO, {"seed": 3, "absent": None}, title="A & B", facts=[("handoff", "1.2 ms")])
    page = path.read_text()
    for text in (
        "A &amp; B",
        "80.0 %",
        "handoff",
        "1.2 ms",
        "target 90 %",
        "http 429",
        "objective 500 ms",
        "1 × http 429",
        "open loop",
    ):
        assert text in page, text
    assert "<script" not in page
    assert "absent" not in page
    assert not re.search(r"(src|href)=|url\(|@import", page), "nothing is loaded from elsewhere"
    assert page.count("<svg") == page.count("</svg>") == 5


def test_every_figure_is_well_formed_and_shows_every_request(result: LoadResult) -> None:
    made = figures(result, SLO)
    assert [figure.title for figure in made] == [
        "Time to first token",
        "TTFT distribution",
        "TPOT distribution",
        "Arrivals and completions",
        "Every request",
    ]
    first = ElementTree.fromstring(made[0].svg)
    assert len(first.findall("circle")) == 9
    assert [mark.get("class") for mark in first.findall("path") if mark.get("class") == "failed"] == ["failed"]
    assert made[0].legend == (("met", "met both objectives (8)"), ("missed", "missed one (1)"), ("failed", "failed (1)"))
    lives = ElementTree.fromstring(made[4].svg)
    assert [bar.get("class") for bar in lives.findall("rect")].count("waiting") == 9
    for figure in made:
        ElementTree.fromstring(figure.svg)


def test_long_runs_are_thinned_where_single_requests_cannot_be_seen(result: LoadResult) -> None:
    many = tuple(replace(result.records[0], index=number, offered=number * 0.001) for number in range(2000))
    made = {figure.title: figure for figure in figures(replace(result, records=many), SLO)}
    assert made["One request in 7"].svg.count("<rect") == 2 * 286
    assert made["Time to first token"].svg.count("<circle") == 2000
    assert len(made["Arrivals and completions"].svg) < 60_000


@pytest.mark.parametrize("count", [0, 1])
def test_tiny_runs_have_a_report_too(result: LoadResult, tmp_path: Path, count: int) -> None:
    tiny = replace(result, records=result.records[9:][:count], interrupted=True)
    write_html(tmp_path / "r.html", tiny, summarise(tiny, SLO), SLO, {})
    assert f"stopped early: {count} of 10" in (tmp_path / "r.html").read_text()


def test_the_terminal_table(result: LoadResult) -> None:
    out = io.StringIO()
    slow = replace(result, loop_lags=(0.2,) * 20)
    print_summary(Console(file=out, width=140), summarise(slow, SLO, 2), SLO, [("handoff", "1.2 ms, 14 GB/s")], "Demo")
    text = out.getvalue()
    parts = (
        "Demo",
        "TTFT",
        "TPOT",
        "p99",
        "10 offered, 9 finished, 1 failed: 1 x http 429",
        "80.0% of all offered",
        "(target 90%",
    )
    more = ("1.57 requests/s within the objectives (0.78 per worker)", "handoff", "14 GB/s", "Do not trust these figures")
    for part in parts + more:
        assert part in text, part


def test_the_live_line(result: LoadResult) -> None:
    progress = LoadProgress(2.0, 10, 7, 4, 1, 300, 0.25)
    assert describe(progress) == "4 finished · 2 running · [red]1 failed[/] · TTFT p50 250 ms · 150 tok/s"
    out = io.StringIO()
    with LiveProgress(Console(file=out, width=120, force_terminal=True), 10) as live:
        live.update(progress)
    assert "7/10" in out.getvalue()


@pytest.mark.parametrize(
    ("value", "text"), [(0.0012, "1.2 ms"), (0.25, "250 ms"), (1.234, "1.23 s"), (34.56, "34.6 s"), (0.0, "0.0 ms")]
)
def test_seconds_as_people_read_them(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize("width", [56, 80])
def test_no_number_of_the_table_is_cut_or_wrapped(result: LoadResult, width: int) -> None:
    out = io.StringIO()
    print_summary(Console(file=out, width=width), summarise(result, SLO, 2), SLO)
    (row,) = [line for line in out.getvalue().splitlines() if line.startswith("TTFT")]
    assert "…" not in out.getvalue()
    assert len(re.findall(r"[0-9.]+ m?s\b", row)) == (4 if width < 76 else 6)


def test_wide_figures_take_the_page_and_halves_come_in_pairs(result: LoadResult) -> None:
    halves = [index for index, figure in enumerate(figures(result, SLO)) if not figure.wide]
    assert halves == [1, 2]
