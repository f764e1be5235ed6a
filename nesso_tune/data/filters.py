"""Rows that are dropped because of other rows: exact and near duplicates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nesso_tune.data.documents import Documents, Ints
from nesso_tune.data.near import VALUES, near_duplicates
from nesso_tune.recipes.data import CleanSection


class Repeated(NamedTuple):
    """An entry that says the same, or nearly, as an earlier one."""

    entry: int
    earlier: int
    reason: str


def exact_duplicates(identities: Ints) -> Ints:
    """Of each entry, the first one with the same turns and tools; -1 for the first itself."""
    _, first, groups = np.unique(identities[:, 0], return_index=True, return_inverse=True)
    of = first[groups]
    return np.where(of == np.arange(len(of)), -1, of)


def repeated(documents: Documents, clean: CleanSection, signatures: Path) -> Iterator[Repeated]:
    """The entries that the recipe asks to drop, with what they repeat.

    Args:
        documents: all that was encoded.
        clean: what the recipe asks for.
        signatures: file of MinHashes, laid end to end, where near duplicates are looked for.
    """
    left = np.arange(len(documents))
    if clean.duplicates == "drop":
        exact = exact_duplicates(documents.identities)
        for entry in np.flatnonzero(exact >= 0):
            yield Repeated(int(entry), int(exact[entry]), "duplicate")
        left = np.flatnonzero(exact < 0)
    if clean.near_duplicates is None or len(documents) == 0:
        return
    stored = np.memmap(signatures, np.uint32, mode="r", shape=(len(documents), VALUES))
    near = near_duplicates(stored if len(left) == len(stored) else stored[left], clean.near_duplicates)
    for position in np.flatnonzero(near >= 0):
        yield Repeated(int(left[position]), int(left[near[position]]), "near_duplicate")
