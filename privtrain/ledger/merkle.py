"""Merkle tree over a step's users, to prove one user's part or absence without revealing the others'.

A row is ``SHA-256(context of the step ‖ pseudonym)`` with the number of records XORed into its last four bytes. Its
first 28 bytes, the *tag*, are the same whatever the number. Whoever knows a pseudonym can recompute its row and read
the number; to everybody else a row is 32 random bytes, and the rows of one user in two steps have nothing in common.
Rows are sorted, so an absence is shown by its two neighbours. Sixteen rows share a leaf (a *bucket*), because hashes
are what a verification costs; the tree above is that of RFC 6962: leaves are hashed behind a zero byte, nodes behind a
one.

Public: all of this. Secret: the key that gives the pseudonyms, of 128 bits each.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

PSEUDONYM_BYTES = 16
ROW_BYTES = 32
#: The part of a row that orders it and is the same whatever the number of records.
TAG_BYTES = 28
#: Rows of one leaf.
BUCKET_ROWS = 16

_BUCKET_BYTES = BUCKET_ROWS * ROW_BYTES
_sha256 = hashlib.sha256


def step_context(generation: int, step: int) -> bytes:
    """Return 32 bytes that are unique to this step of a run."""
    return _sha256(f"privtrain/ledger/2/row:{generation}:{step}".encode()).digest()


def row_hashes(context: bytes, pseudonyms: bytes) -> list[bytes]:
    """Return the row of each of the concatenated 16-byte ``pseudonyms``, before record counts are XORed in."""
    return [
        _sha256(context + pseudonyms[i : i + PSEUDONYM_BYTES]).digest()
        for i in range(0, len(pseudonyms), PSEUDONYM_BYTES)
    ]


def with_counts(hashes: bytes, counts: np.ndarray) -> bytes:
    """XOR the record counts into concatenated rows; a second call removes them.

    Args:
        hashes: n concatenated rows of 32 bytes.
        counts: [n] record counts below 2**32.
    """
    rows = np.frombuffer(hashes, dtype=">u4").reshape(-1, ROW_BYTES // 4).copy()  # words of 4 bytes
    rows[:, -1] ^= counts.astype(">u4")
    return rows.tobytes()


def rows_of(context: bytes, pseudonyms: bytes, counts: np.ndarray) -> bytes:
    """Return the concatenated rows of a step, with record counts, in the order of the pseudonyms given."""
    return with_counts(b"".join(row_hashes(context, pseudonyms)), counts)


def are_sorted(rows: bytes) -> bool:
    """Return whether tags strictly increase, so that no user is there twice and neighbours show an absence."""
    # The first 8 bytes decide almost always, and are compared fast; else whole tags are.
    first = np.frombuffer(rows, dtype=">u8").reshape(-1, ROW_BYTES // 8)[:, 0]
    if bool(np.all(first[1:] > first[:-1])):
        return True
    tags = [rows[i : i + TAG_BYTES] for i in range(0, len(rows), ROW_BYTES)]
    return all(a < b for a, b in itertools.pairwise(tags))


def num_buckets(num_rows: int) -> int:
    """Return the number of leaves of a tree over ``num_rows`` rows."""
    return -(-num_rows // BUCKET_ROWS)


def bucket(rows: bytes, index: int) -> bytes:
    """Return the rows of one leaf."""
    return rows[index * _BUCKET_BYTES : (index + 1) * _BUCKET_BYTES]


def leaf_hash(bucket_rows: bytes) -> bytes:
    """Return the hash of a leaf."""
    return _sha256(b"\x00" + bucket_rows).digest()


def leaf_hashes(rows: bytes) -> list[bytes]:
    """Return the hash of every leaf."""
    return [_sha256(b"\x00" + rows[i : i + _BUCKET_BYTES]).digest() for i in range(0, len(rows), _BUCKET_BYTES)]


def _parents(level: Sequence[bytes]) -> list[bytes]:
    """Return the hashes of the tree's next level; an odd last one moves up as it is."""
    above = [_sha256(b"\x01" + level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)]
    return [*above, level[-1]] if len(level) % 2 else above


def root_of(rows: bytes) -> str:
    """Return the root over the rows of a step, in hex; of none, the hash of nothing (RFC 6962, section 2.1)."""
    level = leaf_hashes(rows)
    if not level:
        return _sha256(b"").hexdigest()
    while len(level) > 1:
        level = _parents(level)
    return level[0].hex()


def audit_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Return the siblings' hashes on the way from leaf ``index`` up to the root (RFC 6962, section 2.1.1)."""
    path, level = [], list(leaves)
    while len(level) > 1:
        sibling = index ^ 1  # the other one of a pair: 2i and 2i + 1
        if sibling < len(level):  # the last of an odd number has none
            path.append(level[sibling])
        level, index = _parents(level), index // 2
    return path


def root_from_path(leaf: bytes, index: int, num_leaves: int, path: Sequence[bytes]) -> str:
    """Return the root, in hex, to which the hash of a leaf leads.

    Args:
        leaf: its hash.
        index: its place among the leaves.
        num_leaves: leaves of the tree.
        path: of :func:`audit_path`: the siblings' hashes, from the leaf upwards.

    Raises:
        ValueError: if the path does not have the length that this place asks for.
    """
    if not 0 <= index < num_leaves:
        raise ValueError("a leaf outside the tree")
    node, rest = leaf, collections.deque(path)
    while num_leaves > 1:  # from level to level, each with half as many nodes, rounded up
        if (index ^ 1) < num_leaves:  # it has a sibling at this level
            if not rest:
                raise ValueError("a path that ends below the root")
            sibling = rest.popleft()
            pair = sibling + node if index % 2 else node + sibling  # the left one first
            node = _sha256(b"\x01" + pair).digest()
        index, num_leaves = index // 2, -(-num_leaves // 2)
    if rest:
        raise ValueError("a path that goes on above the root")
    return node.hex()
