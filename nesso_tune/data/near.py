"""Near duplicates: rows that say almost the same, by MinHash (Broder, 1997) and locality-sensitive hashing."""

from __future__ import annotations

import re

import numpy as np

from nesso_tune.data.convert import Item
from nesso_tune.data.documents import Ints

WORDS = re.compile(r"\w+")
SHINGLE = 3  # words that are taken together
VALUES = 128  # of a signature
SEED = 1997


def signature_of(item: Item) -> Ints:
    """MinHash of the word sequences of an item's turns: `VALUES` numbers, uint32."""
    from rensa import RMinHash

    words = WORDS.findall(" ".join(turn.content for turn in item.turns).casefold())
    shingles = [" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))]
    sketch = RMinHash(num_perm=VALUES, seed=SEED)
    sketch.update(shingles)
    return np.array(sketch.digest(), np.uint32)


def near_duplicates(signatures: Ints, similarity: float) -> Ints:
    """Of each entry, an earlier one that it is a near duplicate of; -1 where there is none.

    Entries are compared where at least one band of their signatures is the same. With bands of `r` of the 128 values,
    two entries of Jaccard similarity s share one with probability 1 - (1 - s^r)^(128/r); r is the largest at which
    that is at least 0.99 for the similarity asked for.

    Args:
        signatures: shape (entries, VALUES), uint32.
        similarity: share of equal values from which an entry is a duplicate.
    """
    earlier = np.full(len(signatures), -1)
    rows = _rows_of_a_band(similarity)
    for start in range(0, VALUES - rows + 1, rows):
        band = np.ascontiguousarray(signatures[:, start : start + rows])
        keys = band.view(np.dtype((np.void, band.itemsize * rows))).ravel()
        order = np.argsort(keys, kind="stable")  # equal bands side by side, each group in the order of the entries
        borders = np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1
        for group in np.split(order, borders):
            if len(group) > 1:
                _compare(group, signatures, similarity, earlier)
    return earlier


def _compare(group: Ints, signatures: Ints, similarity: float, earlier: Ints) -> None:
    """Notes, of entries with a band in common, which are near duplicates of the first of them, then of the next."""
    while len(group) > 1:
        head, rest = group[0], group[1:]
        alike = (signatures[rest] == signatures[head]).mean(axis=1) >= similarity
        found = rest[alike]
        earlier[found[earlier[found] < 0]] = head
        group = rest[~alike]


def _rows_of_a_band(similarity: float) -> int:
    fitting = [r for r in (1, 2, 4, 8, 16) if 1 - (1 - similarity**r) ** (VALUES // r) >= 0.99]
    return max(fitting, default=1)
