"""Tool calls in the text of a model: every family's way of writing, in pieces of any size, well-formed or not."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from baton.api.call_text import CallArguments, CallParser, CallStart, Part
from baton.api.tools import FORMATS
from hypothesis import given, settings
from hypothesis import strategies as st

KNOWN = ("get_weather", "add")


def parser(name: str, limit: int | None = None) -> CallParser:
    return CallParser(FORMATS[name].writing, KNOWN.__contains__, limit)


def read(made: CallParser, *pieces: str) -> tuple[str, list[tuple[str, str]]]:
    """(content, calls as name and arguments). Calls are announced before their arguments, in order."""
    content, calls = "", []
    parts: list[Part] = [part for piece in pieces for part in made.push(piece)]
    for part in [*parts, *made.flush()]:
        if isinstance(part, str):
            content += part
        elif isinstance(part, CallStart):
            assert part.index == len(calls)
            calls.append((part.name, ""))
        else:
            assert isinstance(part, CallArguments)
            assert part.index == len(calls) - 1
            calls[-1] = calls[-1][0], calls[-1][1] + part.text
    return content, calls


PARIS = ("get_weather", '{"city": "Paris {\\"[é]\\"}", "days": [1, {"a": null}]}')
TWO = ("add", '{"a":1,"b":2}')


def written(call: tuple[str, str], key: str = "arguments") -> str:
    return f'{{"name": "{call[0]}", "{key}": {call[1]}}}'


# format, text, content, calls
CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", f"<tool_call>\n{written(PARIS)}\n</tool_call>", "", [PARIS]),
    ("hermes", f"Hm.\n\n<tool_call>{written(PARIS)}</tool_call>\n<tool_call>\n{written(TWO)}</tool_call>\n", "Hm.", [PARIS, TWO]),
    ("hermes", f"<tool_call>{written(TWO)}</tool_call> Done.", " Done.", [TWO]),
    ("hermes", "a < b, <tool, and <tool_cal", "a < b, <tool, and <tool_cal", []),
    ("hermes", " plain text \n", " plain text \n", []),
    ("hermes", f'<tool_call>{{"arguments": {TWO[1]}, "id": 7, "name": "add"}}</tool_call>', "", [TWO]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
    ("hermes", "<tool_call>not JSON</tool_call>", "not JSON", []),
    ("hermes", '<tool_call>{"no": "name"}</tool_call>!', '{"no": "name"}!', []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),  # cut off by max_tokens
    ("hermes", '<tool_call>{"nam', '{"nam', []),
    ("hermes", f"<tool_call>{written(TWO)}</tool", "", [TWO]),
    ("llama", written(PARIS, "parameters"), "", [PARIS]),
    ("llama", f"<|python_tag|>{written(PARIS, 'parameters')}", "", [PARIS]),
    ("llama", f"\n\n{written(PARIS, 'parameters')}; {written(TWO, 'parameters')}", "", [PARIS, TWO]),
    ("llama", '{"type": "function", "name": "add", "parameters": {"a":1,"b":2}}', "", [TWO]),
    ("llama", '{"name": "Bob", "parameters": {"age": 7}} is JSON', '{"name": "Bob", "parameters": {"age": 7}} is JSON', []),
    ("llama", '{"answer": {"a": 1}}', '{"answer": {"a": 1}}', []),
    ("llama", "{ this is no JSON }", "{ this is no JSON }", []),
    ("llama", "The sum is {3}.", "The sum is {3}.", []),
    ("llama", '<|python_tag|>search.call(query="x")', 'search.call(query="x")', []),
    ("llama", "", "", []),
    ("mistral", f"[TOOL_CALLS] [{written(PARIS)}, {written(TWO)}]", "", [PARIS, TWO]),
    ("mistral", f"Well. [TOOL_CALLS][{written(TWO)}]\n", "Well.", [TWO]),
    ("mistral", "a list [1, 2] [TOOL", "a list [1, 2] [TOOL", []),
    ("mistral_args", f"[TOOL_CALLS]{PARIS[0]}[ARGS]{PARIS[1]}[TOOL_CALLS]{TWO[0]}[ARGS]{TWO[1]}", "", [PARIS, TWO]),
    ("mistral_args", f"[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{TWO[1]}", "", [TWO]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES, ids=range(len(CASES)))
def test_calls_and_content_come_apart(name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(parser(name), text) == (content, calls)
    assert read(parser(name), *text) == (content, calls)  # one character at a time


@settings(max_examples=100, deadline=None)
@given(case=st.sampled_from(CASES), cuts=st.lists(st.integers(0, 120), max_size=6))
def test_any_cut_gives_the_same(case: tuple[str, str, str, list[tuple[str, str]]], cuts: list[int]) -> None:
    name, text, content, calls = case
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert read(parser(name), *(text[a:b] for a, b in pairwise(ends))) == (content, calls)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(sorted(FORMATS)), text=st.text('{}[]",:;<>/|ab \n\\', max_size=60))
def test_any_text_is_read_to_its_end(name: str, text: str) -> None:
    made = parser(name)
    content, calls = read(made, *text)
    if not calls and FORMATS[name].writing.opening not in text:
        assert content == text
    assert made.num_calls == len(calls)


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8
)


@settings(max_examples=100, deadline=None)
@given(arguments=st.dictionaries(st.text(max_size=6), JSON, max_size=3), ascii_only=st.booleans(), indent=st.none() | st.just(2))
def test_arguments_come_character_for_character(arguments: dict[str, object], ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
    for name, key in (("hermes", "arguments"), ("llama", "parameters"), ("mistral", "arguments")):
        opening = FORMATS[name].writing.opening
        assert read(parser(name), opening + written(("add", text), key)) == ("", [("add", text)])


def test_arguments_flow_while_they_are_written() -> None:
    made = parser("hermes")
    assert made.push('Hm <tool_call>{"name": "ad') == ["Hm"]
    assert made.push('d", "arguments": {"a": "lo') == [CallStart(0, "add"), CallArguments(0, '{"a": "lo')]
    assert made.push('ng"') == [CallArguments(0, 'ng"')]
    assert made.push("}}") == [CallArguments(0, "}")]
    assert made.push("</tool_call>") == []


def test_calls_beyond_the_limit_are_dropped() -> None:
    text = f"<tool_call>{written(PARIS)}</tool_call><tool_call>{written(TWO)}</tool_call>"
    assert read(parser("hermes", limit=1), text) == ("", [PARIS])
