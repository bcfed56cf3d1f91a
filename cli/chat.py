"""`baton chat`: talk to a running cluster over its HTTP face, or to any server that speaks the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated

import httpx
import typer
from rich.console import Console

from ..core.errors import BatonError, InvalidRequest, Unavailable
from .clusters import find_cluster
from .screen import err, exits_on_error, out

Message = dict[str, str]


def chat(
    prompt: Annotated[str | None, typer.Argument(help="One question; without it the conversation is interactive.")] = None,
    cluster: Annotated[str | None, typer.Option(help="A cluster of this machine: its name or topology file.")] = None,
    url: Annotated[str | None, typer.Option(help="A server anywhere, such as http://host:8000 or http://host:8000/v1.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float | None, typer.Option(min=0.0)] = None,
) -> None:
    """Chat with the model. Answers stream to standard output."""
    with exits_on_error():
        base = _base_url(url, cluster)
        with httpx.Client(base_url=base, timeout=httpx.Timeout(10.0, read=600.0)) as client:
            model = _model(client)
            if prompt is not None:
                _answer(client, model, [{"role": "user", "content": prompt}], max_tokens, temperature, out())
                return
            _converse(client, model, max_tokens, temperature)


def _converse(client: httpx.Client, model: str, max_tokens: int, temperature: float | None) -> None:
    console = out()
    if sys.stdin.isatty():
        err().print(f"{model} at {client.base_url}; an empty line or Ctrl-D ends the conversation.", style="dim")
    messages: list[Message] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        messages.append({"role": "user", "content": line})
        try:
            answer = _answer(client, model, messages, max_tokens, temperature, console)
        except KeyboardInterrupt:  # leaving the stream aborts the request; the conversation goes on
            console.print()
            messages.pop()
            continue
        except InvalidRequest as error:  # too long, for example: say so and let the person try again
            err().print(str(error), style="red", markup=False)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _answer(
    client: httpx.Client, model: str, messages: list[Message], max_tokens: int, temperature: float | None, console: Console
) -> str:
    """Stream one answer to `console` and return it."""
    body: dict[str, object] = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True}
    if temperature is not None:
        body["temperature"] = temperature
    parts: list[str] = []
    for text in _stream(client, body):
        console.file.write(text)
        console.file.flush()
        parts.append(text)
    console.file.write("\n")
    return "".join(parts)


def _stream(client: httpx.Client, body: dict[str, object]) -> Iterator[str]:
    try:
        with client.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _refusal(response)
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                yield _delta(data)
    except httpx.HTTPError as error:
        raise Unavailable(f"{client.base_url} does not answer: {error}") from error


def _delta(data: str) -> str:
    """The text that one server-sent event adds. Raises Unavailable when it is an error."""
    event = json.loads(data)
    if "error" in event:
        raise Unavailable(str(event["error"].get("message", event["error"])))
    return "".join(choice.get("delta", {}).get("content") or "" for choice in event.get("choices", ()))


def _model(client: httpx.Client) -> str:
    """The name of the model that is served."""
    try:
        response = client.get("models")
    except httpx.HTTPError as error:
        raise Unavailable(f"{client.base_url} does not answer: {error}") from error
    if response.status_code != 200:
        raise _refusal(response)
    name: str = response.json()["data"][0]["id"]
    return name


def _refusal(response: httpx.Response) -> BatonError:
    """An error response as one of ours, with the server's words."""
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = response.text[:300]
    kind = InvalidRequest if response.status_code in (400, 404, 422) else Unavailable
    return kind(f"{message} (HTTP {response.status_code})")


def _base_url(url: str | None, cluster: str | None) -> str:
    if url is None:
        record = find_cluster(cluster)
        if not record.http:
            raise Unavailable(f"cluster {record.cluster} is still starting")
        return f"http://{record.http}/v1/"
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest(f"--url: {url!r} is not allowed; needed: http://host:port or https://host:port")
    url = url.rstrip("/")
    return f"{url}/" if url.endswith("/v1") else f"{url}/v1/"
