"""Structured output with real processes: the schema holds over the handoff, and when the decode worker is killed."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import jsonschema
import pytest
import pytest_asyncio
from baton.tests.cluster.live_cluster import PROMPT, LiveCluster, live, topology

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["list", "dict", "tuple"]},
        "names": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{4,12}$"}, "minItems": 6, "maxItems": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["kind", "names", "size"],
    "additionalProperties": False,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveCluster]:
    async with live(topology("structured"), tmp_path_factory.mktemp("logs")) as cluster:
        yield cluster


async def test_a_schema_holds_when_the_decode_worker_is_killed(cluster: LiveCluster) -> None:
    asked = {"json_schema": SCHEMA, "max_tokens": 300, "ignore_eos": True, "temperature": 1.2, "seed": 7}
    (undisturbed,) = await cluster.client.generate(PROMPT, **asked)
    jsonschema.validate(json.loads(undisturbed.text), SCHEMA)
    assert undisturbed.finish_reason == "stop"
    text, last, struck = "", None, False
    async for chunk in cluster.client.stream(PROMPT, **asked):
        text, last = text + chunk.text, chunk
        if not struck and len(text) > 15:
            struck = True
            await cluster.strike("decode-0")
    assert text == undisturbed.text
    assert last is not None
    assert last.stages is not None
    assert last.stages.attempts == 2
    await cluster.ready()
    await cluster.baseline()


async def test_structured_and_free_requests_share_steps(cluster: LiveCluster) -> None:
    free = {"temperature": 0.0, "max_tokens": 30}
    (alone,) = await cluster.client.generate(PROMPT, **free)
    answers = await asyncio.gather(
        cluster.client.generate(PROMPT, regex="([a-z]{2,5} ){4}", max_tokens=100),
        cluster.client.generate(PROMPT, **free),
        cluster.client.generate(PROMPT, choice=["left", "right"], n=2, max_tokens=20),
    )
    assert re.fullmatch("([a-z]{2,5} ){4}", answers[0][0].text)
    assert answers[1][0].token_ids == alone.token_ids
    assert {answer.text for answer in answers[2]} <= {"left", "right"}
    async with httpx.AsyncClient(base_url=f"http://{cluster.http}", timeout=30) as http:
        # A seed, and room for all the white space that a small model puts between values when it may.
        body = {"messages": [{"role": "user", "content": PROMPT}], "structured_outputs": {"json": SCHEMA}}
        body |= {"max_tokens": 600, "seed": 7, "temperature": 0.7}
        (choice,) = (await http.post("/v1/chat/completions", json=body)).json()["choices"]
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    assert choice["finish_reason"] == "stop"
    await cluster.baseline()


async def test_the_example_of_the_readme(cluster: LiveCluster, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (example,) = (block for block in blocks if "response_format" in block)
    here = example.replace("localhost:8000", cluster.http).replace('"pydoc-llama"', '"pydoc"')
    names: dict[str, object] = {}
    await asyncio.to_thread(exec, here, names)
    jsonschema.validate(json.loads(capsys.readouterr().out), names["schema"])
    await cluster.baseline()
