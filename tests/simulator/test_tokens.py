"""Token ids of simulated prompts."""

from __future__ import annotations

from baton.simulator.tokens import Tokens
from baton.simulator.workload.planned import PlannedRequest


def prompt(index: int, length: int, *blocks: int) -> tuple[int, ...]:
    return Tokens(by_content=True).prompt(PlannedRequest(index, 0.0, length, 1, blocks))


def test_equal_blocks_are_equal_tokens_and_the_rest_is_the_requests_own() -> None:
    first, second = prompt(0, 1300, 7, 8), prompt(1, 1200, 7, 8)
    assert (len(first), len(second)) == (1300, 1200)
    assert first[:1024] == second[:1024]
    assert set(first[1024:]).isdisjoint(second)
    assert first[:512] != first[512:1024]


def test_the_last_block_of_a_prompt_may_be_cut() -> None:
    assert prompt(0, 600, 7, 8, 9) == prompt(1, 600, 7, 8)


def test_ids_fit_into_the_hashes_of_the_prefix_cache() -> None:
    assert all(0 <= token < 1 << 32 for token in prompt(1 << 40, 600, 1 << 70))


def test_without_a_prefix_cache_lengths_are_all_that_matters() -> None:
    tokens = Tokens(by_content=False)
    assert len(tokens.prompt(PlannedRequest(0, 0.0, 9000, 1))) == 9000
    assert len(tokens.output(20_000)) == 20_000
    assert tokens.sampling(7) is tokens.sampling(7)
    assert tokens.sampling(7).max_tokens == 7
