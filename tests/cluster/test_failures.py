"""Every row of "when something goes wrong", with real processes. After each: all blocks and tickets back at baseline."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import pytest
import pytest_asyncio
from baton.client.types import Completion
from baton.core.errors import Cancelled, DeadlineExceeded, InvalidRequest, ModelNotFound, Overloaded, Unavailable
from baton.core.view import Role
from baton.deploy.members import ENTRY_POINTS
from baton.tests.cluster.live_cluster import PROMPT, LiveCluster, live, topology

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

GREEDY = {"temperature": 0.0, "ignore_eos": True}
SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 1234, "ignore_eos": True}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveCluster]:
    async with live(topology("failures"), tmp_path_factory.mktemp("logs")) as cluster:
        yield cluster


async def one(cluster: LiveCluster, **options: object) -> Completion:
    (completion,) = await cluster.client.generate(PROMPT, **options)
    return completion


async def after_tokens(
    cluster: LiveCluster, num_tokens: int, **options: object
) -> tuple[asyncio.Task[Completion], asyncio.Event]:
    """A request running in the background; the event is set once it has streamed `num_tokens`."""
    reached = asyncio.Event()

    async def run() -> Completion:
        text, ids = "", []
        async for chunk in cluster.client.stream(PROMPT, **options):
            text += chunk.text
            ids += chunk.token_ids
            if len(ids) >= num_tokens:
                reached.set()
            if chunk.finish_reason is not None:
                assert chunk.usage is not None
                assert chunk.stages is not None
                return Completion(chunk.request_id, 0, text, tuple(ids), (), chunk.finish_reason, chunk.usage, chunk.stages)
        raise AssertionError("the stream ended without a finish reason")

    return asyncio.create_task(run()), reached


async def is_gone(pid: int, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.05)


async def test_client_cancel_frees_both_workers(cluster: LiveCluster) -> None:
    stream = cluster.client.stream(PROMPT, max_tokens=400, **GREEDY)
    async for _ in stream:
        break
    await stream.aclose()
    await cluster.baseline(seconds=2.0)


async def test_abort_by_request_id_ends_the_stream(cluster: LiveCluster) -> None:
    task, reached = await after_tokens(cluster, 3, max_tokens=400, request_id="mine", **GREEDY)
    await reached.wait()
    assert await cluster.client.abort("mine")
    with pytest.raises(Cancelled):
        await task
    await cluster.baseline(seconds=2.0)


async def test_http_disconnect_frees_both_workers(cluster: LiveCluster) -> None:
    body = {"model": "pydoc", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    async with httpx.AsyncClient() as http, http.stream("POST", f"http://{cluster.http}/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for _ in response.aiter_lines():
            break
    await cluster.baseline(seconds=2.0)


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_sigkill_of_the_decode_worker_is_invisible(cluster: LiveCluster, options: dict[str, object]) -> None:
    undisturbed = await one(cluster, max_tokens=60, **options)
    task, reached = await after_tokens(cluster, 20, max_tokens=60, **options)
    await reached.wait()
    await cluster.strike("decode-0")
    disturbed = await task
    assert (disturbed.text, disturbed.token_ids) == (undisturbed.text, undisturbed.token_ids)
    assert disturbed.usage.completion_tokens == 60
    assert disturbed.stages.attempts == 2
    await cluster.ready()
    await cluster.baseline()


async def test_sigkill_of_the_prefill_worker_is_invisible(cluster: LiveCluster) -> None:
    undisturbed = await one(cluster, max_tokens=20, **GREEDY)
    os.kill(await cluster.pid("prefill-0"), signal.SIGSTOP)  # so that the request is surely there when it dies
    task, _ = await after_tokens(cluster, 1, max_tokens=20, **GREEDY)
    await cluster.until_load(lambda load: load["prefill-0"].assigned > 0, 2.0)
    await cluster.strike("prefill-0")
    disturbed = await task
    assert disturbed.token_ids == undisturbed.token_ids
    assert disturbed.stages.attempts == 2
    await cluster.ready()
    await cluster.baseline()


@pytest.mark.parametrize("member", ["prefill-0", "decode-0"])
async def test_a_worker_that_hangs_is_replaced_and_cannot_come_back(cluster: LiveCluster, member: str) -> None:
    undisturbed = await one(cluster, max_tokens=40, **SEEDED)
    tasks = [await after_tokens(cluster, 5, max_tokens=40, **SEEDED) for _ in range(4)]
    await tasks[0][1].wait()
    pid = await cluster.strike(member, signal.SIGSTOP)
    late, _ = await after_tokens(cluster, 1, max_tokens=40, **SEEDED)
    for completion in [await task for task, _ in tasks] + [await late]:
        assert completion.token_ids == undisturbed.token_ids
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    await is_gone(pid)
    await cluster.ready()
    await cluster.baseline()


async def test_router_restart_ends_its_streams_and_frees_the_workers(cluster: LiveCluster) -> None:
    task, reached = await after_tokens(cluster, 5, max_tokens=400, **GREEDY)
    await reached.wait()
    await cluster.strike("router-0")
    with pytest.raises(Unavailable):
        await task
    await cluster.ready()
    await cluster.baseline()  # the new router replaces the old one at the workers
    assert (await one(cluster, max_tokens=5, **GREEDY)).usage.completion_tokens == 5


async def test_impossible_requests_are_refused_by_name(cluster: LiveCluster) -> None:
    model = await cluster.client.model()
    steps = (await cluster.load())["prefill-0"].step
    with pytest.raises(InvalidRequest, match=str(model.max_model_len)):
        await cluster.client.generate([5] * (model.max_model_len + 1), max_tokens=1)
    with pytest.raises(InvalidRequest, match="top_p"):
        await one(cluster, top_p=1.5)
    with pytest.raises(InvalidRequest, match="temperature"):
        await one(cluster, temperature=-1.0)
    with pytest.raises(InvalidRequest, match=str(model.vocab_size)):
        await cluster.client.generate([model.vocab_size], max_tokens=1)
    with pytest.raises(ModelNotFound, match="no-such-model"):
        await one(cluster, model="no-such-model")
    assert (await cluster.load())["prefill-0"].step == steps  # before any work


async def test_a_deadline_drops_the_request(cluster: LiveCluster) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await one(cluster, max_tokens=900, timeout=1.0, **GREEDY)
    assert time.monotonic() - began < 5.0
    await cluster.baseline(seconds=2.0)


async def test_many_requests_and_a_crash_in_the_middle(cluster: LiveCluster) -> None:
    async def ask(index: int) -> tuple[int, ...]:
        (completion,) = await cluster.client.generate(f"{index} {PROMPT}", max_tokens=24, seed=index, ignore_eos=True)
        return completion.token_ids

    undisturbed = await asyncio.gather(*(ask(index) for index in range(24)))
    running = asyncio.gather(*(ask(index) for index in range(24)))
    await cluster.until_load(lambda load: load["decode-0"].running > 3, 5.0)
    await cluster.strike("decode-0")
    assert await running == undisturbed
    await cluster.ready()
    await cluster.baseline()


async def test_overload_is_shed_at_admission(tmp_path: Path) -> None:
    async with live(topology("overload", admission="queue_length", max_queue=3), tmp_path) as cluster:
        running = [await after_tokens(cluster, 1, max_tokens=100, **GREEDY) for _ in range(3)]
        await asyncio.gather(*(reached.wait() for _, reached in running))
        with pytest.raises(Overloaded) as refused:
            await one(cluster, max_tokens=5)
        assert refused.value.retry_after > 0
        async with httpx.AsyncClient() as http:
            body = {"model": "pydoc", "prompt": "x", "max_tokens": 3}
            response = await http.post(f"http://{cluster.http}/v1/completions", json=body)
        assert response.status_code == 429
        assert float(response.headers["retry-after"]) > 0
        for task, _ in running:
            assert (await task).usage.completion_tokens == 100
        await cluster.baseline()


async def test_damaged_kv_is_recomputed_and_never_served(
    cluster: LiveCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = await one(cluster, max_tokens=30, **GREEDY)
    monkeypatch.setitem(ENTRY_POINTS, Role.PREFILL, "baton.tests.cluster.faulty_prefill")
    async with live(topology("damaged"), tmp_path) as damaged:
        completion = await one(damaged, max_tokens=30, **GREEDY)
        assert completion.token_ids == undisturbed.token_ids
        assert completion.stages.attempts == 2
        await damaged.baseline()


async def test_leases_expire_while_the_router_is_frozen(cluster: LiveCluster) -> None:
    undisturbed = await one(cluster, max_tokens=20, **GREEDY)
    prefill, router = await cluster.pid("prefill-0"), await cluster.pid("router-0")
    os.kill(prefill, signal.SIGSTOP)  # the handoff stays open
    task, _ = await after_tokens(cluster, 1, max_tokens=20, **GREEDY)
    await cluster.until_load(lambda load: load["decode-0"].tickets == 1, 2.0)
    os.kill(router, signal.SIGSTOP)  # nobody renews
    await asyncio.sleep(4.5)  # a lease and a half
    os.kill(prefill, signal.SIGCONT)
    os.kill(router, signal.SIGCONT)
    completion = await task
    assert completion.token_ids == undisturbed.token_ids
    assert completion.stages.attempts >= 2
    await cluster.ready()
    await cluster.baseline()
