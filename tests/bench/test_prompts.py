"""Prompts: of the wanted length, repeatable, and alike only where they should be."""

from __future__ import annotations

import pytest
from baton.bench.prompts import WORDS, PromptSource
from baton.simulator.workload.planned import PlannedRequest


def planned(index: int, length: int, *block_ids: int) -> PlannedRequest:
    return PlannedRequest(index, 0.0, length, 1, block_ids)


@pytest.mark.parametrize("length", [1, 5, 511, 512, 513, 3000])
def test_token_ids_have_the_wanted_length_and_range(length: int) -> None:
    ids = PromptSource(seed=1, vocab_size=700).token_ids(planned(0, length))
    assert len(ids) == length
    assert all(100 <= token < 700 for token in ids)


def test_a_prompt_depends_on_seed_and_index_alone() -> None:
    first, again = (PromptSource(7).token_ids(planned(3, 40)) for _ in range(2))
    assert first == again
    assert first != PromptSource(8).token_ids(planned(3, 40))
    assert first[:40] == PromptSource(7).token_ids(planned(3, 90))[:40]


def test_no_two_requests_share_their_first_block() -> None:
    source = PromptSource(0)
    assert len({tuple(source.token_ids(planned(index, 64))[:16]) for index in range(500)}) == 500


def test_equal_block_ids_give_equal_blocks_and_the_rest_is_the_requests_own() -> None:
    source = PromptSource(0)
    one, two, three = (source.token_ids(planned(*spec)) for spec in ((0, 1300, 4, 9), (1, 1300, 4, 9), (2, 1300, 4, 8)))
    assert one[:1024] == two[:1024]
    assert one[1024:1060] != two[1024:1060]
    assert three[:512] == one[:512]
    assert three[512:540] != one[512:540]
    assert source.token_ids(planned(5, 600, 4, 9)) == one[:600]


def test_a_small_vocabulary_still_works() -> None:
    assert set(PromptSource(0, vocab_size=16).token_ids(planned(0, 300))) <= set(range(4, 16))


def test_text_has_one_common_word_per_token_and_follows_the_blocks() -> None:
    source = PromptSource(2)
    words = source.text(planned(0, 30)).split(" ")
    assert len(words) == 30
    assert set(words) <= set(WORDS)
    assert source.text(planned(0, 512, 1)) == source.text(planned(1, 512, 1))


def test_a_request_that_brings_its_own_text_keeps_it() -> None:
    assert PromptSource(0).text(PlannedRequest(0, 0.0, 3, 1, prompt="def main():")) == "def main():"
