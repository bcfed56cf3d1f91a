"""The shipped model through real Ray actors: what comes out, and what happens when the controller dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from baton.tests.cluster.live_cluster import MODEL, PROMPT, LiveCluster, live, topology

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveCluster]:
    async with live(topology("onray", launcher="ray"), tmp_path_factory.mktemp("logs")) as cluster:
        yield cluster


async def test_greedy_output_equals_transformers(cluster: LiveCluster) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        mask = torch.ones_like(prompt)
        expected = model.generate(prompt, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=None)
    (completion,) = await cluster.client.generate(prompt[0].tolist(), max_tokens=40, temperature=0.0, ignore_eos=True)
    assert list(completion.token_ids) == expected[0, prompt.shape[1] :].tolist()
    assert completion.stages.handoff > 0  # it did cross two pools
    await cluster.baseline()


async def test_streams_go_on_while_the_controller_is_dead_and_restarts_resume_after(cluster: LiveCluster) -> None:
    undisturbed = await cluster.client.generate(PROMPT, max_tokens=80, temperature=0.0, ignore_eos=True)
    killed, tokens = False, []
    async for chunk in cluster.client.stream(PROMPT, max_tokens=80, temperature=0.0, ignore_eos=True):
        tokens += chunk.token_ids
        if not killed and len(tokens) >= 10:
            controller = ray.get_actor("onray/controller", namespace="baton")
            os.kill(await controller.pid.remote(), signal.SIGKILL)
            killed = True
    assert tuple(tokens) == undisturbed[0].token_ids
    async with asyncio.timeout(30):
        while True:
            try:
                pid = await cluster.strike("decode-0")  # asks the controller for the pid: it is back
                break
            except Exception:
                await asyncio.sleep(0.2)
    await cluster.ready()
    assert await cluster.pid("decode-0") != pid
    again = await cluster.client.generate(PROMPT, max_tokens=80, temperature=0.0, ignore_eos=True)
    assert again[0].token_ids == undisturbed[0].token_ids
    await cluster.baseline()


async def test_the_logs_of_the_members_are_where_status_says(cluster: LiveCluster) -> None:
    names = {path.stem for path in Path(cluster.running.logs).glob("*.log")}
    assert {"prefill-0", "decode-0", "router-0"} <= names
