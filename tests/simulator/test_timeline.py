"""The file, read back as its format says: names, groups, microseconds, and what is left out."""

from __future__ import annotations

import json
import math
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from baton.core.errors import InternalError, InvalidRequest
from baton.simulator.timeline import Timeline
from hypothesis import given
from hypothesis import strategies as st


def read(timeline: Timeline, path: Path) -> dict:
    timeline.write(path)
    assert list(path.parent.iterdir()) == [path], "nothing half-written stays behind"
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def names(document: dict) -> dict[tuple[int, int], tuple[str, str]]:
    """(process, thread) to (group, row), from the metadata events."""
    metadata = [event for event in document["traceEvents"] if event["ph"] == "M"]
    groups = {event["pid"]: event["args"]["name"] for event in metadata if event["name"] == "process_name"}
    rows = {(event["pid"], event["tid"]): event["args"]["name"] for event in metadata if event["name"] == "thread_name"}
    return {place: (groups[place[0]], row) for place, row in rows.items()}


def test_spans_stand_on_named_rows_of_named_groups_in_microseconds(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.span("workers/prefill-0", "step 1", 0.001, 0.0035, tokens=512, kind="prefill", share=0.5)
    timeline.span("requests/7", "decode", 1.0, 1.0)
    timeline.span("workers/decode-0", "step 1", 0.002, 0.003)
    timeline.span("network", "transfer", 0.0, 1e-9)
    document = read(timeline, tmp_path / "t.json")
    rows = names(document)
    assert list(rows.values()) == [
        ("workers", "prefill-0"), ("requests", "7"), ("workers", "decode-0"), ("network", "network"),
    ]  # fmt: skip
    spans = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert [rows[span["pid"], span["tid"]] for span in spans] == list(rows.values())
    assert (spans[0]["ts"], spans[0]["dur"], spans[0]["name"]) == (1000.0, 2500.0, "step 1")
    assert spans[0]["args"] == {"tokens": 512, "kind": "prefill", "share": 0.5}
    assert (spans[1]["ts"], spans[1]["dur"]) == (1e6, 0)
    for event in document["traceEvents"]:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event.get("ts", 0.0), float | int)
        assert event.get("dur", 0) >= 0


def test_counters_of_two_workers_are_two_counters(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.counter("workers/decode-0", "KV used", 0.5, 0.25)
    timeline.counter("workers/decode-1", "KV used", 0.5, 0.75)
    events = [event for event in read(timeline, tmp_path / "t.json")["traceEvents"] if event["ph"] == "C"]
    # A counter is known by (pid, name); its values are the numbers in args.
    assert len({(event["pid"], event["name"]) for event in events}) == 2
    assert [(event["ts"], event["args"]) for event in events] == [(5e5, {"KV used": 0.25}), (5e5, {"KV used": 0.75})]


def test_spans_that_touch_still_touch_when_rounded(tmp_path: Path) -> None:
    timeline = Timeline()
    moments = [step / 7e5 for step in range(200)]
    for begin, end in pairwise(moments):
        timeline.span("workers/w", "step", begin, end)
    spans = [event for event in read(timeline, tmp_path / "t.json")["traceEvents"] if event["ph"] == "X"]
    for earlier, later in pairwise(spans):
        assert earlier["ts"] + earlier["dur"] == pytest.approx(later["ts"], abs=1e-6)


def test_spans_that_cross_are_shown_on_rows_of_their_own(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.span("workers/w", "outer", 0.0, 4.0)
    timeline.span("workers/w", "inner", 1.0, 2.0)  # nests: same row
    timeline.span("workers/w", "crosses", 3.0, 6.0)
    timeline.span("workers/v", "other", 3.0, 6.0)
    timeline.span("workers/w", "after", 4.0, 5.0)
    document = read(timeline, tmp_path / "t.json")
    rows = names(document)
    shown = {event["name"]: rows[event["pid"], event["tid"]][1] for event in document["traceEvents"] if event["ph"] == "X"}
    assert shown == {"outer": "w", "inner": "w", "crosses": "w (2)", "other": "v", "after": "w"}
    assert list(rows.values()) == [("workers", "w"), ("workers", "w (2)"), ("workers", "v")]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted), max_size=30))
def test_no_two_spans_of_a_row_ever_cross(spans: list[list[int]]) -> None:
    timeline = Timeline()
    for begin, end in spans:
        timeline.span("workers/w", "step", begin / 7, end / 7)
    by_row: dict[int, list[tuple[float, float]]] = {}
    for event in timeline._trace_events():
        if event["ph"] == "X":
            by_row.setdefault(event["tid"], []).append((event["ts"], round(event["ts"] + event["dur"], 3)))
    assert sum(map(len, by_row.values())) == len(spans)
    for row in by_row.values():
        for one, other in combinations(row, 2):
            apart = one[1] <= other[0] or other[1] <= one[0]
            nested = (one[0] <= other[0] and other[1] <= one[1]) or (other[0] <= one[0] and one[1] <= other[1])
            assert apart or nested


def test_what_comes_after_the_bound_is_counted_and_the_file_says_so(tmp_path: Path) -> None:
    timeline = Timeline(max_spans=3)
    for number in range(5):
        timeline.span("requests/0", "step", number, number + 1)
    timeline.counter("workers/w", "queue", 9.0, 1.0)
    document = read(timeline, tmp_path / "t.json")
    assert timeline.num_left_out == 3
    assert document["otherData"] == {"left out": 3}
    assert names(document) == {(1, 1): ("requests (3 later events left out)", "0")}
    assert sum(event["ph"] == "X" for event in document["traceEvents"]) == 3


def test_an_empty_timeline_is_a_file_that_opens(tmp_path: Path) -> None:
    assert read(Timeline(), tmp_path / "new" / "t.json")["traceEvents"] == []


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    timeline = Timeline()
    for begin, end in ((2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(InternalError, match=r"workers/w: step from .* must end, and not before it begins"):
            timeline.span("workers/w", "step", begin, end)
    with pytest.raises(InternalError, match="finite"):
        timeline.counter("workers/w", "queue", 1.0, math.nan)
    with pytest.raises(InvalidRequest, match="at least 1"):
        Timeline(max_spans=0)


def test_facts_that_json_cannot_say_are_written_as_words(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.span("requests/1", "decode", 0.0, 1.0, deadline=math.inf)
    assert read(timeline, tmp_path / "t.json")["traceEvents"][-1]["args"] == {"deadline": "inf"}


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.span("requests/1", "decode", 0.0, 1.0, odd=object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        timeline.write(tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []
