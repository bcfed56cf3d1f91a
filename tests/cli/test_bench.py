"""`baton bench` from its command line, against a real socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import typer
from baton.cli.bench import bench
from typer.testing import CliRunner, Result

app = typer.Typer()
app.command()(bench)


class Completions(BaseHTTPRequestHandler):
    """Streams `max_tokens` events; refuses prompts of 13 tokens, and `ignore_eos` when told to."""

    refuse_ignore_eos = False

    def log_message(self, format: str, *args: object) -> None:
        """Tests are quiet."""

    def do_GET(self) -> None:
        self._whole(200, {"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "fake"
        if len(body["prompt"]) == 13:
            self._whole(400, {"error": {"message": "thirteen tokens"}})
        elif self.refuse_ignore_eos and "ignore_eos" in body:
            self._whole(400, {"error": {"message": "ignore_eos is unknown"}})
        else:
            self._stream(body)

    def _stream(self, body: dict[str, object]) -> None:
        prompt, count = body["prompt"], body["max_tokens"]
        assert isinstance(prompt, list)
        assert isinstance(count, int)
        self.send_response(200)
        self.end_headers()
        events: list[object] = [
            {"choices": [{"text": "x", "finish_reason": "length" if number == count - 1 else None}]} for number in range(count)
        ]
        events.append({"choices": [], "usage": {"prompt_tokens": len(prompt), "completion_tokens": count}})
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _whole(self, status: int, answer: object) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


class PickyCompletions(Completions):
    refuse_ignore_eos = True


def serve(handler: type[Completions]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def url() -> Iterator[str]:
    yield from serve(Completions)


@pytest.fixture
def picky_url() -> Iterator[str]:
    yield from serve(PickyCompletions)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160", "TERM": "dumb"})


def test_a_synthetic_run_with_both_reports(url: str, tmp_path: Path) -> None:
    out, html = tmp_path / "r.json", tmp_path / "r.html"
    shape = ("--rate", "200", "--requests", "20", "--input-len", "uniform:8,12", "--output-len", "4")
    ran = invoke(
        "--url", url, *shape, "--slo-ttft", "30", "--slo-tpot", "30", "--out", str(out), "--html", str(html), "--workers", "2"
    )
    assert ran.exit_code == 0, ran.output
    assert "20 offered, 20 finished, 0 failed" in ran.output
    document = json.loads(out.read_text())
    assert document["summary"]["attainment"] == 1.0
    assert document["summary"]["goodput_per_worker"] == pytest.approx(document["summary"]["goodput"] / 2)
    assert [request["num_tokens"] for request in document["requests"]] == [4] * 20
    assert document["settings"]["workload"] == "Poisson, 200 requests/s"
    assert html.read_text().startswith("<!doctype html>")


def test_a_trace_and_its_failures_count_against_attainment(url: str, tmp_path: Path) -> None:
    trace, out = tmp_path / "t.csv", tmp_path / "r.json"
    rows = [f"2023-11-16 18:15:4{number}.5,{12 if number % 2 == 0 else 13},3" for number in range(6)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    ran = invoke(
        "--url",
        url,
        "--trace",
        str(trace),
        "--time-scale",
        "0.01",
        "--max-output-len",
        "2",
        "--slo-ttft",
        "30",
        "--out",
        str(out),
    )
    assert ran.exit_code == 0, ran.output
    assert "3 x http 400" in ran.output
    document = json.loads(out.read_text())
    assert document["summary"]["attainment"] == 0.5
    assert [request["offered"] for request in document["requests"]] == pytest.approx([0, 0.01, 0.02, 0.03, 0.04, 0.05])
    assert {request["num_tokens"] for request in document["requests"]} == {0, 2}


def test_a_closed_loop(url: str, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    ran = invoke(
        "--url", url, "--concurrency", "2", "--requests", "6", "--input-len", "8", "--output-len", "2", "--out", str(out)
    )
    assert ran.exit_code == 0, ran.output
    document = json.loads(out.read_text())
    assert document["run"]["closed_loop"] is True
    assert document["settings"]["workload"] == "Poisson, inf requests/s"


def test_the_warm_up_says_what_every_request_would_run_into(picky_url: str) -> None:
    shape = ("--requests", "3", "--rate", "100", "--input-len", "8", "--output-len", "2")
    refused = invoke("--url", picky_url, *shape)
    assert refused.exit_code == 1
    assert "ignore_eos is unknown" in refused.output
    assert invoke("--url", picky_url, *shape, "--no-ignore-eos").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "either --url http://host:port or --grpc host:port"),
        (("--url", "localhost:8000"), "is no URL like http://host:8000"),
        (("--url", "http://x", "--input-len", "big"), "input-len: 'big' is no length"),
        (("--url", "http://x", "--rate", "0"), "rate: 0.0 requests/s"),
        (("--url", "http://x", "--time-scale", "2"), "belong to --trace"),
        (("--url", "http://x", "--trace", "a.csv", "--rate", "2"), "--rate and --trace exclude each other"),
        (("--url", "http://x", "--trace", "a.log"), "give --format azure or --format mooncake"),
        (("--url", "http://x", "--trace", "/nowhere/a.csv"), "/nowhere/a.csv: cannot be read"),
        (("--grpc", "x:1", "--text"), "belong to --url"),
    ],
)
def test_wrong_options_end_with_a_sentence(arguments: tuple[str, ...], words: str) -> None:
    ran = invoke(*arguments)
    assert ran.exit_code == 2
    assert words in " ".join(ran.output.split())


def test_the_help_names_every_group_of_options() -> None:
    shown = invoke("--help")
    assert shown.exit_code == 0
    for part in ("Server", "Load", "Trace", "Report", "--time-scale", "--concurrency", "(default: by the file's ending)"):
        assert part in shown.output, part


def test_a_server_that_is_not_there(unused_tcp_port: int) -> None:
    for option, address in (("--url", f"http://127.0.0.1:{unused_tcp_port}"), ("--grpc", f"127.0.0.1:{unused_tcp_port}")):
        ran = invoke(option, address)
        assert ran.exit_code == 1
        assert f"127.0.0.1:{unused_tcp_port}" in ran.output
