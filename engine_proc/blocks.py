"""The KV block pool: who holds which block, and which free blocks still hold a prefix that can be used again.

Engine process, no torch: a block is a number here; the runner owns the memory behind it. A block is leased by
reference count; blocks that nobody holds wait in one LRU list, their contents findable by chain hash until they are
taken again. Must never hand out a block that is held, nor forget one.
"""
from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

NULL_BLOCK = 0                # padding: never leased, its contents mean nothing


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, block 0 reserved."""

    __slots__ = ("num_blocks", "block_size", "caching", "_refs", "_free", "_key", "_content", "_cached")

    def __init__(self, num_blocks: int, block_size: int, caching: bool = True) -> None:
        assert num_blocks > 1 and block_size > 0
        self.num_blocks, self.block_size, self.caching = num_blocks, block_size, caching
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))    # next to be taken first
        self._key: list[bytes | None] = [None] * num_blocks       # chain hash of a registered block
        self._content: list[bytes] = [b""] * num_blocks           # its token bytes
        self._cached: dict[bytes, int] = {}                       # chain hash -> block

    @property
    def capacity(self) -> int:
        """Tokens that one sequence could hold with the whole pool to itself."""
        return (self.num_blocks - 1) * self.block_size

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # ---- leases --------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int]:
        """Lease `count` blocks, the least recently used ones; what they held is forgotten."""
        assert count <= len(self._free), "the caller checks num_free"
        blocks = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            key = self._key[block]
            if key is not None:
                del self._cached[key]
                self._key[block], self._content[block] = None, b""
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more lease on each of `blocks` (held by others, or found by `lookup`)."""
        for block in blocks:
            if not self._refs[block]:
                del self._free[block]
            self._refs[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Give a sequence's leases back. Its tail becomes reusable first: a head is of use to more successors."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            assert self._refs[block] >= 0
            if not self._refs[block]:
                self._free[block] = None
                if self._key[block] is None:
                    self._free.move_to_end(block, last=False)     # nothing to remember: taken before any cached one

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are in the free list."""
        return sum(not self._refs[block] for block in blocks)

    # ---- prefix cache --------------------------------------------------------------------------------------------

    def extend_hashes(self, hashes: list[bytes], tokens: array[int], salt: bytes) -> None:
        """Bring `hashes` up to the full blocks of `tokens`: each covers its parent's hash and its own tokens."""
        size = self.block_size
        for i in range(len(hashes), len(tokens) // size):
            parent = hashes[i - 1] if i else _digest(salt)
            hashes.append(_digest(parent + tokens[i * size:(i + 1) * size].tobytes()))

    def lookup(self, hashes: Sequence[bytes], tokens: array[int]) -> list[int]:
        """The longest run of cached blocks that hold the beginning of `tokens`, not the last token: its logits are
        needed. Contents are compared, so that a hash alone never decides what a request reads."""
        found: list[int] = []
        if not self.caching:
            return found
        size = self.block_size
        for i in range(min(len(hashes), (len(tokens) - 1) // size)):
            block = self._cached.get(hashes[i])
            if block is None or self._content[block] != tokens[i * size:(i + 1) * size].tobytes():
                break
            found.append(block)
        return found

    def register(self, block: int, key: bytes, content: bytes) -> None:
        """`block` is computed: it may be found under `key`. The first of two equal blocks stays the one found."""
        if self.caching and key not in self._cached:
            assert self._refs[block] and self._key[block] is None
            self._cached[key] = block
            self._key[block], self._content[block] = key, content

    # ---- tests ---------------------------------------------------------------------------------------------------

    def assert_invariants(self, tables: Iterable[Sequence[int]] = ()) -> None:
        """`tables`: the block tables of everyone who holds leases."""
        held = Counter(block for table in tables for block in table)
        assert NULL_BLOCK not in held and NULL_BLOCK not in self._free and not self._refs[NULL_BLOCK]
        for block in range(1, self.num_blocks):
            assert self._refs[block] == held[block], f"block {block}: {self._refs[block]} leases, {held[block]} holders"
            assert (block in self._free) == (not held[block])
        assert self._cached == {key: block for block, key in enumerate(self._key) if key is not None}
        assert all(len(self._content[block]) == 4 * self.block_size for block in self._cached.values())
