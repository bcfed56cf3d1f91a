"""The error tree of `core.errors` on the wire: gRPC statuses and OpenAI's JSON shape."""

from __future__ import annotations

import math
from collections.abc import Mapping

import grpc

from ..core.errors import BatonError, InvalidRequest, Overloaded

RETRY_AFTER_MS = "retry-after-ms"  # trailing metadata, and a header that OpenAI's client honours
FIELD = "baton-field"  # trailing metadata: the offending field

_GRPC = {
    "invalid_argument": grpc.StatusCode.INVALID_ARGUMENT,
    "not_found": grpc.StatusCode.NOT_FOUND,
    "resource_exhausted": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "deadline_exceeded": grpc.StatusCode.DEADLINE_EXCEEDED,
    "cancelled": grpc.StatusCode.CANCELLED,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
}
# code -> (HTTP status, OpenAI's error type)
_HTTP = {
    "invalid_argument": (400, "invalid_request_error"),
    "not_found": (404, "invalid_request_error"),
    "resource_exhausted": (429, "rate_limit_error"),
    "deadline_exceeded": (504, "timeout_error"),
    "cancelled": (499, "cancelled_error"),
    "unavailable": (503, "service_unavailable_error"),
}

ErrorBody = dict[str, dict[str, str | None]]


def grpc_status(error: BatonError) -> tuple[grpc.StatusCode, tuple[tuple[str, str], ...]]:
    """Status code and trailing metadata."""
    metadata: list[tuple[str, str]] = []
    if isinstance(error, Overloaded):
        metadata.append((RETRY_AFTER_MS, str(math.ceil(error.retry_after * 1000))))
    if isinstance(error, InvalidRequest) and error.field:
        metadata.append((FIELD, error.field))
    return _GRPC.get(error.code, grpc.StatusCode.INTERNAL), tuple(metadata)


def http_error(error: BatonError) -> tuple[int, ErrorBody, Mapping[str, str]]:
    """Status, body and headers."""
    status, kind = _HTTP.get(error.code, (500, "server_error"))
    field = error.field if isinstance(error, InvalidRequest) else None
    code = "model_not_found" if error.code == "not_found" else error.code
    headers = {}
    if isinstance(error, Overloaded):
        headers = {
            "Retry-After": str(max(1, math.ceil(error.retry_after))),
            RETRY_AFTER_MS: str(math.ceil(error.retry_after * 1000)),
        }
    return status, error_body(str(error), kind, field, code), headers


def error_body(message: str, kind: str, field: str | None, code: str | None) -> ErrorBody:
    """OpenAI's error shape."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}
