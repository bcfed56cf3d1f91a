"""Structured output at the faces: what may be asked for, what is refused and how, and what reaches a worker."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
from baton.api import structured
from baton.api.structured import Form, GrammarChecker, any_object_form, choice_form, grammar_form, regex_form, schema_form
from baton.api.tokenizer import TextTokenizer
from baton.client.client import AsyncClient
from baton.core.errors import InvalidRequest
from baton.proto import worker_pb2 as pb
from baton.tests.router.router_process import MODEL, Router, running_router
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

LL_TOKENIZER = LLTokenizer(str(MODEL / "tokenizer.json"), eos_token=[1, 4])
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    async with running_router(text='{"a": 1}') as running:
        yield running


@pytest.fixture
async def http(router: Router) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=router.url, timeout=20) as raw:
        yield raw


@pytest.fixture
async def client(router: Router) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(router.grpc) as made:
        yield made


def matches(form: Form, text: str) -> bool:
    matcher = LLMatcher(LL_TOKENIZER, form.grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.consume_tokens(TOKENIZER.encode(text, add_special_tokens=False).ids) and matcher.is_accepting()


def submitted(router: Router) -> list[pb.SamplingSpec]:
    """What the workers were told."""
    received = router.cluster.workers["p0"].received
    return [message.submit.sequence.sampling for message in received if message.WhichOneof("body") == "submit"]


def test_forms_match_what_they_say() -> None:
    schema = schema_form("f", SCHEMA)
    assert schema == schema_form("f", json.dumps(SCHEMA))
    assert matches(schema, '{"a":1}')
    assert matches(schema, '{\n    "a": -12\n}')
    assert not matches(schema, '{"a": 1, "b": 2}')
    assert not matches(schema, '{"a":' + " " * 100 + "1}")  # white space has an end
    assert matches(any_object_form("f"), '{"x": [1, {"y": "ä"}], "z": null}')
    assert not matches(any_object_form("f"), "[1]")
    assert matches(regex_form("f", "[a-c]+\\d"), "abc7")
    assert not matches(regex_form("f", "[a-c]+\\d"), "abc7 ")
    for choice in ("a", "ab", 'quo"te\\', "two\nlines", "🙂", "\x7f"):
        assert matches(choice_form("f", ["other", "a", "ab", 'quo"te\\', "two\nlines", "🙂", "\x7f"]), choice)
    assert matches(grammar_form("f", 'start: "a" /[0-9]/+'), "a12")
    assert matches(grammar_form("f", 'root ::= "yes" | "no"'), "no")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schema_form("field.json", '{"type":'), "it is no JSON schema"),
        (lambda: schema_form("field.json", "[1]"), "it is no JSON schema"),
        (lambda: schema_form("field.json", '{"a":' * 500 + "1" + "}" * 500), "recursion limit"),
        (lambda: schema_form("field.json", {"type": "objct"}), "objct"),
        (lambda: schema_form("field.json", {"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: schema_form("field.json", {"$ref": "http://example.com/s"}), "example.com"),
        (lambda: schema_form("field.json", {"enum": ["x" * (1 << 18)]}), "at most 262144"),
        (lambda: regex_form("field.json", "a(b"), "unclosed group"),
        (lambda: regex_form("field.json", "a(?=b)"), "look-ahead"),
        (lambda: regex_form("field.json", "(a?){3000}a{3000}"), "too many expressions"),
        (lambda: choice_form("field.json", []), "1 to 4096 texts"),
        (lambda: choice_form("field.json", ["a", ""]), "at least one character"),
        (lambda: grammar_form("field.json", "root ::= ((("), "GBNF"),
        (lambda: grammar_form("field.json", "start: other"), "other"),
    ],
)
async def test_what_nothing_can_match_is_refused_by_name(make: object, words: str) -> None:
    checker = GrammarChecker(MODEL / "tokenizer.json")
    with pytest.raises(InvalidRequest) as caught:
        await checker.check(make())  # type: ignore[operator]
    assert caught.value.field == "field"
    assert str(caught.value).startswith("field.json: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


async def test_good_grammars_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    checker, compiled = GrammarChecker(MODEL / "tokenizer.json"), []
    error = checker._error
    monkeypatch.setattr(checker, "_error", lambda grammar: compiled.append(grammar) or error(grammar))
    monkeypatch.setattr(structured, "MAX_REMEMBERED", 2)
    forms = {name: regex_form("f", name) for name in "abc"}
    for name in "aabbacabc":
        await checker.check(forms[name])
    assert [next(name for name in forms if forms[name].grammar == grammar) for grammar in compiled] == ["a", "b", "c", "b", "c"]
    await asyncio.gather(*(checker.check(regex_form("f", f"x{i}")) for i in range(5)))
    assert len(checker._good) == 2


async def test_a_model_without_tokenizer_json_refuses_forms_only() -> None:
    with pytest.raises(InvalidRequest, match=r"^f: structured output needs a tokenizer.json"):
        await GrammarChecker(None).check(regex_form("f", "a"))


def test_the_folder_decides_whether_there_is_a_checker(tmp_path: Path) -> None:
    shutil.copy(MODEL / "tokenizer.json", tmp_path)
    assert TextTokenizer.load(tmp_path).grammars._source == tmp_path / "tokenizer.json"


# ---- HTTP ---------------------------------------------------------------------------------------------


def schema_format(schema: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": schema}}


async def test_every_way_of_asking_reaches_the_worker(router: Router, http: httpx.AsyncClient) -> None:
    wanted = schema_form("f", SCHEMA).grammar
    for fields, grammar in (
        ({"response_format": schema_format(SCHEMA)}, wanted),
        ({"response_format": {"type": "json_object"}}, any_object_form("f").grammar),
        ({"response_format": {"type": "text"}}, ""),
        ({"structured_outputs": {"json": SCHEMA}}, wanted),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, wanted),
        ({"structured_outputs": {"json_object": True}}, any_object_form("f").grammar),
        ({"structured_outputs": {"regex": "a+"}}, regex_form("f", "a+").grammar),
        ({"structured_outputs": {"choice": ["a", "b"]}}, choice_form("f", ["a", "b"]).grammar),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, grammar_form("f", 'start: "a"').grammar),
        ({"guided_json": SCHEMA}, wanted),
        ({"guided_regex": "a+"}, regex_form("f", "a+").grammar),
        ({"guided_choice": ["a", "b"]}, choice_form("f", ["a", "b"]).grammar),
        ({"guided_grammar": 'start: "a"'}, grammar_form("f", 'start: "a"').grammar),
    ):
        chat = {"messages": [{"role": "user", "content": "a"}], "ignore_eos": True, "max_tokens": 5, **fields}
        response = await http.post("/v1/chat/completions", json=chat)
        assert response.status_code == 200, response.text
        sampling = submitted(router)[-1]
        assert sampling.grammar == grammar
        assert list(sampling.stop_token_ids) == ([1, 4] if grammar else [])  # nobody can wish away the end
    await http.post("/v1/completions", json={"prompt": "a", "response_format": {"type": "json_object"}})
    assert submitted(router)[-1].grammar == any_object_form("f").grammar


async def test_openais_client_parses_what_comes(router: Router) -> None:
    async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(
            model="pydoc",
            messages=[{"role": "user", "content": "a"}],
            response_format=schema_format(SCHEMA),  # type: ignore[arg-type]
        )
    assert json.loads(answer.choices[0].message.content or "") == {"a": 1}


REFUSED: list[tuple[dict[str, object], str, str]] = [
    ({"response_format": {"type": "yaml"}}, "response_format", "'json_object' or 'json_schema'"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "response_format.json_schema: Field required"),
    ({"response_format": schema_format({"type": "objct"})}, "response_format", "json_schema.schema: "),
    ({"response_format": schema_format("x")}, "response_format", "schema: Input should be a valid dictionary"),
    ({"structured_outputs": {}}, "structured_outputs", "give one of"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "together with structured_outputs.regex"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag: this field is not supported"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "together with response_format"),
    ({"guided_regex": "a("}, "guided_regex", "unclosed group"),
    ({"guided_choice": [1]}, "guided_choice", "guided_choice.0: Input should be a valid string"),
    ({"guided_json": 1}, "guided_json", "a JSON schema"),
    ({"guided_regex": "a", "min_tokens": 3}, "min_tokens", "guided_regex decides where the output ends"),
]


async def test_impossible_forms_name_the_field_and_reach_no_worker(router: Router, http: httpx.AsyncClient) -> None:
    before = len(submitted(router))
    for fields, field, words in REFUSED:
        for path, prompt in (
            ("completions", {"prompt": "a"}),
            ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            response = await http.post(f"/v1/{path}", json={**prompt, **fields})
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, field), error
            assert words in error["message"]
    assert len(submitted(router)) == before


# ---- gRPC ---------------------------------------------------------------------------------------------


async def test_the_client_library_asks_over_grpc(router: Router, client: AsyncClient) -> None:
    for options, grammar in (
        ({"json_schema": SCHEMA}, schema_form("f", SCHEMA).grammar),
        ({"json_schema": json.dumps(SCHEMA)}, schema_form("f", SCHEMA).grammar),
        ({"json_object": True}, any_object_form("f").grammar),
        ({"json_object": False}, ""),
        ({"regex": "a+"}, regex_form("f", "a+").grammar),
        ({"choice": ["a", "b"]}, choice_form("f", ["a", "b"]).grammar),
        ({"grammar": 'start: "a"'}, grammar_form("f", 'start: "a"').grammar),
        ({}, ""),
    ):
        (answer,) = await client.generate("a", max_tokens=20, **options)
        assert answer.text == '{"a": 1}'
        assert submitted(router)[-1].grammar == grammar


async def test_impossible_forms_are_invalid_arguments(router: Router, client: AsyncClient) -> None:
    before = len(submitted(router))
    for options, field, words in (
        ({"regex": "a("}, "structured_output", "structured_output.regex: "),
        ({"json_schema": "{"}, "structured_output", "structured_output.json_schema: it is no JSON schema"),
        ({"choice": []}, "structured_output", "structured_output.choice: "),
        ({"regex": "a", "min_tokens": 2}, "min_tokens", "structured_output.regex decides"),
        ({"regex": "a", "choice": ["b"]}, "choice", "choice: it cannot be given together with regex"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await client.generate("a", max_tokens=20, **options)
        assert caught.value.field == field
        assert words in str(caught.value)
    assert len(submitted(router)) == before
