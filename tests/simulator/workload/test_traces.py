"""Trace files, and what is said about bad ones."""

from __future__ import annotations

import json
import tracemalloc
from itertools import islice
from pathlib import Path

import pytest
from baton.core.errors import InvalidRequest
from baton.simulator.workload.planned import PlannedRequest
from baton.simulator.workload.traces import TraceOptions, guess_format, read_trace, repeat_trace, stream_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:46.6805900,879,0
"""
MOONCAKE = (
    {"timestamp": 3000, "input_length": 1100, "output_length": 52, "hash_ids": [0, 1, 2]},
    {"timestamp": 3000, "input_length": 700, "output_length": 26, "hash_ids": [0, 7]},
    {"timestamp": 6500, "input_length": 10, "output_length": 1},
)
DATA = Path(__file__).parents[4] / "shared" / "data"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    return write(tmp_path / "azure.csv", AZURE)


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    return write(tmp_path / "mooncake.jsonl", "\n".join(map(json.dumps, MOONCAKE)) + "\n\n")


def test_azure(azure: Path) -> None:
    first, second, third = read_trace(azure, "azure")
    assert (first.index, first.at, first.input_tokens, first.output_tokens) == (0, 0.0, 374, 44)
    assert second.at == pytest.approx(4.314579)
    assert third == PlannedRequest(2, 60.0, 879, 1), "an empty answer still asks for one token"


def test_mooncake(mooncake: Path) -> None:
    assert read_trace(mooncake, "mooncake") == (
        PlannedRequest(0, 0.0, 1100, 52, (0, 1, 2)),
        PlannedRequest(1, 0.0, 700, 26, (0, 7)),
        PlannedRequest(2, 3.5, 10, 1),
    )


def test_time_scale_duration_and_number_cut_a_trace(azure: Path) -> None:
    assert [planned.at for planned in read_trace(azure, "azure", TraceOptions(time_scale=0.5))][-1] == 30.0
    assert len(read_trace(azure, "azure", TraceOptions(time_scale=0.5, duration=29.0))) == 2
    assert len(read_trace(azure, "azure", TraceOptions(max_requests=1))) == 1


def test_clipping_keeps_only_the_blocks_that_still_fit(mooncake: Path) -> None:
    first, second, third = read_trace(mooncake, "mooncake", TraceOptions(max_input_tokens=600, max_output_tokens=30))
    assert (first.input_tokens, first.output_tokens, first.block_ids) == (600, 30, (0, 1))
    assert (second.input_tokens, second.output_tokens, second.block_ids) == (600, 26, (0, 7))
    assert third.input_tokens == 10


@pytest.mark.parametrize(
    ("trace_format", "text", "line", "reason"),
    [
        ("azure", "a,b\n1,2\n", 1, "header lacks TIMESTAMP, ContextTokens, GeneratedTokens"),
        ("azure", "", 1, "header lacks"),
        ("azure", AZURE.replace("396", "many"), 3, "ContextTokens 'many' is no whole number"),
        ("azure", AZURE.replace("396", "-4"), 3, "ContextTokens -4 is below 0"),
        ("azure", AZURE.replace("396,109", "396"), 3, "GeneratedTokens '' is no whole number"),
        ("azure", AZURE.replace("2023-11-16 18:15:50.9951690", "yesterday"), 3, "'yesterday' is no date"),
        ("azure", AZURE.replace("18:16:46", "18:15:47"), 4, "goes back in time by 3.315 s"),
        ("azure", AZURE.replace("18:16:46.6805900", "18:16:46+00:00"), 4, "time zone"),
        ("mooncake", "{]\n", 1, "is no JSON"),
        ("mooncake", "[1]\n", 1, "is a JSON list"),
        ("mooncake", '{"timestamp": 0, "input_length": 5, "output_length": 5}\n{"timestamp": "x"}\n', 2, "timestamp 'x'"),
        ("mooncake", '{"timestamp": 0, "output_length": 5}\n', 1, "input_length None"),
        ("mooncake", '{"timestamp": 0, "input_length": 5.5, "output_length": 5}\n', 1, "input_length 5.5"),
        ("mooncake", '{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [-1]}\n', 1, "hash_ids"),
        ("mooncake", '{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [1, 2]}\n', 1, "2 hash_ids are more"),
    ],
)
def test_a_complaint_names_file_line_and_reason(tmp_path: Path, trace_format: str, text: str, line: int, reason: str) -> None:
    path = write(tmp_path / "trace.txt", text)
    with pytest.raises(InvalidRequest) as raised:
        read_trace(path, trace_format)
    assert f"{path}, line {line}: " in str(raised.value)
    assert reason in str(raised.value)


def test_files_that_cannot_be_read_and_unknown_formats(tmp_path: Path, azure: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"missing\.csv: cannot be read: No such file"):
        read_trace(tmp_path / "missing.csv", "azure")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidRequest, match="UTF-8"):
        read_trace(tmp_path / "binary", "azure")
    with pytest.raises(InvalidRequest, match="allowed are azure, mooncake"):
        read_trace(azure, "sharegpt")
    with pytest.raises(InvalidRequest, match="holds no request"):
        read_trace(write(tmp_path / "empty.jsonl", "\n"), "mooncake")
    with pytest.raises(InvalidRequest, match="time-scale"):
        read_trace(azure, "azure", TraceOptions(time_scale=0.0))


def test_the_ending_tells_the_format() -> None:
    assert (guess_format(Path("a/t.csv")), guess_format(Path("t.jsonl"))) == ("azure", "mooncake")
    with pytest.raises(InvalidRequest, match=r"t\.txt: its ending does not tell the format; give --format azure or --format"):
        guess_format(Path("t.txt"))


def test_a_stream_gives_what_came_before_a_bad_line(tmp_path: Path) -> None:
    stream = stream_trace(write(tmp_path / "t.csv", AZURE.replace("879", "many")), "azure")
    assert [request.index for request in islice(stream, 2)] == [0, 1]
    with pytest.raises(InvalidRequest, match="line 4"):
        next(stream)
    with pytest.raises(InvalidRequest, match="allowed are azure, mooncake"):
        stream_trace(tmp_path / "t.csv", "sharegpt")  # at once, not when it is first asked


def test_a_stream_that_is_left_closes_its_file(azure: Path) -> None:
    stream = stream_trace(azure, "azure")
    next(stream)
    del stream  # an open file would warn, and a warning is an error here


def test_a_repeated_trace_goes_on_where_it_ended(mooncake: Path) -> None:
    trace = read_trace(mooncake, "mooncake")
    twice = list(repeat_trace(trace, 2))
    assert [request.index for request in twice] == list(range(6))
    # 3.5 s with a mean gap of 1.75 s: the second round begins at 5.25 s.
    assert [request.at for request in twice] == [0.0, 0.0, 3.5, 5.25, 5.25, 8.75]
    assert [request.block_ids for request in twice] == [(0, 1, 2), (0, 7), (), (8, 9, 10), (8, 15), ()]
    assert [request.at for request in repeat_trace(trace, 2, speed=4.0)] == [at / 4 for at in (0.0, 0.0, 3.5, 5.25, 5.25, 8.75)]
    assert [request.input_tokens for request in twice[:3]] == [request.input_tokens for request in twice[3:]]


def test_repeating_takes_no_memory_but_the_trace() -> None:
    trace = tuple(PlannedRequest(index, float(index), 5, 5) for index in range(100))
    tracemalloc.start()
    try:
        last = sum(1 for _ in repeat_trace(trace, 300))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert last == 30_000


def test_a_trace_that_cannot_be_repeated() -> None:
    one = (PlannedRequest(0, 0.0, 5, 5),)
    assert [request.at for request in repeat_trace(one, 3)] == [0.0, 0.0, 0.0]
    for requests, times, speed in (((), 1, 1.0), (one, 0, 1.0), (one, 1, 0.0)):
        with pytest.raises(InvalidRequest):
            repeat_trace(requests, times, speed)


@pytest.mark.parametrize(
    ("name", "trace_format", "num_requests", "shared_blocks"),
    [
        ("azure2023/AzureLLMInferenceTrace_conv.csv", "azure", 19366, False),
        ("mooncake/conversation_trace.jsonl", "mooncake", 12031, True),
    ],
)
def test_the_real_traces(name: str, trace_format: str, num_requests: int, shared_blocks: bool) -> None:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the trace {name} is not beside this checkout (shared/data)")
    workload = read_trace(path, trace_format)
    assert len(workload) == num_requests
    assert 3400 < workload[-1].at < 3700, "about an hour"
    ids = [block_id for planned in workload for block_id in planned.block_ids]
    assert (len(ids) > len(set(ids)) > 0) == shared_blocks
