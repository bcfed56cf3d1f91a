"""The loads against a scripted server: figures come with what is wrong with them."""

from __future__ import annotations

from baton.bench.http_target import HttpTarget
from baton.bench.prompts import PromptSource
from baton.core.slo import Slo
from baton.tests.bench.conftest import Call, serving
from loads import Lengths, closed, fresh_seed, poisson

SLO = Slo(30.0, 30.0, 0.9)


async def answer(call: Call, num_tokens: int, prompt_tokens: int) -> None:
    await call.start()
    for number in range(num_tokens):
        await call.text(f" {number}", "length" if number == num_tokens - 1 else None)
    await call.finish(num_tokens, prompt_tokens)


async def test_a_server_that_does_as_told_gives_no_complaint() -> None:
    async with serving(lambda call: answer(call, 4, 9)) as server:
        target = HttpTarget(server.url, "fake", PromptSource(3))
        measured = await closed(target, 2, 6, Lengths(9, 4), 3, SLO)
    assert measured.complaints == ()
    assert (measured.summary.num_finished, measured.summary.output_tokens) == (6, 24)
    assert len({str(call.body["prompt"]) for call in server.calls}) == 6


async def test_other_lengths_than_asked_for_are_complained_of() -> None:
    async with serving(lambda call: answer(call, 3, 8)) as server:
        target = HttpTarget(server.url, "fake", PromptSource(3))
        measured = await poisson(target, 1000.0, 5, Lengths(9, 4), 3, SLO)
    first, second = measured.complaints
    assert first == "5 requests had other than 9 input tokens, such as 8"
    assert second == "5 requests had other than 4 output tokens, such as 3"


async def test_failures_are_complained_of_and_count_as_misses() -> None:
    async def refuse(call: Call) -> None:
        await call.start(429)
        await call.finish()

    async with serving(refuse) as server:
        measured = await poisson(HttpTarget(server.url, "fake", PromptSource(3)), 1000.0, 5, Lengths(9, 4), 3, SLO)
    assert measured.summary.attainment == 0.0
    assert measured.complaints[0] == "5 of 5 requests failed: {'http 429': 5}"


def test_seeds_are_new_unless_asked_for() -> None:
    assert fresh_seed(7) == 7
    assert len({fresh_seed(None) for _ in range(20)}) > 15
