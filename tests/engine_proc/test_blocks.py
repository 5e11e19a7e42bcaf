"""The block pool: leases, the order of reuse, and the prefix cache."""
from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_proc.blocks import NULL_BLOCK, BlockPool

TOKENS = array("I", range(100, 112))          # three blocks of four


def computed(pool: BlockPool, tokens: array[int], salt: bytes = b"") -> tuple[list[int], list[bytes]]:
    """Lease blocks for `tokens` and register the full ones, as a sequence that was computed."""
    hashes: list[bytes] = []
    pool.extend_hashes(hashes, tokens, salt)
    blocks = pool.allocate(pool.blocks_for(len(tokens)))
    for i, key in enumerate(hashes):
        pool.register(blocks[i], key, tokens[4 * i:4 * i + 4].tobytes())
    return blocks, hashes


def hashes_of(pool: BlockPool, tokens: array[int], salt: bytes = b"") -> list[bytes]:
    hashes: list[bytes] = []
    pool.extend_hashes(hashes, tokens, salt)
    return hashes


def test_the_null_block_is_never_given_out() -> None:
    pool = BlockPool(5, 4)
    assert pool.capacity == 16
    assert NULL_BLOCK not in pool.allocate(4)
    assert pool.num_free == 0 and pool.num_used == 4


def test_a_shared_block_is_free_only_when_everyone_gave_it_back() -> None:
    pool = BlockPool(5, 4)
    mine = pool.allocate(2)
    pool.share(mine[:1])
    pool.free(mine)
    pool.assert_invariants([mine[:1]])
    assert pool.num_free == 3
    pool.free(mine[:1])
    pool.assert_invariants()
    assert pool.num_free == 4


def test_a_computed_prefix_is_found_again_after_its_owner_left() -> None:
    pool = BlockPool(9, 4)
    blocks, hashes = computed(pool, TOKENS)
    pool.free(blocks)
    longer = TOKENS + array("I", [7])
    assert pool.lookup(hashes_of(pool, longer), longer) == blocks
    pool.share(blocks)
    pool.assert_invariants([blocks])


def test_the_last_token_is_always_left_to_compute() -> None:
    pool = BlockPool(9, 4)
    blocks, hashes = computed(pool, TOKENS)
    assert pool.lookup(hashes, TOKENS) == blocks[:2]


def test_another_salt_finds_nothing() -> None:
    pool = BlockPool(9, 4)
    computed(pool, TOKENS, b"tenant a")
    assert pool.lookup(hashes_of(pool, TOKENS, b"tenant b"), TOKENS) == []
    assert len(pool.lookup(hashes_of(pool, TOKENS, b"tenant a"), TOKENS)) == 2


def test_a_block_is_known_by_everything_ahead_of_it() -> None:
    pool = BlockPool(9, 4)
    computed(pool, TOKENS)
    shifted = array("I", [1, 2, 3, 4]) + TOKENS
    assert pool.lookup(hashes_of(pool, shifted), shifted) == []


def test_equal_hashes_of_different_tokens_are_no_hit() -> None:
    pool = BlockPool(9, 4)
    _, hashes = computed(pool, TOKENS)
    other = array("I", range(200, 212))
    assert pool.lookup(hashes, other) == []


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(9, 4, caching=False)
    blocks, hashes = computed(pool, TOKENS)
    assert pool.lookup(hashes, TOKENS) == []
    pool.assert_invariants([blocks])


def test_blocks_without_contents_are_reused_first_then_old_tails() -> None:
    pool = BlockPool(8, 4)
    cached, _ = computed(pool, TOKENS)
    plain = pool.allocate(4)
    pool.free(cached)
    pool.free(plain)
    assert sorted(pool.allocate(4)) == sorted(plain)
    assert pool.allocate(3) == cached[::-1]


def test_a_reused_block_is_no_longer_found() -> None:
    pool = BlockPool(4, 4)
    blocks, hashes = computed(pool, TOKENS)
    pool.free(blocks)
    taken = pool.allocate(2)
    longer = TOKENS + array("I", [7])
    assert pool.lookup(hashes, longer) == blocks[:1]
    pool.assert_invariants([taken])


def test_the_first_of_two_equal_blocks_stays_the_one_found() -> None:
    pool = BlockPool(9, 4)
    first, hashes = computed(pool, TOKENS)
    second, _ = computed(pool, TOKENS)
    assert pool.lookup(hashes, TOKENS) == first[:2]
    pool.free(second)
    pool.assert_invariants([first])


def test_taking_more_than_there_is_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        BlockPool(3, 4).allocate(3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["compute", "hit", "free"]), st.integers(0, 3), st.integers(1, 14)),
                max_size=40))
def test_any_order_of_leases_keeps_the_books(steps: list[tuple[str, int, int]]) -> None:
    """Few distinct prompts, so that sharing, eviction and equal blocks all happen."""
    pool, tables = BlockPool(9, 4), []
    for action, flavour, length in steps:
        tokens = array("I", [flavour % 2] * 5 + [flavour] * length)
        if action == "free" and tables:
            pool.free(tables.pop(flavour % len(tables)))
        else:
            hashes = hashes_of(pool, tokens)
            found = pool.lookup(hashes, tokens) if action == "hit" else []
            need = pool.blocks_for(len(tokens)) - len(found)
            if action != "free" and need + pool.num_idle(found) <= pool.num_free:
                pool.share(found)
                table = found + pool.allocate(need)
                for i in range(len(found), len(hashes)):
                    pool.register(table[i], hashes[i], tokens[4 * i:4 * i + 4].tobytes())
                tables.append(table)
        pool.assert_invariants(tables)
    for table in tables:
        pool.free(table)
    assert pool.num_free == 8
