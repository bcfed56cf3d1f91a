"""Structured logs: one JSON object per line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from baton.observability.logs import configure, log_request
from baton.observability.records import Place, RequestRecord, SequenceRecord, StageTimes


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    logger = logging.getLogger("baton")
    before = logger.handlers[:], logger.level, logger.propagate
    out = io.StringIO()
    configure("r0", "INFO", out)
    yield out
    logger.handlers[:], logger.level, logger.propagate = before[0], before[1], before[2]


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_records_are_lines_of_json(stream: io.StringIO) -> None:
    logger = logging.getLogger("baton.test")
    logger.info("two\nlines %d", 5, extra={"fields": {"worker": "wörker"}})
    logger.debug("not shown")
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("failed")
    first, second = lines(stream)
    assert (first["message"], first["worker"], first["level"]) == ("two\nlines 5", "wörker", "info")
    assert (first["component"], first["logger"]) == ("r0", "baton.test")
    assert "ValueError: broken" in str(second["exception"])


def test_configuring_again_replaces(stream: io.StringIO) -> None:
    other = io.StringIO()
    configure("r1", "WARNING", other)
    logging.getLogger("baton.test").info("quiet")
    logging.getLogger("baton.test").warning("loud")
    assert lines(stream) == []
    assert [line["component"] for line in lines(other)] == ["r1"]
    with pytest.raises(ValueError, match="LOUD"):
        configure("r1", "LOUD")


def test_request_line_has_its_stages(stream: io.StringIO) -> None:
    stages = StageTimes(ttft=1.0, queue=0.75, prefill=0.25, handoff=0.1, first_decode=0.2, tpot=0.05, total=3.0)
    sequence = SequenceRecord(stages, 41, 32, 2, "stop", Place("prefill", "p0"), Place("decode", "d0"))
    log_request(RequestRecord("r-1", "mine", "team", "ok", "", 100, (sequence, sequence), ("worker_lost",)))
    log_request(RequestRecord("r-2", "", "", "unavailable", "no worker", 7, ()))
    first, second = lines(stream)
    assert first["logger"] == "baton.request"
    assert (first["request_id"], first["client_request_id"], first["tenant"]) == ("r-1", "mine", "team")
    assert (first["output_tokens"], first["attempts"], first["retries"]) == (82, 2, ["worker_lost"])
    assert (first["ttft"], first["queue"], first["handoff"], first["tpot"]) == (1.0, 0.75, 0.1, 0.05)
    assert (first["prefill_worker"], first["decode_worker"]) == ("p0", "d0")
    assert (second["level"], second["error"], second["output_tokens"]) == ("warning", "no worker", 0)


def test_warnings_of_libraries_are_json_too(stream: io.StringIO) -> None:
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    logging.getLogger("asyncio").info("Using selector")
    assert [line["message"] for line in lines(stream)] == ["Invalid HTTP request received."]
