"""Structured logs: one JSON object per line on stderr.

Ordinary records carry time, level, logger, process name and message; fields given as `extra={"fields": {...}}`
stand beside them. `log_request` writes the one line that every finished request gets.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from .records import RequestRecord, SequenceRecord

JsonValue = str | int | float | bool | None | list["JsonValue"] | dict[str, "JsonValue"]

_encode = json.JSONEncoder(ensure_ascii=False, default=str).encode  # json.dumps would make an encoder for every line
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_GUESTS = ("uvicorn", "asyncio")  # libraries whose warnings would otherwise break the one-object-a-line format
_request_logger = logging.getLogger("baton.request")


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON. `component` names the process (a worker or router id)."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, JsonValue] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "component": self._component,
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            line.update(fields)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode(line)


def configure(component: str, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send what is logged under `baton`, and our libraries' warnings, to `stream` (stderr) as JSON.

    Calling it again replaces the settings.
    """
    if level.upper() not in _LEVELS:
        raise ValueError(f"log level {level!r} is not one of {', '.join(_LEVELS)}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(component))
    for name, least in (("baton", level.upper()), *((name, "WARNING") for name in _GUESTS)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(least)
        logger.propagate = False


def log_request(record: RequestRecord) -> None:
    """The one line of a finished request. Stage times are those of its first sequence, tokens those of all."""
    fields: dict[str, JsonValue] = {
        "request_id": record.request_id,
        "client_request_id": record.client_id,
        "tenant": record.tenant,
        "outcome": record.outcome,
        "error": record.message,
        "n": len(record.sequences),
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": sum(s.output_tokens for s in record.sequences),
        "cached_tokens": max((s.cached_tokens for s in record.sequences), default=0),
        "attempts": max((s.attempts for s in record.sequences), default=0),
        "retries": list(record.retries),
    }
    if record.sequences:
        fields.update(_sequence_fields(record.sequences[0]))
    level = logging.INFO if record.outcome in ("ok", "cancelled") else logging.WARNING
    _request_logger.log(level, "request %s: %s", record.request_id, record.outcome, extra={"fields": fields})


def _sequence_fields(record: SequenceRecord) -> dict[str, JsonValue]:
    stages = record.stages
    times = {
        "ttft": stages.ttft,
        "queue": stages.queue,
        "prefill": stages.prefill,
        "handoff": stages.handoff,
        "first_decode": stages.first_decode,
        "tpot": stages.tpot,
        "total": stages.total,
    }
    fields: dict[str, JsonValue] = {name: None if value is None else round(value, 6) for name, value in times.items()}
    fields["finish"] = record.finish
    fields["prefill_worker"] = record.first.worker if record.first else None
    fields["decode_worker"] = record.rest.worker if record.rest else None
    return fields
