"""Near duplicates: rows that say almost the same, by MinHash (Broder, 1997) and locality-sensitive hashing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nesso_tune.data.convert import Example
from nesso_tune.data.files import expand, read_records
from nesso_tune.data.formats import describe_columns, lookup
from nesso_tune.data.token_store import Documents, Ints
from nesso_tune.errors import DataError
from nesso_tune.recipes.sections import CleanSection, Decontamination

WORDS = re.compile(r"\w+")
SHINGLE = 3  # words that are taken together
VALUES = 128  # of a signature
SEED = 1997


def minhash_signature(item: Example) -> Ints:
    """MinHash of the word sequences of an item's turns: `VALUES` numbers, uint32."""
    from rensa import RMinHash

    words = WORDS.findall(" ".join(turn.content for turn in item.turns).casefold())
    shingles = [" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))]
    sketch = RMinHash(num_perm=VALUES, seed=SEED)
    sketch.update(shingles)
    return np.array(sketch.digest(), np.uint32)


def find_near_duplicates(signatures: Ints, similarity: float) -> Ints:
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


class Duplicate(NamedTuple):
    """An entry that says the same, or nearly, as an earlier one."""

    entry: int
    earlier: int
    reason: str


def find_exact_duplicates(identities: Ints) -> Ints:
    """Of each entry, the first one with the same turns and tools; -1 for the first itself."""
    _, first, groups = np.unique(identities[:, 0], return_index=True, return_inverse=True)
    of = first[groups]
    return np.where(of == np.arange(len(of)), -1, of)


def find_duplicates(documents: Documents, clean: CleanSection, signatures: Path) -> Iterator[Duplicate]:
    """The entries that the recipe asks to drop, with what they repeat.

    Args:
        documents: all that was encoded.
        clean: what the recipe asks for.
        signatures: file of MinHashes, laid end to end, where near duplicates are looked for.
    """
    left = np.arange(len(documents))
    if clean.duplicates == "drop":
        exact = find_exact_duplicates(documents.identities)
        for entry in np.flatnonzero(exact >= 0):
            yield Duplicate(int(entry), int(exact[entry]), "duplicate")
        left = np.flatnonzero(exact < 0)
    if clean.near_duplicates is None or len(documents) == 0:
        return
    stored = np.memmap(signatures, np.uint32, mode="r", shape=(len(documents), VALUES))
    near = find_near_duplicates(stored if len(left) == len(stored) else stored[left], clean.near_duplicates)
    for position in np.flatnonzero(near >= 0):
        yield Duplicate(int(left[position]), int(left[near[position]]), "near_duplicate")


FIELDS = ("prompt", "question", "instruction", "input", "messages")
LEAST = 4  # words below which a text says too little to be found


@dataclass(frozen=True)
class EvaluationTexts:
    """What evaluations ask.

    Attributes:
        grams: for each sequence of words, the texts that have it, each with the position of its first word.
        words: number of words of each text.
        places: where each text stands (`file:line`).
        vocabulary: words of any text.
        sizes: lengths of the sequences in `grams`.
        overlap: share of a text's words from which a row contains it.
    """

    grams: Mapping[tuple[str, ...], list[tuple[int, int]]]
    words: list[int]
    places: list[str]
    vocabulary: frozenset[str]
    sizes: tuple[int, ...]
    overlap: float

    def find_in(self, item: Example) -> str | None:
        """Where the evaluation text stands that an item contains; None if it contains none."""
        seen: dict[int, set[int]] = defaultdict(set)
        for run in self._runs(item):
            for size in self.sizes:
                for i in range(len(run) - size + 1):
                    for text, position in self.grams.get(tuple(run[i : i + size]), ()):
                        seen[text].update(range(position, position + size))
        shares = {text: len(covered) / self.words[text] for text, covered in seen.items()}
        worst = max(shares, key=lambda text: shares[text], default=None)
        return None if worst is None or shares[worst] < self.overlap else self.places[worst]

    def _runs(self, item: Example) -> Iterator[list[str]]:
        """Stretches of an item's words that all occur in some evaluation text: nothing else can match."""
        least = self.sizes[0]
        for turn in item.turns:
            run: list[str] = []
            for word in WORDS.findall(turn.content.casefold()):
                if word in self.vocabulary:
                    run.append(word)
                else:
                    if len(run) >= least:
                        yield run
                    run = []
            if len(run) >= least:
                yield run


def read_evaluation_texts(settings: Decontamination) -> EvaluationTexts:
    """The texts of evaluation files.

    Raises:
        DataError: if a file cannot be read, or has none of the columns.
    """
    grams: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    lengths: list[int] = []
    places: list[str] = []
    for text, where in _texts(settings):
        words = WORDS.findall(text.casefold())
        if len(words) < LEAST:
            continue
        size = min(settings.ngram, len(words))
        for i in range(len(words) - size + 1):
            grams[tuple(words[i : i + size])].append((len(lengths), i))
        lengths.append(len(words))
        places.append(where)
    vocabulary = frozenset(word for gram in grams for word in gram)
    sizes = tuple(sorted({len(gram) for gram in grams}))
    if not sizes:
        raise DataError(", ".join(settings.files), f"holds no text of {LEAST} words", "name the columns in `fields`")
    return EvaluationTexts(dict(grams), lengths, places, vocabulary, sizes, settings.overlap)


def _texts(settings: Decontamination) -> Iterator[tuple[str, str]]:
    """Every text of the files with its place."""
    for name in settings.files:
        for file in expand(name):
            found, row = False, None
            for row, where in read_records(file):
                columns = settings.fields or FIELDS
                for text in (text for column in columns for text in _said(lookup(row, (column,)))):
                    found = True
                    yield text, where
            if not found:
                has = describe_columns([row] if row else [])
                raise DataError(
                    str(file), f"has no text in {' or '.join(settings.fields or FIELDS)} (its columns are {has})",
                    "name the columns in data.clean.decontaminate.fields",
                )  # fmt: skip


def _said(value: Any) -> Iterator[str]:
    """A text, the texts of a list, or what the user says in a list of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for entry in value:
            if isinstance(entry, Mapping):
                if str(entry.get("role", entry.get("from"))).lower() in ("user", "human"):
                    yield from _said(lookup(entry, ("content", "value")))
            else:
                yield from _said(entry)
