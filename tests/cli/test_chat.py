"""`baton chat` against a server that speaks the OpenAI protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from baton.cli.main import app
from typer.testing import CliRunner


class Server(ThreadingHTTPServer):
    """Answers every question with its number of messages, word by word."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "tiny"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        question = body["messages"][-1]["content"]
        if question == "too long":
            self._send(400, json.dumps({"error": {"message": "max_tokens is too large"}}).encode())
            return
        events = [{"choices": [{"delta": {"role": "assistant"}}]}]
        events += [{"choices": [{"delta": {"content": part}}]} for part in ("to ", question, "!")]
        events += [{"error": {"message": "the worker fell over"}}] if question == "break" else []
        stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self._send(200, stream.encode(), "text/event-stream")

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _chat(*arguments: str, said: str | None = None):
    return CliRunner().invoke(app, ["chat", *arguments], input=said)


def test_one_question_streams_one_answer(server):
    result = _chat("--url", server.url, "hello", "--max-tokens", "7", "--temperature", "0")
    assert (result.exit_code, result.stdout) == (0, "to hello!\n")
    (body,) = server.asked
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 7,
        "stream": True,
        "temperature": 0.0,
    }


def test_a_conversation_carries_its_history_and_survives_a_refusal(server):
    result = _chat("--url", f"{server.url}/v1/", said="one\ntoo long\ntwo\n\n")
    assert (result.exit_code, result.stdout) == (0, "to one!\nto two!\n")
    assert "max_tokens is too large (HTTP 400)" in result.stderr
    assert server.asked[-1]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "to one!"},
        {"role": "user", "content": "two"},
    ]
    assert "temperature" not in server.asked[-1]  # the model's default


def test_a_refused_question_is_bad_usage(server):
    result = _chat("--url", server.url, "too long")
    assert result.exit_code == 2
    assert "max_tokens is too large (HTTP 400)" in result.stderr


def test_an_answer_that_breaks_off_is_a_failure(server):
    result = _chat("--url", server.url, "break")
    assert result.exit_code == 1
    assert result.stdout.startswith("to break!")
    assert "the worker fell over" in result.stderr


def test_no_server_and_no_cluster(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert "does not answer" in _chat("--url", "http://127.0.0.1:1", "x").stderr
    nobody = _chat("x")
    assert nobody.exit_code == 1
    assert "no cluster is running on this machine" in nobody.stderr
    assert _chat("--url", "127.0.0.1:80", "x").exit_code == 2
