"""The block pool: references, prefix cache, quarantine, generations; and a machine that compares it with a plain model."""

from __future__ import annotations

from collections import Counter

import pytest
from baton.core.errors import InternalError
from baton.core.kv import BlockAllocator, block_hashes
from baton.engine.blocks import BlockPool, HashChain
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule


def tokens(*blocks: int, size: int = 2) -> list[int]:
    """`size` equal tokens per block named."""
    return [token for token in blocks for _ in range(size)]


def cached(pool: BlockPool, *names: int) -> tuple[int, ...]:
    """Allocate, publish and release the blocks of `tokens(*names)`."""
    blocks = pool.allocate(len(names))
    assert blocks is not None
    pool.publish(tokens(*names), blocks)
    pool.release(blocks)
    return blocks


# ---- allocation and references ------------------------------------------------------------------


def test_it_is_a_block_allocator() -> None:
    allocator: BlockAllocator = BlockPool(4, 2)
    assert allocator.num_free == 4


def test_allocate_gives_distinct_blocks_and_takes_nothing_when_short() -> None:
    pool = BlockPool(4, 2)
    first = pool.allocate(3)
    assert first is not None
    assert len(set(first)) == 3
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    assert pool.allocate(0) == ()
    pool.release(first)
    assert pool.num_free == 4


def test_a_block_is_free_after_its_last_release() -> None:
    pool = BlockPool(1, 2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.retain(blocks)
    pool.release(blocks)
    assert pool.num_free == 0
    pool.release(blocks)
    assert pool.num_free == 1


def test_generation_grows_with_every_allocation() -> None:
    pool = BlockPool(1, 2)
    for generation in (1, 2, 3):
        blocks = pool.allocate(1)
        assert blocks is not None
        assert pool.generation(0) == generation
        pool.release(blocks)


@pytest.mark.parametrize("method", ["release", "retain", "quarantine"])
def test_an_unreferenced_block_is_refused_by_name_and_nothing_changes(method: str) -> None:
    pool = BlockPool(4, 2)
    held = pool.allocate(1)
    assert held is not None
    before = pool.snapshot()
    with pytest.raises(InternalError, match="block 2 "):
        getattr(pool, method)([*held, 2])
    assert pool.snapshot() == before


def test_double_release_in_one_call_is_refused() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(1)
    assert blocks is not None
    with pytest.raises(InternalError, match=f"block {blocks[0]} "):
        pool.release([*blocks, *blocks])
    pool.release(blocks)
    pool.check()


@pytest.mark.parametrize("block", [-1, 4])
def test_a_block_that_does_not_exist_is_refused(block: int) -> None:
    pool = BlockPool(4, 2)
    with pytest.raises(InternalError, match=f"block {block} does not exist"):
        pool.release([block])
    with pytest.raises(InternalError, match=f"block {block} does not exist"):
        pool.generation(block)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 2), (2, 0)])
def test_an_impossible_pool_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(InternalError, match="at least 1"):
        BlockPool(num_blocks, block_size)


# ---- prefix cache -------------------------------------------------------------------------------


def test_lookup_finds_the_longest_published_prefix_and_takes_references() -> None:
    pool = BlockPool(8, 2)
    blocks = cached(pool, 1, 2, 3)
    assert (pool.num_free, pool.num_cached) == (8, 3)
    assert pool.lookup(tokens(1, 2, 9)) == blocks[:2]
    assert (pool.num_free, pool.num_cached) == (6, 1)
    assert pool.lookup(tokens(1)) == blocks[:1]
    assert [pool.references(block) for block in blocks] == [2, 1, 0]
    assert pool.lookup(tokens(2, 3)) == (), "the same tokens after another prefix are another block"
    assert pool.lookup([1]) == (), "half a block is no block"


def test_a_hit_needs_every_block_before_it() -> None:
    pool = BlockPool(8, 2)
    cached(pool, 1, 2, 3)
    longer = pool.allocate(7)  # 5 free ones, and the two oldest of the cached ones: the tail
    assert longer is not None
    assert pool.lookup(tokens(1, 2, 3)) == tuple(set(range(8)) - set(longer))


def test_only_full_blocks_are_published() -> None:
    pool = BlockPool(8, 2)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.publish([1, 1, 2], blocks)
    assert pool.lookup([1, 1, 2, 2]) == blocks[:1]


def test_the_first_writer_of_a_prefix_stays_known() -> None:
    pool = BlockPool(8, 2)
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None
    assert second is not None
    pool.publish(tokens(5), first)
    pool.publish(tokens(5), second)
    pool.release(second)
    assert pool.num_cached == 0, "the second copy is of no use"
    assert pool.lookup(tokens(5)) == first


def test_eviction_takes_the_least_recently_used_and_a_tail_before_its_head() -> None:
    pool = BlockPool(4, 2)
    old, young = cached(pool, 1, 2), cached(pool, 3, 4)
    pool.release(pool.lookup(tokens(1, 2)))  # now `young` is the one used longest ago
    assert pool.allocate(1) == (young[1],)
    assert pool.allocate(1) == (young[0],)
    assert pool.lookup(tokens(3)) == ()
    assert pool.allocate(1) == (old[1],)
    assert pool.lookup(tokens(1, 2)) == (old[0],)


def test_a_published_block_must_not_get_another_prefix() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.publish(tokens(1), blocks)
    pool.publish(tokens(1), blocks)
    with pytest.raises(InternalError, match="overwritten"):
        pool.publish(tokens(2), blocks)


def test_only_referenced_blocks_are_published() -> None:
    with pytest.raises(InternalError, match="block 0 cannot be published"):
        BlockPool(4, 2).publish(tokens(1), [0])


def test_without_prefix_cache_nothing_is_kept() -> None:
    pool = BlockPool(4, 2, prefix_cache=False)
    cached(pool, 1, 2)
    assert (pool.num_cached, pool.num_free) == (0, 4)
    assert pool.lookup(tokens(1, 2)) == ()


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 5), st.lists(st.integers(0, 12), max_size=5))
def test_hash_chains_equal_the_contract_however_they_grow(all_tokens: list[int], size: int, stops: list[int]) -> None:
    chain = HashChain(size)
    most = len(all_tokens) // size
    for num_blocks in [*(min(stop, most) for stop in stops), most]:
        assert tuple(chain.first(num_blocks, all_tokens)) == block_hashes(all_tokens, size)[:num_blocks]


# ---- quarantine ---------------------------------------------------------------------------------


def test_quarantined_blocks_are_not_given_out_before_the_writer_is_gone() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(3)
    assert blocks is not None
    pool.quarantine(blocks)
    assert (pool.num_free, pool.num_quarantined) == (1, 3)
    assert pool.allocate(2) is None
    pool.end_quarantine(blocks)
    assert (pool.num_free, pool.num_quarantined) == (4, 0)
    pool.check()


def test_a_quarantined_block_with_another_holder_is_freed_after_both_are_gone() -> None:
    for holder_first in (True, False):
        pool = BlockPool(1, 2)
        blocks = pool.allocate(1)
        assert blocks is not None
        pool.retain(blocks)
        pool.quarantine(blocks)
        ends = [pool.release, pool.end_quarantine]
        for end in ends if holder_first else reversed(ends):
            assert pool.num_free == 0
            end(blocks)
        assert pool.num_free == 1
        pool.check()


def test_a_quarantined_block_is_never_a_prefix_hit() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.publish(tokens(1), blocks)
    pool.retain(blocks)
    pool.quarantine(blocks)
    assert pool.lookup(tokens(1)) == ()
    pool.publish(tokens(1), blocks)  # what it holds may be overwritten at any time
    assert pool.lookup(tokens(1)) == ()
    pool.check()


def test_only_quarantined_blocks_leave_quarantine() -> None:
    with pytest.raises(InternalError, match="block 0 is not in quarantine"):
        BlockPool(4, 2).end_quarantine([0])


# ---- integrity ----------------------------------------------------------------------------------


def test_check_notices_damage() -> None:
    def damaged(attribute: str, value: object) -> BlockPool:
        pool = BlockPool(2, 2)
        cached(pool, 1)
        getattr(pool, attribute)[1 if attribute == "_references" else 0] = value
        return pool

    for attribute, value in (("_references", 1), ("_references", -1), ("_hash_of", None), ("_free", 0)):
        with pytest.raises(InternalError, match=r"block|prefix"):
            damaged(attribute, value).check()


class PoolMachine(RuleBasedStateMachine):
    """Random calls; a Counter of references and the contents of every block are the model."""

    @initialize(num_blocks=st.integers(1, 8))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 1)
        self.held: list[tuple[int, ...]] = []  # one reference of each block per entry
        self.quarantined: list[tuple[int, ...]] = []
        self.content: dict[int, tuple[int, ...]] = {}  # block -> the prefix it holds

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            in_use = {block for group in self.held + self.quarantined for block in group}
            assert not in_use & set(blocks)
            for block in blocks:
                self.content.pop(block, None)
            self.held.append(blocks)

    @rule(prefix=st.lists(st.integers(0, 1), max_size=4).map(tuple))
    def lookup(self, prefix: tuple[int, ...]) -> None:
        hits = self.pool.lookup(prefix)
        assert [self.content.get(block) for block in hits] == [prefix[: i + 1] for i in range(len(hits))]
        self.held.append(hits)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), prefix=st.lists(st.integers(0, 1), max_size=4).map(tuple))
    def write_and_publish(self, data: st.DataObject, prefix: tuple[int, ...]) -> None:
        """Write to blocks that are fresh, as a sequence does, and publish them."""
        blocks = data.draw(st.sampled_from(self.held))[: len(prefix)]
        if any(self.content.get(block, prefix[: i + 1]) != prefix[: i + 1] for i, block in enumerate(blocks)):
            return
        self.content |= {block: prefix[: i + 1] for i, block in enumerate(blocks)}
        self.pool.publish(prefix, blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), action=st.sampled_from(("retain", "release", "release", "quarantine")))
    def change(self, data: st.DataObject, action: str) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        blocks = self.held[index]
        getattr(self.pool, action)(blocks)
        if action == "retain":
            self.held.append(blocks)
        else:
            del self.held[index]
        if action == "quarantine":
            self.quarantined.append(blocks)

    @precondition(lambda self: self.quarantined)
    @rule()
    def end_quarantine(self) -> None:
        self.pool.end_quarantine(self.quarantined.pop(0))

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        references = Counter(block for group in self.held for block in group)
        in_quarantine = {block for group in self.quarantined for block in group}
        assert self.pool.snapshot().references == tuple(references[block] for block in range(self.pool.num_blocks))
        assert self.pool.snapshot().quarantined == in_quarantine
        assert self.pool.num_free == self.pool.num_blocks - len(set(references) | in_quarantine)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for blocks in self.held:
                self.pool.release(blocks)
            for blocks in self.quarantined:
                self.pool.end_quarantine(blocks)
            assert self.pool.num_free == self.pool.num_blocks
            self.pool.check()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
