"""Encoded documents on disk: token ids laid end to end, memory-mapped, with offsets.

A conversation is one document; a preference pair is three (prompt, chosen, rejected) that stand side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nesso_tune.chat.encoding import IGNORED, Encoded, EncodedPair

Ints = npt.NDArray[Any]
ID, LEARNED = np.dtype("<i4"), np.dtype("u1")


@dataclass(frozen=True)
class Documents:
    """Documents of one kind, by position.

    Attributes:
        ids: all token ids, int32.
        trained: 1 where a token is learned; for pairs 1 in the answers.
        offsets: where each document begins in `ids`, and the end: one more than there are documents.
        languages: index into `language_names`, per conversation or pair.
        sources: index of the source it comes from, per conversation or pair.
        rows: number of its row in that source, from 1, per conversation or pair.
        language_names: codes of the languages that occur.
        parts: documents per entry: 1 (conversations) or 3 (pairs).
    """

    ids: Ints
    trained: Ints
    offsets: Ints
    languages: Ints
    sources: Ints
    rows: Ints
    language_names: tuple[str, ...]
    parts: int

    def __len__(self) -> int:
        return len(self.languages)

    @property
    def lengths(self) -> Ints:
        """Tokens of each entry, all its parts together."""
        bounds = self.offsets[:: self.parts]
        return np.diff(bounds)

    def part(self, entry: int, part: int = 0) -> slice:
        """Where one part of an entry stands in `ids`."""
        position = entry * self.parts + part
        return slice(int(self.offsets[position]), int(self.offsets[position + 1]))

    def input_ids(self, entry: int, part: int = 0) -> Ints:
        """Token ids of one part of an entry."""
        return self.ids[self.part(entry, part)]

    def labels(self, entry: int) -> Ints:
        """Labels of a conversation: ids where learned, -100 elsewhere."""
        here = self.part(entry)
        return np.where(self.trained[here], self.ids[here], IGNORED)

    def language(self, entry: int) -> str:
        """Language code of an entry."""
        return self.language_names[int(self.languages[entry])]

    def counts(self, entries: Ints) -> dict[str, int]:
        """Rows, tokens and supervised tokens of some entries."""
        bounds = self.offsets[:: self.parts]
        learned = np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])
        return {
            "rows": len(entries),
            "tokens": int(np.diff(bounds)[entries].sum()),
            "supervised_tokens": int((learned[bounds[1:]] - learned[bounds[:-1]])[entries].sum()),
        }


class DocumentWriter:
    """Writes documents into a folder, chunk by chunk; nothing but offsets is held in memory."""

    def __init__(self, folder: Path, parts: int) -> None:
        self._folder, self.parts = folder, parts
        self._ids, self._trained = (folder / "ids.bin").open("wb"), (folder / "trained.bin").open("wb")
        self._lengths: list[int] = []
        self._languages: list[int] = []
        self._sources: list[int] = []
        self._rows: list[int] = []
        self._names: dict[str, int] = {}

    def add(self, entry: Encoded | EncodedPair, language: str, source: int, row: int) -> None:
        """Appends one conversation or pair, the `row`-th of its source."""
        if isinstance(entry, Encoded):
            ids, trained, lengths = entry.ids, entry.trained, [len(entry.ids)]
        else:
            ids = [*entry.prompt, *entry.chosen, *entry.rejected]
            lengths = [len(entry.prompt), len(entry.chosen), len(entry.rejected)]
            trained = [False] * lengths[0] + [True] * (lengths[1] + lengths[2])
        self._ids.write(np.array(ids, dtype=ID).tobytes())
        self._trained.write(np.array(trained, dtype=LEARNED).tobytes())
        self._lengths += lengths
        self._languages.append(self._names.setdefault(language, len(self._names)))
        self._sources.append(source)
        self._rows.append(row)

    def close(self) -> tuple[str, ...]:
        """Finishes the files; returns the language codes."""
        self._ids.close()
        self._trained.close()
        offsets = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]).astype(np.int64)
        np.save(self._folder / "offsets.npy", offsets)
        np.save(self._folder / "languages.npy", np.array(self._languages, dtype=np.int32))
        np.save(self._folder / "sources.npy", np.array(self._sources, dtype=np.int32))
        np.save(self._folder / "rows.npy", np.array(self._rows, dtype=np.int64))
        return tuple(self._names)


def open_documents(folder: Path, language_names: Sequence[str], parts: int) -> Documents:
    """Maps documents that a `DocumentWriter` wrote.

    Raises:
        ValueError, OSError, EOFError: if a file is missing, damaged, or does not fit the others.
    """
    offsets = np.load(folder / "offsets.npy")
    languages, sources, rows = (np.load(folder / f"{name}.npy") for name in ("languages", "sources", "rows"))
    total = int(offsets[-1])
    sizes = [(folder / name).stat().st_size for name in ("ids.bin", "trained.bin")]
    if len(offsets) != len(languages) * parts + 1 or not len(sources) == len(rows) == len(languages):
        raise ValueError("entries of different number")
    if sizes != [total * ID.itemsize, total * LEARNED.itemsize]:
        raise ValueError("files of different length")
    if total == 0:
        ids, trained = np.zeros(0, ID), np.zeros(0, LEARNED)
    else:
        ids = np.memmap(folder / "ids.bin", dtype=ID, mode="r", shape=(total,))
        trained = np.memmap(folder / "trained.bin", dtype=LEARNED, mode="r", shape=(total,))
    return Documents(ids, trained, offsets, languages, sources, rows, tuple(language_names), parts)
