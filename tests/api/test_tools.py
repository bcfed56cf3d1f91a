"""Tools in chat completions: formats by template, forced calls, prompts, and answers as OpenAI's own client reads them."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
from baton.api.call_text import CallArguments, CallStart
from baton.api.chat import ChatTemplate, Message, ToolCall
from baton.api.tokenizer import TextTokenizer
from baton.api.tools import FORMATS, Tool, ToolFormat, ToolUse, tool_format
from baton.core.errors import InvalidRequest
from baton.tests.router import router_process
from baton.tests.router.router_process import Router, running_router
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

MODEL = router_process.MODEL
# The parts that matter of the templates that Qwen2.5, Llama 3.1, Mistral 7B v0.3 and Mistral Small 3.2 come with.
QWEN = r"""{%- if tools %}<|user|># Tools
<tools>
{%- for tool in tools %}
{{- "\n" }}{{ tool | tojson }}
{%- endfor %}
</tools>
For each function call, return a json object within <tool_call></tool_call> XML tags<|end|>{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}<|assistant|>
{%- if message.content %}{{ message.content }}{%- endif %}
{%- for call in message.tool_calls %}{%- set call = call.function %}
{{- '\n<tool_call>\n{"name": "' }}{{ call.name }}{{ '", "arguments": ' }}{{ call.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}<|end|>
{%- elif message.role == 'tool' %}<|user|><tool_response>{{ message.content }}</tool_response><|end|>
{%- else %}<|{{ message.role }}|>{{ message.content }}<|end|>{%- endif %}
{%- endfor %}<|assistant|>"""
LLAMA = """{%- if tools is not none %}Environment: ipython
{%- for t in tools %}{{ t | tojson(indent=4) }}{%- endfor %}{%- endif %}
{%- for message in messages %}{%- if 'tool_calls' in message %}
{%- if message.tool_calls|length != 1 %}{{- raise_exception("only single tool-calls at once!") }}{%- endif %}
{{- '<|python_tag|>{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}
{{- message.tool_calls[0].function.arguments | tojson }}}<|end|>
{%- else %}<|{{ message.role }}|>{{ message.content }}<|end|>{%- endif %}{%- endfor %}<|assistant|>"""
MISTRAL = """{%- if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif %}
{%- for message in messages %}{%- if message.tool_calls is defined %}[TOOL_CALLS] [{%- for call in message.tool_calls %}
{%- if call.id|length != 9 %}{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{%- endif %}
{{- call.function | tojson }}{%- endfor %}]{%- else %}{{ message.content }}{%- endif %}{%- endfor %}"""
TEMPLATES = {"hermes": QWEN, "llama": LLAMA, "mistral": MISTRAL, "mistral_args": MISTRAL + "[ARGS]"}

CITY = {"$ref": "#/$defs/city"}
WEATHER = Tool(
    "get_weather",
    "The weather of a city.",
    {
        "type": "object",
        "properties": {"city": CITY, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Paris", "Rome"]}},
    },
)
NOW = Tool("now")
PARIS = ("get_weather", {"city": "Paris", "days": 3})
DESCRIBED = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": WEATHER.parameters}},
    {"type": "function", "function": {"name": "now"}},
]
ASK: list[dict[str, object]] = [{"role": "user", "content": "Weather?"}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {})


def model_with(folder: Path, source: str, special: bool = True) -> Path:
    """The shipped model's tokenizer with another template, and with the marks of all families as tokens of their own."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    for mark in ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"):
        tokenizer.add_tokens([AddedToken(mark, special=special, normalized=False)])
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in ("<tool_call>", "</tool_call>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((MODEL / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": source}))
    config = json.loads((MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": tokenizer.get_vocab_size()}))
    shutil.copy(MODEL / "generation_config.json", folder)
    return folder


# ---- formats ------------------------------------------------------------------------------------------


def test_the_template_says_which_format() -> None:
    for name, source in TEMPLATES.items():
        assert tool_format(template(source), "tools") is FORMATS[name]
    small = (
        "{{ tools }}" + 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    )
    assert tool_format(template(small), "tools") is FORMATS["llama"]
    for source, words in ((None, "does not define tools"), ("no <tool_call> here", "does not"), ("{{ tools }}", "known ways")):
        with pytest.raises(InvalidRequest, match=words) as caught:
            tool_format(None if source is None else template(source), "messages")
        assert caught.value.field == "messages"


def test_a_template_of_its_own_for_tools_is_used(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": QWEN}]
    both = ChatTemplate.load(tmp_path, {"chat_template": named})
    assert both is not None
    assert both.render([Message("user", "a")]) == "plain"
    assert "# Tools" in both.render([Message("user", "a")], [WEATHER.described()])
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }} <tool_call>")
    files = ChatTemplate.load(tmp_path, {})
    assert files is not None
    assert tool_format(files, "tools") is FORMATS["hermes"]
    assert files.render([Message("user", "a")]) == "file"


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def accepts(form_grammar: str, folder: Path, text: str) -> bool:
    matcher = LLMatcher(LLTokenizer(str(folder / "tokenizer.json"), eos_token=[1]), form_grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokens_of(Tokenizer.from_file(str(folder / "tokenizer.json")), text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def calls_in(written: ToolFormat, use: ToolUse, text: str) -> list[tuple[str, object]]:
    parser, calls = written.parser(use), []
    for part in [*parser.push(text), *parser.flush()]:
        if isinstance(part, CallStart):
            calls.append([part.name, ""])
        elif isinstance(part, CallArguments):
            calls[-1][1] += part.text
    return [(name, json.loads(arguments)) for name, arguments in calls]


ONE = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
    "llama": '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]',
    "mistral_args": '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 3}',
}
TWO = {
    "hermes": ONE["hermes"] + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "mistral": ONE["mistral"][:-1] + ', {"name": "now", "arguments": {}}]',
    "mistral_args": ONE["mistral_args"] + "[TOOL_CALLS]now[ARGS]{}",
}


@pytest.mark.parametrize("special", [True, False], ids=["special marks", "marks as text"])
@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls_are_what_the_parser_reads(tmp_path: Path, name: str, special: bool) -> None:
    folder, written = model_with(tmp_path, TEMPLATES[name], special), FORMATS[name]
    mark_id = TextTokenizer.load(folder).mark_id
    assert (mark_id("[TOOL_CALLS]") is not None) is special
    any_of = ToolUse((WEATHER, NOW), (WEATHER, NOW))
    form = written.form(any_of, mark_id)
    assert form is not None
    assert accepts(form.grammar, folder, ONE[name])
    assert calls_in(written, any_of, ONE[name]) == [PARIS]
    if name in TWO:
        assert accepts(form.grammar, folder, TWO[name])
        assert calls_in(written, any_of, TWO[name]) == [PARIS, ("now", {})]
    for wrong in (
        "Hello",
        ONE[name].replace("Paris", "Oslo"),
        ONE[name].replace("get_weather", "other"),
        ONE[name] + " more",
        "",
    ):
        assert not accepts(form.grammar, folder, wrong), wrong
    named = written.form(ToolUse((WEATHER, NOW), (NOW,), parallel=False), mark_id)
    assert named is not None
    assert not accepts(named.grammar, folder, ONE[name])
    assert not accepts(named.grammar, folder, TWO.get(name, ONE[name]))
    alone = ONE[name].replace("get_weather", "now").replace('{"city": "Paris", "days": 3}', "{}")
    assert accepts(named.grammar, folder, alone)


@pytest.mark.parametrize("special", [True, False], ids=["special marks", "marks as text"])
@pytest.mark.parametrize("name", FORMATS)
def test_strict_tools_are_right_whenever_they_are_called(tmp_path: Path, name: str, special: bool) -> None:
    folder, written = model_with(tmp_path, TEMPLATES[name], special), FORMATS[name]
    mark_id = TextTokenizer.load(folder).mark_id
    assert written.form(ToolUse((WEATHER, NOW)), mark_id) is None  # the model is free
    strict = Tool(WEATHER.name, WEATHER.description, WEATHER.parameters, strict=True)
    form = written.form(ToolUse((strict, NOW)), mark_id)
    assert form is not None
    before = "" if name == "llama" else "Let me see. "
    for text in ("", "Hello {there}, [a] <b>", before + ONE[name], before + TWO.get(name, ONE[name])):
        assert accepts(form.grammar, folder, text), text
    for text in (before + ONE[name].replace("Paris", "Oslo"), before + ONE[name].replace("get_weather", "other")):
        assert not accepts(form.grammar, folder, text), text


# ---- prompts ------------------------------------------------------------------------------------------


def test_templates_are_told_of_tools_calls_and_answers() -> None:
    messages = [
        Message("user", "Weather?"),
        Message("assistant", "", (ToolCall("call_1", "get_weather", '{"city": "Paris"}'),)),
        Message("tool", "sunny", tool_call_id="call_1", name="get_weather"),
    ]
    prompt = template(QWEN).render(messages, [WEATHER.described()])
    assert prompt.startswith('<|user|># Tools\n<tools>\n{"type": "function", "function": {"name": "get_weather"')
    assert '<|assistant|>\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|end|>' in prompt
    assert prompt.endswith("<|user|><tool_response>sunny</tool_response><|end|><|assistant|>")
    assert "# Tools" not in template(QWEN).render(messages)
    assert '"parameters": {"city": "Paris"}}<|end|>' in template(LLAMA).render(messages)
    with pytest.raises(InvalidRequest, match="length 9"):
        template(MISTRAL).render(messages)


# ---- answers ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Router]:
    """A router over workers whose model knows one format and says `text`."""
    monkeypatch.setattr(router_process, "MODEL", model_with(folder, TEMPLATES[name]))
    async with running_router(text=text) as router:
        yield router


@pytest.mark.parametrize("name", FORMATS)
async def test_openais_client_reads_calls(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TWO.get(name, ONE[name])
    expected = [PARIS, ("now", {})][: 2 if name in TWO else 1]
    if name != "llama":
        text = f"Let me see.\n{text}"
    async with (
        serving(tmp_path, name, text, monkeypatch) as router,
        openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0) as client,
    ):
        options = {"model": "pydoc", "messages": ASK, "tools": DESCRIBED}
        answer = (await client.chat.completions.create(**options)).choices[0]  # type: ignore[call-overload]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content == (None if name == "llama" else "Let me see.")
        calls = answer.message.tool_calls
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == expected
        ids = [call.id for call in calls]
        assert len(set(ids)) == len(ids)
        assert all(re.fullmatch("[a-z0-9]{9}" if name.startswith("mistral") else "call_[0-9a-f]{24}", each) for each in ids)
        async with client.chat.completions.stream(**options) as stream:
            events = [event async for event in stream]
            final = (await stream.get_final_completion()).choices[0]
        assert final.finish_reason == "tool_calls"
        assert final.message.content == answer.message.content
        streamed = [(call.function.name, json.loads(call.function.arguments)) for call in final.message.tool_calls or []]
        assert streamed == expected
        assert sum(event.type == "tool_calls.function.arguments.delta" for event in events) > len(expected)  # in pieces
        # The answer, and those of the tools, can be sent back.
        results = [{"role": "tool", "tool_call_id": each, "content": "sunny"} for each in ids]
        back = [*ASK, answer.message, *results]
        again = await client.chat.completions.create(model="pydoc", messages=back, tools=DESCRIBED, max_tokens=1)  # type: ignore[call-overload]
        assert again.choices[0].finish_reason == "length"


async def test_tool_choice_decides_what_the_worker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        serving(tmp_path, "hermes", TWO["hermes"], monkeypatch) as router,
        httpx.AsyncClient(base_url=router.url, timeout=20) as http,
    ):
        named = {"type": "function", "function": {"name": "now"}}
        seen = {}
        for choice in ("auto", "none", "required", named, None):
            body = {"messages": ASK, "tools": DESCRIBED, "tool_choice": choice}
            answer = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
            spec = [m.submit for m in router.cluster.workers["p0"].received if m.WhichOneof("body") == "submit"][-1].sequence
            prompt = TextTokenizer.load(tmp_path).decode(spec.prompt)
            assert ("# Tools" in prompt) is (choice != "none")
            if choice == "none":
                assert answer["message"]["content"] == TWO["hermes"]
                assert answer["finish_reason"] == "stop"
            else:
                assert len(answer["message"]["tool_calls"]) == (1 if choice == named else 2)
            seen[str(choice)] = spec.sampling.grammar
        assert seen["auto"] == seen["none"] == seen["None"] == ""
        assert "get_weather" in seen["required"]
        assert "get_weather" not in seen[str(named)]
        body = {"messages": ASK, "tools": DESCRIBED, "parallel_tool_calls": False}
        answer = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
        assert len(answer["message"]["tool_calls"]) == 1


async def test_markup_never_reaches_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        serving(tmp_path, "mistral", f"Hm. {TWO['mistral']}", monkeypatch) as router,
        httpx.AsyncClient(base_url=router.url, timeout=20) as http,
    ):
        body = {"messages": ASK, "tools": DESCRIBED, "stream": True, "n": 2}
        raw = (await http.post("/v1/chat/completions", json=body)).text
        deltas = [json.loads(line[6:])["choices"][0] for line in raw.split("\n\n") if line.startswith("data: {")]
        for index in (0, 1):
            own = [choice for choice in deltas if choice["index"] == index]
            assert own[0]["delta"] == {"role": "assistant", "content": None}
            assert "".join(choice["delta"].get("content") or "" for choice in own) == "Hm."
            entries = [entry for choice in own for entry in choice["delta"].get("tool_calls", [])]
            begun = [entry for entry in entries if "id" in entry]
            assert [(entry["index"], entry["type"], entry["function"]["name"]) for entry in begun] == [
                (0, "function", "get_weather"),
                (1, "function", "now"),
            ]
            assert all(set(entry) == {"index", "function"} for entry in entries if entry not in begun)
            assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["tool_calls"]


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
REFUSED: list[tuple[dict[str, object], str, str]] = [
    ({"tools": DESCRIBED, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "no function 'f'"),
    ({"tools": DESCRIBED, "tool_choice": "maybe"}, "tool_choice", "'none', 'auto' or 'required'"),
    ({"tool_choice": "required"}, "tool_choice", "it needs tools"),
    ({"tools": [*DESCRIBED, DESCRIBED[0]]}, "tools", "two functions are called 'get_weather'"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "tools.0.function.name"),
    ({"tools": [{"type": "web_search"}]}, "tools", "tools.0.type"),
    ({"tools": DESCRIBED, "response_format": {"type": "json_object"}}, "response_format", "together with tools"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "objct"}}}], "tool_choice": "required"},
        "tools",
        "objct",
    ),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "messages", "messages.0.tool_calls: only the"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "messages.0.tool_call_id"),
    ({"messages": [{"role": "user", "content": "a", "tool_call_id": "c"}]}, "messages", "messages.0.tool_call_id: only"),
    ({"messages": [{"role": "assistant"}]}, "messages", "messages.0.content: Input should be"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "["}}]}]},
        "messages",
        "messages.0.tool_calls.0.function.arguments: it must be the JSON text of an object",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[" * 999}}]}]},
        "messages",
        "arguments: it must be the JSON text of an object",
    ),
]


async def test_impossible_requests_name_the_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        serving(tmp_path, "hermes", "Hello", monkeypatch) as router,
        httpx.AsyncClient(base_url=router.url, timeout=20) as http,
    ):
        for fields, field, words in REFUSED:
            response = await http.post("/v1/chat/completions", json={"messages": ASK, **fields})
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, field), error
            assert words in error["message"]
        fine = await http.post("/v1/chat/completions", json={"messages": ASK, "tools": []})
        assert fine.json()["choices"][0]["message"]["content"] == "Hello"


async def test_a_model_without_tools_refuses_them_by_name() -> None:
    async with running_router(text="Hello") as router, httpx.AsyncClient(base_url=router.url, timeout=20) as http:
        for fields, field in (
            ({"tools": DESCRIBED}, "tools"),
            ({"messages": [*ASK, {"role": "assistant", "tool_calls": [CALL]}]}, "messages"),
            ({"messages": [*ASK, {"role": "tool", "content": "a", "tool_call_id": "c"}]}, "messages"),
        ):
            response = await http.post("/v1/chat/completions", json={"messages": ASK, **fields})
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, field), error
            assert f"{field}: this model's chat template does not define tools" in error["message"]
