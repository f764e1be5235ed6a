"""Exact duplicates, near duplicates and decontamination.

Near duplicates are found by MinHash (Broder, 1997) and locality-sensitive hashing, evaluation texts by the n-grams of
words that an example shares with them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nesso_tune.data.columns import lookup
from nesso_tune.data.convert import Example
from nesso_tune.data.file_formats import read_records
from nesso_tune.data.files import expand
from nesso_tune.data.formats import describe_columns
from nesso_tune.data.token_store import Documents, IntArray
from nesso_tune.errors import DataError
from nesso_tune.recipes.sections import CleanSection, Decontamination

_WORD = re.compile(r"\w+")
_SHINGLE_WORDS = 3
_NUM_HASHES = 128  # per signature
_HASH_SEED = 1997

_EVALUATION_COLUMNS = ("prompt", "question", "instruction", "input", "messages")
_MIN_WORDS = 4  # of an evaluation text; shorter ones are too common to be evidence


class Duplicate(NamedTuple):
    """An entry that repeats an earlier one."""

    entry: int
    earlier: int
    reason: str


def find_duplicates(documents: Documents, clean: CleanSection, signatures: Path) -> Iterator[Duplicate]:
    """The duplicates to drop: the exact ones, and among the other entries the near ones, as the recipe asks for.

    Args:
        documents: all encoded entries.
        clean: the cleaning section of the recipe.
        signatures: file of MinHash signatures, shape (entries, 128), uint32; read only for near duplicates.
    """
    left = np.arange(len(documents))
    if clean.duplicates == "drop":
        exact = find_exact_duplicates(documents.identities)
        for entry in np.flatnonzero(exact >= 0):
            yield Duplicate(int(entry), int(exact[entry]), "duplicate")
        left = np.flatnonzero(exact < 0)
    if clean.near_duplicates is None or len(documents) == 0:
        return
    stored = np.memmap(signatures, np.uint32, mode="r", shape=(len(documents), _NUM_HASHES))
    near = find_near_duplicates(stored if len(left) == len(stored) else stored[left], clean.near_duplicates)
    for position in np.flatnonzero(near >= 0):
        yield Duplicate(int(left[position]), int(left[near[position]]), "near_duplicate")


def find_exact_duplicates(identities: IntArray) -> IntArray:
    """For each entry, the first entry with the same turns and tools; -1 if it is the first itself.

    Args:
        identities: hashes of the entries in column 0.

    Returns:
        shape (entries,).
    """
    _, first, groups = np.unique(identities[:, 0], return_index=True, return_inverse=True)
    first_equal = first[groups]
    return np.where(first_equal == np.arange(len(first_equal)), -1, first_equal)


def find_near_duplicates(signatures: IntArray, similarity: float) -> IntArray:
    """For each entry, an earlier entry that it nearly repeats; -1 if there is none.

    Two entries are compared if at least one band of their signatures is equal. With bands of r of the 128 hashes, two
    entries of Jaccard similarity s share a band with probability 1 - (1 - s^r)^(128/r); r is the largest value for
    which this is at least 0.99 at the given similarity.

    Args:
        signatures: shape (entries, 128), uint32.
        similarity: minimum share of equal hashes of a near duplicate.

    Returns:
        shape (entries,).
    """
    earlier = np.full(len(signatures), -1)
    width = _band_width(similarity)
    for start in range(0, _NUM_HASHES - width + 1, width):
        band = np.ascontiguousarray(signatures[:, start : start + width])
        keys = band.view(np.dtype((np.void, band.itemsize * width))).ravel()
        order = np.argsort(keys, kind="stable")  # groups equal bands; within a group, entries stay in order
        borders = np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1
        for group in np.split(order, borders):
            if len(group) > 1:
                _compare_group(group, signatures, similarity, earlier)
    return earlier


def minhash_signature(example: Example) -> bytes:
    """MinHash signature of the 3-word shingles of an example's turns: 128 numbers, uint32."""
    from rensa import RMinHash

    words = _words(" ".join(turn.content for turn in example.turns))
    shingles = [" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(max(1, len(words) - _SHINGLE_WORDS + 1))]
    sketch = RMinHash(num_perm=_NUM_HASHES, seed=_HASH_SEED)
    sketch.update(shingles)
    return np.array(sketch.digest(), np.uint32).tobytes()


def _compare_group(group: IntArray, signatures: IntArray, similarity: float, earlier: IntArray) -> None:
    """Sets `earlier` for the near duplicates of the first entry of a group, then for those of the next one left."""
    while len(group) > 1:
        head, rest = group[0], group[1:]
        similar = (signatures[rest] == signatures[head]).mean(axis=1) >= similarity
        found = rest[similar]
        earlier[found[earlier[found] < 0]] = head
        group = rest[~similar]


def _band_width(similarity: float) -> int:
    widths = [r for r in (1, 2, 4, 8, 16) if 1 - (1 - similarity**r) ** (_NUM_HASHES // r) >= 0.99]
    return max(widths, default=1)


@dataclass(frozen=True)
class EvaluationTexts:
    """An index of the n-grams of evaluation texts.

    Attributes:
        ngrams: for each n-gram of words, the texts that contain it, each with the position of its first word.
        lengths: number of words of each text.
        locations: location of each text (`file:line`).
        vocabulary: the words of all n-grams.
        sizes: the values of n, ascending. A text shorter than the recipe's n is one n-gram.
        overlap: share of the words of a text from which an example contains the text.
    """

    ngrams: Mapping[tuple[str, ...], list[tuple[int, int]]]
    lengths: list[int]
    locations: list[str]
    vocabulary: frozenset[str]
    sizes: tuple[int, ...]
    overlap: float

    def find_in(self, example: Example) -> str | None:
        """The location of the evaluation text that an example contains most of; None if it contains none."""
        covered: dict[int, set[int]] = defaultdict(set)
        for words in self._known_word_runs(example):
            for size in self.sizes:
                for i in range(len(words) - size + 1):
                    for text, position in self.ngrams.get(tuple(words[i : i + size]), ()):
                        covered[text].update(range(position, position + size))
        shares = {text: len(positions) / self.lengths[text] for text, positions in covered.items()}
        best = max(shares, key=lambda text: shares[text], default=None)
        return None if best is None or shares[best] < self.overlap else self.locations[best]

    def _known_word_runs(self, example: Example) -> Iterator[list[str]]:
        """The runs of consecutive words that are all in the vocabulary; no other words can match."""
        min_words = self.sizes[0]
        for turn in example.turns:
            run: list[str] = []
            for word in _words(turn.content):
                if word in self.vocabulary:
                    run.append(word)
                else:
                    if len(run) >= min_words:
                        yield run
                    run = []
            if len(run) >= min_words:
                yield run


def read_evaluation_texts(settings: Decontamination) -> EvaluationTexts:
    """Reads and indexes the texts of evaluation files.

    Raises:
        DataError: if a file cannot be read, or has none of the columns.
    """
    ngrams: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    lengths: list[int] = []
    locations: list[str] = []
    for text, where in _located_texts(settings):
        words = _words(text)
        if len(words) < _MIN_WORDS:
            continue
        size = min(settings.ngram, len(words))
        for i in range(len(words) - size + 1):
            ngrams[tuple(words[i : i + size])].append((len(lengths), i))
        lengths.append(len(words))
        locations.append(where)
    vocabulary = frozenset(word for ngram in ngrams for word in ngram)
    sizes = tuple(sorted({len(ngram) for ngram in ngrams}))
    if not sizes:
        what = f"contains no text of at least {_MIN_WORDS} words"
        raise DataError(", ".join(settings.files), what, "name the columns in `fields`")
    return EvaluationTexts(dict(ngrams), lengths, locations, vocabulary, sizes, settings.overlap)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _located_texts(settings: Decontamination) -> Iterator[tuple[str, str]]:
    """All texts of the evaluation files with their locations."""
    columns = settings.fields or _EVALUATION_COLUMNS
    for name in settings.files:
        for file in expand(name):
            found, record = False, None
            for record, where in read_records(file):
                for text in (text for column in columns for text in _question_texts(lookup(record, (column,)))):
                    found = True
                    yield text, where
            if not found:
                present = describe_columns([record] if record else [])
                raise DataError(
                    str(file), f"has no text in {' or '.join(columns)} (its columns are {present})",
                    "name the columns in data.clean.decontaminate.fields",
                )  # fmt: skip


def _question_texts(value: Any) -> Iterator[str]:
    """A text, the texts of a list, or the user turns of a list of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for entry in value:
            if isinstance(entry, Mapping):
                if str(entry.get("role", entry.get("from"))).lower() in ("user", "human"):
                    yield from _question_texts(lookup(entry, ("content", "value")))
            else:
                yield from _question_texts(entry)
