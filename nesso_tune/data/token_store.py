"""Encoded records on disk: token ids and loss masks as flat memory-mapped files, with one row of columns per record.

A record is a conversation, a text or a preference pair. It holds one document (conversation, text) or three (prompt,
chosen and rejected answer of a pair).
"""

from __future__ import annotations

import zipfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nesso_tune.chat.encoding import IGNORE_INDEX
from nesso_tune.data.block_encoder import Chunk, Identity
from nesso_tune.data.report import TokenCounts

IntArray = npt.NDArray[Any]
IDS_FILE, MASK_FILE, COLUMNS_FILE = "ids.bin", "trained.bin", "entries.npz"
_ID_DTYPE, _MASK_DTYPE = np.dtype("<i4"), np.dtype("u1")


@dataclass(frozen=True, repr=False)
class Documents:
    """All encoded records of one recipe's sources, memory-mapped.

    Token arrays are indexed by position, the other arrays by record unless stated otherwise.

    Attributes:
        ids: token ids of all documents, concatenated; shape (tokens,), int32.
        supervised: loss mask of `ids`, 1 for supervised tokens; for pairs 1 in both answers. Shape (tokens,), uint8.
        offsets: start of each document in `ids`, then the end of the last one; shape (documents + 1,).
        supervised_counts: number of supervised tokens.
        languages: index into `language_names`.
        sources: index of the source in the recipe.
        files: index into `prefixes`.
        numbers: number of the row in its file.
        identities: content hashes, see `Identity`; shape (records, 4), uint64.
        mismatched: 1 for a pair with an answer in another language than its prompt.
        kept: indices of the records in use; the others are duplicates that the recipe drops.
        language_names: language codes.
        prefixes: location of a row without its number (`FILE:` or `FILE row `), one per file.
        documents_per_record: 1 (conversations and texts) or 3 (pairs).
        source_names: names of the sources in reports and metrics.
        private_sources, private_files: indices of sources and files that must not be shown; see `privacy.py`.
    """

    ids: IntArray
    supervised: IntArray
    offsets: IntArray
    supervised_counts: IntArray
    languages: IntArray
    sources: IntArray
    files: IntArray
    numbers: IntArray
    identities: IntArray
    mismatched: IntArray
    kept: IntArray
    language_names: tuple[str, ...]
    prefixes: tuple[str, ...]
    documents_per_record: int
    source_names: tuple[str, ...] = ()
    private_sources: frozenset[int] = frozenset()
    private_files: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.languages)

    def __repr__(self) -> str:
        return f"Documents({len(self):,} records, {len(self.ids):,} tokens)"

    @cached_property
    def lengths(self) -> IntArray:
        """Tokens of each record, over all its documents."""
        return np.diff(self.offsets[:: self.documents_per_record])

    @cached_property
    def sequence_lengths(self) -> IntArray:
        """Tokens of the longest sequence of each record: for a pair, the prompt with the longer answer."""
        if self.documents_per_record == 1:
            return self.lengths
        sizes = np.diff(self.offsets).reshape(-1, self.documents_per_record)
        longest: IntArray = sizes[:, 0] + sizes[:, 1:].max(axis=1, initial=0)
        return longest

    def token_slice(self, record: int, part: int = 0) -> slice:
        """Slice of `ids` with one document of a record; `part` is 0, 1 or 2 for a pair's prompt, chosen, rejected."""
        position = record * self.documents_per_record + part
        return slice(int(self.offsets[position]), int(self.offsets[position + 1]))

    def input_ids(self, record: int, part: int = 0) -> IntArray:
        """Token ids of one document of a record."""
        return self.ids[self.token_slice(record, part)]

    def labels(self, record: int) -> IntArray:
        """Labels of a conversation: the ids of supervised tokens, -100 elsewhere."""
        tokens = self.token_slice(record)
        return np.where(self.supervised[tokens], self.ids[tokens], IGNORE_INDEX)

    def language(self, record: int) -> str:
        """Language code of a record."""
        return self.language_names[int(self.languages[record])]

    def source(self, record: int) -> str:
        """Name of a record's source."""
        return self.source_names[int(self.sources[record])] if self.source_names else ""

    def location(self, record: int) -> str:
        """Location of a record's row: `FILE:LINE` or `FILE row N`."""
        return f"{self.prefixes[int(self.files[record])]}{self.numbers[record]}"

    def are_private(self, records: IntArray) -> npt.NDArray[np.bool_]:
        """Whether each record comes from a private source or file, so that nothing of it may be shown."""
        in_source = np.isin(self.sources[records], list(self.private_sources))
        return in_source | np.isin(self.files[records], list(self.private_files))

    def is_private(self, record: int) -> bool:
        """`are_private` for one record."""
        return bool(self.are_private(np.array([record]))[0])

    def public_location(self, record: int) -> str:
        """Location of a record's row; for a private record, its source's public name and the row number."""
        return (
            f"{self.source(record)}, row {self.numbers[record]}" if self.is_private(record) else self.location(record)
        )

    def counts(self, records: IntArray) -> TokenCounts:
        """Size of some records; a record that is listed twice counts twice."""
        tokens, supervised = (int(column[records].sum()) for column in (self.lengths, self.supervised_counts))
        return TokenCounts(len(records), tokens, supervised)


def open_documents(folder: Path, languages: Sequence[str], prefixes: Sequence[str], parts: int) -> Documents:
    """Memory-maps what a `DocumentWriter` wrote; the other arguments are those that its `close` returned.

    Raises:
        ValueError, OSError, EOFError, KeyError: if a file is missing, damaged, or inconsistent with the others.
    """
    try:
        with np.load(folder / COLUMNS_FILE) as stored:
            columns = {name: stored[name] for name in stored.files}
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from None
    offsets, records = columns["offsets"], len(columns["languages"])
    total = int(offsets[-1])
    if len(offsets) != records * parts + 1 or any(
        len(columns[name]) != records for name in ("learned", "sources", "files", "numbers", "identities", "mismatched")
    ):
        raise ValueError("columns of different lengths")
    token_files = ((IDS_FILE, _ID_DTYPE), (MASK_FILE, _MASK_DTYPE))
    if any((folder / name).stat().st_size != total * dtype.itemsize for name, dtype in token_files):
        raise ValueError("token files of the wrong size")
    ids, supervised = (
        np.memmap(folder / name, dtype=dtype, mode="r", shape=(total,)) if total else np.zeros(0, dtype)
        for name, dtype in token_files
    )
    supervised_counts = columns.pop("learned")  # the name on disk
    return Documents(
        ids, supervised, supervised_counts=supervised_counts, **columns, language_names=tuple(languages),
        prefixes=tuple(prefixes), documents_per_record=parts,
    )  # fmt: skip


class DocumentWriter:
    """Writes encoded records into a folder, chunk by chunk.

    Token ids and masks go to disk at once; in memory each record takes about a hundred bytes.
    """

    def __init__(self, folder: Path, documents_per_record: int) -> None:
        self._folder, self._documents_per_record = folder, documents_per_record
        self._ids, self._mask = (folder / IDS_FILE).open("wb"), (folder / MASK_FILE).open("wb")
        self._lengths, self._supervised_counts, self._numbers = array("q"), array("q"), array("q")
        self._identities = array("Q")
        self._languages, self._sources, self._files = array("i"), array("i"), array("i")
        self._mismatched = bytearray()
        self._language_indices: dict[str, int] = {}
        self._prefix_indices: dict[str, int] = {}

    def write(self, chunk: Chunk, source: int) -> None:
        """Appends the records of a chunk that come from the source with this index."""
        self._ids.write(np.frombuffer(chunk.ids, np.intc).astype(_ID_DTYPE, copy=False).tobytes())
        self._mask.write(chunk.supervised)
        self._lengths.extend(chunk.lengths)
        self._supervised_counts.extend(chunk.supervised_counts)
        self._numbers.extend(chunk.numbers)
        self._identities.extend(chunk.identities)
        self._mismatched += chunk.mismatched
        records, languages = len(chunk.languages), self._language_indices
        self._languages.extend(languages.setdefault(code, len(languages)) for code in chunk.languages)
        self._sources.extend([source] * records)
        self._files.extend([self._prefix_indices.setdefault(chunk.prefix, len(self._prefix_indices))] * records)

    def close(self) -> dict[str, Any]:
        """Finishes the files; returns the arguments of `open_documents` as plain data."""
        self._ids.close()
        self._mask.close()
        offsets = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]).astype(np.int64)
        records = len(self._languages)
        self._columns = {
            "offsets": offsets,
            "learned": np.array(self._supervised_counts, np.int64),
            "languages": np.array(self._languages, np.int32),
            "sources": np.array(self._sources, np.int32),
            "files": np.array(self._files, np.int32),
            "numbers": np.array(self._numbers, np.int64),
            "identities": np.array(self._identities, np.uint64).reshape(records, len(Identity._fields)),
            "mismatched": np.frombuffer(self._mismatched, np.uint8),
        }
        self.keep(np.arange(records))
        return {
            "languages": list(self._language_indices),
            "prefixes": list(self._prefix_indices),
            "parts": self._documents_per_record,
        }

    def keep(self, records: IntArray) -> None:
        """Marks these records as the ones in use; by default, all are."""
        with (self._folder / COLUMNS_FILE).open("wb") as stream:
            columns: dict[str, Any] = {"kept": records.astype(np.int64), **self._columns}
            np.savez(stream, **columns)
