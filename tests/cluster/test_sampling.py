"""Sampling parameters in a real cluster: across the handoff, and across the death of the worker that knew what was sampled."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from baton.api.tokenizer import TextTokenizer
from baton.client.types import Completion
from baton.tests.cluster.live_cluster import MODEL, PROMPT, LiveCluster, live, topology

pytestmark = pytest.mark.cluster

SHAPED = {
    "temperature": 0.8,
    "seed": 99,
    "min_p": 0.02,
    "presence_penalty": 0.6,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.2,
    "logit_bias": {100: 1.5},
    "max_tokens": 60,
    "ignore_eos": True,
}


async def killed_after(cluster: LiveCluster, num_tokens: int, **options: object) -> Completion:
    """A completion during which the decode worker dies."""
    reached = asyncio.Event()

    async def watch() -> tuple[int, ...]:
        tokens: tuple[int, ...] = ()
        async for chunk in cluster.client.stream(PROMPT, **options):
            tokens += chunk.token_ids
            if len(tokens) >= num_tokens:
                reached.set()
            if chunk.finish_reason is not None:
                assert chunk.stages is not None
                assert chunk.usage is not None
                ended.append(Completion("", 0, "", tokens, (), chunk.finish_reason, chunk.usage, chunk.stages))
        return tokens

    ended: list[Completion] = []
    running = asyncio.create_task(watch())
    await reached.wait()
    await cluster.strike("decode-0")
    await running
    return ended[0]


async def test_sampling_in_a_real_cluster(tmp_path: Path) -> None:
    async with live(topology("sampling"), tmp_path) as cluster:
        (plain,) = await cluster.client.generate(PROMPT, **{**SHAPED, "presence_penalty": 0, "frequency_penalty": 0})
        (free,) = await cluster.client.generate(PROMPT, **SHAPED)
        # Ban something that would be said: a whole word, and the second of two tokens in a row.
        words = [word for word in free.text.split() if word.isalpha()]
        (shaped,) = await cluster.client.generate(PROMPT, bad_words=[words[0], " ".join(words[1:3])], **SHAPED)
        assert len({plain.token_ids, free.token_ids, shaped.token_ids}) == 3
        assert words[0] not in shaped.text.split()
        assert (words[1], words[2]) not in set(pairwise(shaped.text.split()))

        disturbed = await killed_after(cluster, 20, bad_words=[words[0], " ".join(words[1:3])], **SHAPED)
        assert disturbed.token_ids == shaped.token_ids
        assert disturbed.stages.attempts == 2
        await cluster.ready()

        await check_prompt_logprobs(cluster)
        (best,) = await cluster.client.generate(PROMPT, **SHAPED, best_of=3, logprobs=0)
        each = await cluster.client.generate(PROMPT, **SHAPED, n=3, logprobs=0)
        likeliest = max(each, key=lambda one: sum(entry.logprob for entry in one.logprobs))  # all have 60 tokens
        assert best.token_ids == likeliest.token_ids
        await cluster.baseline()


async def check_prompt_logprobs(cluster: LiveCluster) -> None:
    """Teacher forcing: what was sampled greedily is the likeliest token everywhere when it is a prompt."""
    (said,) = await cluster.client.generate(PROMPT, temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2)
    async with httpx.AsyncClient(base_url=f"http://{cluster.http}") as http:
        body = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}
        alone = (await http.post("/v1/completions", json=body)).json()["choices"][0]
    (again,) = await cluster.client.generate([*await prompt_ids(cluster), *said.token_ids], max_tokens=4, prompt_logprobs=2)
    assert again.usage.cached_tokens == 0
    assert [entry.token for entry in again.prompt_logprobs[-24:]] == list(said.token_ids)
    for entry, sampled in zip(again.prompt_logprobs[-24:], said.logprobs, strict=True):
        assert entry.logprob == pytest.approx(sampled.logprob, abs=1e-3)
        assert entry.top[0][0] == entry.token
    assert alone["text"] == PROMPT
    values = alone["logprobs"]["token_logprobs"]
    assert values[0] is None
    assert values[1:] == pytest.approx([entry.logprob for entry in again.prompt_logprobs[:-24]], abs=1e-3)


async def prompt_ids(cluster: LiveCluster) -> tuple[int, ...]:
    """The prompt as the cluster encodes it."""
    return await TextTokenizer.load(MODEL).encode(PROMPT)
