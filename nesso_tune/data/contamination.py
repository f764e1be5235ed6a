"""Evaluation texts that must not be trained on, by n-gram overlap as in Tulu 3 (arXiv:2411.15124, section 3.2)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nesso_tune.data.blocks import read_rows
from nesso_tune.data.convert import Item
from nesso_tune.data.files import expand
from nesso_tune.data.formats import described, lookup
from nesso_tune.errors import DataError
from nesso_tune.recipes.data import Decontamination

WORDS = re.compile(r"\w+")
FIELDS = ("prompt", "question", "instruction", "input", "messages")
LEAST = 4  # words below which a text says too little to be found


@dataclass(frozen=True)
class Contamination:
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

    def found_in(self, item: Item) -> str | None:
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

    def _runs(self, item: Item) -> Iterator[list[str]]:
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


def read_contamination(settings: Decontamination) -> Contamination:
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
    return Contamination(dict(grams), lengths, places, vocabulary, sizes, settings.overlap)


def _texts(settings: Decontamination) -> Iterator[tuple[str, str]]:
    """Every text of the files with its place."""
    for name in settings.files:
        for file in expand(name):
            found, row = False, None
            for row, where in read_rows(file):
                columns = settings.fields or FIELDS
                for text in (text for column in columns for text in _said(lookup(row, (column,)))):
                    found = True
                    yield text, where
            if not found:
                has = described([row] if row else [])
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
