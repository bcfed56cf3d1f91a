"""The body of an HTTP request: received within limits of size and time, and parsed strictly.

Nothing that a client sends may cost more than its size in time or memory: parsing stops at the first mistake, and
what is too large is never parsed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar

import pydantic_core
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ..core.errors import InvalidRequest
from .fields import UNKNOWN_FIELD
from .validation import MAX_REQUEST_BYTES, shortened, shown

BODY_TIMEOUT = 30.0  # seconds for a body to arrive
DISCARDED = 16  # a body of up to so many times the limit is read to its end, so that the refusal reaches the client

_B = TypeVar("_B", bound=BaseModel)


async def read_body(request: Request, kind: type[_B]) -> _B:
    """The body as `kind`. Raises InvalidRequest naming the field, or HTTPException for what is no JSON body at all."""
    _check_content_type(request.headers.get("content-type", ""))
    raw = await _receive(request)
    try:
        # Strict about Unicode (lone surrogates are no text), about depth and about numbers, unlike the standard library.
        fields = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("body: it must be a JSON object")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None


def _check_content_type(value: str) -> None:
    kind = value.partition(";")[0].strip().lower()
    if kind not in ("", "application/json") and not kind.endswith("+json"):
        raise HTTPException(415, f"content-type: send the body as application/json, not {shown(kind)}")


async def _receive(request: Request) -> bytes:
    """The bytes of the body. What is too long is read to its end and thrown away, within reason."""
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in request.stream():
                size += len(chunk)
                if size > MAX_REQUEST_BYTES:
                    chunks.clear()
                    if size > DISCARDED * MAX_REQUEST_BYTES:
                        break
                else:
                    chunks.append(chunk)
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {BODY_TIMEOUT:g} seconds", {"connection": "close"}) from None
    if size > MAX_REQUEST_BYTES:
        raise HTTPException(413, f"a body has at most {MAX_REQUEST_BYTES} bytes", {"connection": "close"})
    return b"".join(chunks)


def _refusal(error: ValidationError) -> InvalidRequest:
    """The first problem, by the name of its field."""
    problem = error.errors(include_url=False, include_input=False)[0]
    location, message = _location(problem["loc"]), problem["msg"]
    if problem["type"] == UNKNOWN_FIELD:
        name, _, message = message.rpartition(": ")
        location.append(name)
    return InvalidRequest(f"{'.'.join(location) or 'body'}: {message}", location[0] if location else None)


def _location(parts: Sequence[int | str]) -> list[str]:
    """The path of a field as a client writes it, without the tags of our unions (`<...>`)."""
    return [shortened(str(part)) for part in parts if not (isinstance(part, str) and part.startswith("<"))]
