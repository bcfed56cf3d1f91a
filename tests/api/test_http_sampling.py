"""Parameters of sampling over HTTP: what reaches the workers, echo, log probabilities of prompts, the best of several."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from baton.proto import worker_pb2 as pb
from baton.tests.router.fake_cluster import LOGPROBS
from baton.tests.router.router_process import Router, running_router, tokenizer

TEXT = "def wörks(x): return 🙂 and then some more words"
PROMPT = "Say wörds:"


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    async with running_router(text=TEXT) as running:
        yield running


@pytest.fixture
async def client(router: Router) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0) as openai_client:
        yield openai_client


@pytest.fixture
async def http(router: Router) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=router.url, timeout=20) as raw:
        yield raw


def submitted(router: Router) -> list[pb.SequenceSpec]:
    """What prefill workers were told, the canary first."""
    return [m.submit.sequence for m in router.cluster.workers["p0"].received if m.WhichOneof("body") == "submit"]


async def test_every_parameter_reaches_both_workers(router: Router, http: httpx.AsyncClient) -> None:
    asked = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.125,
        "presence_penalty": -1.5,
        "frequency_penalty": 1.25,
        "repetition_penalty": 1.1,
        "logit_bias": {"50": -100, "7": 2.5},
        "bad_words": ["rude", " gross word"],
        "min_tokens": 3,
        "max_tokens": 9,
        "stop_token_ids": [9],
        "seed": 5,
    }
    messages = [{"role": "user", "content": "Hi"}]
    for path, prompt in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": messages})):
        assert (await http.post(f"/v1/{path}", json={**prompt, **asked})).status_code == 200
        first = submitted(router)[-1]
        reserves = [m.reserve.sequence for m in router.cluster.workers["d1"].received if m.WhichOneof("body") == "reserve"]
        assert reserves[-1].sampling == first.sampling
        sampling = first.sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 7, 0.9, 0.125)
        assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (-1.5, 1.25, 1.1)
        assert (list(sampling.biased_tokens), list(sampling.biases)) == ([7, 50], [2.5, -100.0])
        words = [tuple(word.tokens) for word in sampling.bad_words]
        spelled = [await tokenizer().encode(text, False) for text in ("rude", " rude", "gross word", " gross word")]
        assert words == spelled
        assert (sampling.min_tokens, sampling.max_tokens, sampling.seed) == (3, 9, 5)
        assert 9 in sampling.stop_token_ids


async def test_parameters_at_rest_say_nothing(router: Router, http: httpx.AsyncClient) -> None:
    at_rest = {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "logit_bias": {}, "bad_words": []}
    for body in ({}, at_rest, dict.fromkeys(at_rest)):
        assert (await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **body})).status_code == 200
    plain, *others = [spec.sampling for spec in submitted(router)[-3:]]
    for other in others:
        other.seed = plain.seed
        assert other == plain
    assert plain.repetition_penalty == 1.0


IMPOSSIBLE: list[tuple[dict[str, object], str, str]] = [
    ({"min_p": 1.5}, "min_p", "from 0.0 to 1.0"),
    ({"presence_penalty": 2.1}, "presence_penalty", "from -2.0 to 2.0"),
    ({"frequency_penalty": -3}, "frequency_penalty", "from -2.0 to 2.0"),
    ({"repetition_penalty": 0}, "repetition_penalty", "from 0.01"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "from -100.0 to 100.0"),
    ({"logit_bias": {"5000": 1}}, "logit_bias", "vocabulary of 4096"),
    ({"logit_bias": {"hello": 1}}, "logit_bias", "'hello' is no token id"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"٣": 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"5": "much"}}, "logit_bias", "logit_bias.5: "),
    ({"logit_bias": [[5, 1]]}, "logit_bias", "dictionary"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias", "at most 1024"),
    ({"bad_words": "rude"}, "bad_words", "list"),
    ({"bad_words": ["", "x"]}, "bad_words", "1 to 128 characters"),
    ({"bad_words": ["x" * 129]}, "bad_words", "1 to 128 characters"),
    ({"bad_words": ["x"] * 129}, "bad_words", "at most 128 words"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "from 0 to 20"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not streamed"),
    ({"min_tokens": 17}, "min_tokens", "from 0 to 16"),
]
IMPOSSIBLE_COMPLETIONS: list[tuple[dict[str, object], str, str]] = [
    ({"best_of": 1, "n": 2}, "best_of", "from 2 to 128"),
    ({"best_of": 129}, "best_of", "from 1 to 128"),
    ({"best_of": 3, "stream": True}, "best_of", "cannot be streamed"),
    ({"best_of": 100, "prompt": ["a"] * 11}, "best_of", "1024 choices"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"use_beam_search": True}, "use_beam_search", "not supported"),
]


async def test_impossible_parameters_name_the_field(router: Router, http: httpx.AsyncClient) -> None:
    before = len(submitted(router))
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 16}
    cases = [("completions", {"prompt": "a", **body}, *rest) for body, *rest in IMPOSSIBLE + IMPOSSIBLE_COMPLETIONS]
    cases += [("chat/completions", {**chat, **body}, *rest) for body, *rest in IMPOSSIBLE]
    for path, body, field, words in cases:
        response = await http.post(f"/v1/{path}", json=body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, field), (body, error)
        assert words in error["message"], (body, error)
        assert len(error["message"]) < 400
    assert len(submitted(router)) == before


# ---- echo and the log probabilities of prompts -----------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_echo(client: openai.AsyncOpenAI, stream: bool, n: int) -> None:
    tokens = await tokenizer().encode(PROMPT)
    texts = [""] * 2 * n
    asked: dict[str, object] = {"model": "pydoc", "prompt": [PROMPT, "a"], "max_tokens": 100, "echo": True, "n": n}
    if stream:
        async for chunk in await client.completions.create(**asked, stream=True):  # type: ignore[call-overload]
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        answer = await client.completions.create(**asked)  # type: ignore[call-overload]
        texts = [choice.text for choice in answer.choices]
    assert texts == [PROMPT + TEXT] * n + ["a" + TEXT] * n
    of_tokens = await client.completions.create(model="pydoc", prompt=list(tokens), max_tokens=100, echo=True)
    assert of_tokens.choices[0].text == tokenizer().decode(tokens) + TEXT


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs(client: openai.AsyncOpenAI, stream: bool) -> None:
    prompt = await tokenizer().encode(PROMPT)
    asked: dict[str, object] = {"model": "pydoc", "prompt": PROMPT, "max_tokens": 3, "echo": True, "logprobs": 2}
    text, tokens, values, tops, offsets = "", [], [], [], []
    if stream:
        parts = [chunk.choices[0] async for chunk in await client.completions.create(**asked, stream=True)]  # type: ignore[call-overload]
    else:
        parts = (await client.completions.create(**asked)).choices  # type: ignore[call-overload]
    for part in parts:
        text += part.text
        tokens += part.logprobs.tokens
        values += part.logprobs.token_logprobs
        tops += part.logprobs.top_logprobs
        offsets += part.logprobs.text_offset
    assert len(tokens) == len(values) == len(tops) == len(offsets) == len(prompt) + 3
    assert tokens[: len(prompt)] == [tokenizer().token_text(token) for token in prompt]
    assert values == [None, *(-0.25 * place for place in range(1, len(prompt))), *[-0.5] * 3]
    assert tops[0] is None
    assert all(1 <= len(top) <= 2 for top in tops[1:])  # halves of characters read the same
    whole = [(at, token) for at, token in zip(offsets, tokens, strict=True) if "\ufffd" not in token]
    assert len(whole) >= len(prompt)
    special = tokens[0] if prompt[0] < 5 else ""  # has no text
    assert all(text.startswith(token, at) for at, token in whole if token != special)


async def test_echo_of_the_prompt_alone(router: Router, http: httpx.AsyncClient) -> None:
    """How evaluation harnesses measure the likelihood of a text."""
    for stream in (False, True):
        asked = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1, "stream": stream}
        response = await http.post("/v1/completions", json=asked)
        assert response.status_code == 200
        if not stream:
            answer = response.json()
            (choice,) = answer["choices"]
            assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
            prompt = await tokenizer().encode(PROMPT)
            assert len(choice["logprobs"]["tokens"]) == len(prompt)
            assert choice["logprobs"]["token_logprobs"][1:] == [-0.25 * place for place in range(1, len(prompt))]
            assert answer["usage"]["completion_tokens"] == 0
    assert submitted(router)[-1].sampling.max_tokens == 1


async def test_prompt_logprobs_as_vllm_writes_them(http: httpx.AsyncClient) -> None:
    asked = {"prompt": [7, 8, 9], "max_tokens": 1, "n": 2, "prompt_logprobs": 2}
    answer = (await http.post("/v1/completions", json=asked)).json()
    for choice in answer["choices"]:
        first, second, third = choice["prompt_logprobs"]
        assert first is None
        text = tokenizer().token_text
        assert second == {
            "8": {"logprob": -0.25, "rank": 1, "decoded_token": text(8)},
            "9": {"logprob": -1.25, "rank": 2, "decoded_token": text(9)},
        }
        assert set(third) == {"9", "10"}
    messages = [{"role": "user", "content": "Hi"}]
    chat = (await http.post("/v1/chat/completions", json={"messages": messages, "prompt_logprobs": 0, "max_tokens": 1})).json()
    prompt = await tokenizer().encode("<|bos|><|user|>Hi<|end|><|assistant|>", False)
    assert [None if each is None else list(each) for each in chat["prompt_logprobs"]] == [None, *([str(t)] for t in prompt[1:])]
    assert (
        "prompt_logprobs" not in (await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).json()["choices"][0]
    )


async def test_prompt_logprobs_and_echo_each_have_their_number(http: httpx.AsyncClient) -> None:
    asked = {"prompt": [7, 8], "max_tokens": 1, "echo": True, "logprobs": 3, "prompt_logprobs": 1}
    (choice,) = (await http.post("/v1/completions", json=asked)).json()["choices"]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 3
    assert len(choice["prompt_logprobs"][1]) == 1


# ---- n and best_of ---------------------------------------------------------------------------------


async def test_best_of_returns_the_likeliest(router: Router, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="pydoc", prompt="a", max_tokens=4, best_of=4, n=2, logprobs=0)
    assert [choice.index for choice in answer.choices] == [0, 1]
    means = [choice.logprobs.token_logprobs[0] for choice in answer.choices]  # type: ignore[union-attr,index]
    assert means == sorted(LOGPROBS)[:-3:-1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16  # all that were sampled
    assert [spec.sampling.sequence_index for spec in submitted(router)[-4:]] == [0, 1, 2, 3]
    unasked = await client.completions.create(model="pydoc", prompt="a", max_tokens=4, best_of=2)
    assert unasked.choices[0].logprobs is None
    several = await client.completions.create(model="pydoc", prompt=["a", "b"], max_tokens=100, best_of=3)
    assert [choice.text for choice in several.choices] == [TEXT] * 2


async def test_best_of_n_streams(client: openai.AsyncOpenAI) -> None:
    """Nothing has to be chosen, so nothing is held back."""
    stream = await client.completions.create(model="pydoc", prompt="a", max_tokens=100, best_of=2, n=2, stream=True)
    texts = ["", ""]
    count = 0
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
        count += 1
    assert texts == [TEXT] * 2
    assert count > 4


async def test_a_stop_string_may_be_part_of_the_text(client: openai.AsyncOpenAI) -> None:
    for stop in ([" and", " and then"], [" and then", " and"], ["ks(x): return 🙂 a", "🙂 and"]):
        first = min(TEXT.index(each) + len(each) for each in stop)
        for include in (True, False):
            answer = await client.completions.create(
                model="pydoc", prompt="a", max_tokens=100, stop=stop, extra_body={"include_stop_str_in_output": include}
            )
            text = answer.choices[0].text
            met = max((each for each in stop if TEXT[:first].endswith(each)), key=len)
            assert text == (TEXT[:first] if include else TEXT[: first - len(met)])
            assert answer.choices[0].finish_reason == "stop"
