"""docs/metrics.md lists every metric of the router, with its type, unit and labels, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from baton.observability.metrics import Metrics
from baton.observability.records import Place, RequestRecord, SequenceRecord, StageTimes, WorkerSample

DOC = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
PLACE = Place("decode", "decode-0")


class Described(NamedTuple):
    kind: str
    labels: frozenset[str]


def in_code() -> dict[str, Described]:
    """Every metric as Prometheus sees it, once each has been given a value."""
    metrics = Metrics()
    sample = WorkerSample(PLACE, True, 1, 1, 1, 1, 1, 1, 1, 1, 0.1)
    metrics.observe_cluster(lambda: 1, lambda: 1, lambda: True, lambda: [sample])
    stages = StageTimes(1.0, 0.5, 0.5, 0.1, 0.1, 0.05, 2.0)
    sequence = SequenceRecord(stages, 2, 1, 1, "stop", PLACE, PLACE)
    metrics.request_ended(RequestRecord("r", "", "", "ok", "", 1, (sequence,)))
    metrics.tokens(PLACE, 1, 0.1)
    metrics.attempt("failed")
    metrics.handoff("shm", 1, 0.1, 0.1)
    metrics.worker_lost(PLACE)
    found = {}
    for family in metrics.registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for each in family.samples for label in each.labels}
        assert family.samples, f"{name} has no value here: give it one above"
        found[name] = Described(family.type, frozenset(labels - {"le"}))
    return found


def rows() -> list[list[str]]:
    """The cells of every row that describes a metric."""
    lines = [line for line in DOC.read_text(encoding="utf-8").splitlines() if line.startswith("| `baton_")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_metric_is_described_once_and_nothing_else() -> None:
    names = [row[0].strip("`") for row in rows()]
    assert sorted(names) == sorted(in_code())


def test_types_and_labels_are_those_of_the_code() -> None:
    described = {row[0].strip("`"): Described(row[1], frozenset(re.findall(r"`(\w+)`", row[3]))) for row in rows()}
    assert described == in_code()


def test_units_agree_with_names_and_every_metric_has_a_meaning() -> None:
    for name, _, unit, _, meaning in rows():
        for suffix in ("seconds", "bytes"):
            assert (unit == suffix) == name.strip("`").endswith(f"_{suffix}"), name
        assert len(meaning) > 10, name


def test_the_text_names_no_metric_that_does_not_exist() -> None:
    text = DOC.read_text(encoding="utf-8")
    parts = {f"{name}{suffix}" for name in in_code() for suffix in ("", "_bucket", "_sum", "_count")}
    assert set(re.findall(r"\bbaton_[a-z0-9_]*[a-z0-9]\b", text)) - parts == set()
