"""Packed rows, and their seeded order over all epochs of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, overload

import numpy as np

from nesso_tune.data.mixture import Group
from nesso_tune.data.token_store import Documents, IntArray


@dataclass(frozen=True, repr=False)
class Rows(Sequence[dict[str, Any]]):
    """A sequence of training rows: packed rows of conversations, or one preference pair per row.

    A packed row is a dict with `input_ids`, `labels` (-100 for unsupervised tokens), `seq_lengths` (tokens of each
    packed document), `languages` and `sources` (one per document). A pair is a dict with `prompt_ids`, `chosen_ids`,
    `rejected_ids`, `languages`, `sources` and `pair`, its number.

    Attributes:
        documents: the token store.
        records: records of all rows, row after row; shape (records,).
        bounds: start of each row in `records`, then the end of the last one; shape (rows + 1,).
        first_pair: number of the first pair: pairs of validation sources are numbered after those of training sources.
    """

    documents: Documents
    records: IntArray
    bounds: IntArray
    first_pair: int = 0

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __repr__(self) -> str:
        return f"Rows({len(self):,} rows of {len(self.records):,} records)"

    def members(self, row: int) -> IntArray:
        """The records in a row, as indices into `documents`."""
        return self.records[self.bounds[row] : self.bounds[row + 1]]

    @property
    def token_counts(self) -> IntArray:
        """Tokens of each row."""
        ends: IntArray = np.concatenate([[0], np.cumsum(self.documents.lengths[self.records])])
        return np.diff(ends[self.bounds])

    @property
    def document_length(self) -> float:
        """Mean length of a document over the tokens: the sum of squared lengths by the number of tokens.

        A pair has the squares that its attention computes: both answers with the prompt, which is computed once.
        """
        tokens = int(self.documents.lengths[self.records].sum())
        sizes = np.diff(self.documents.offsets).reshape(-1, self.documents.documents_per_record)[self.records]
        prompt, rest = sizes[:, 0].astype(float), sizes[:, 1:].astype(float)
        squares = ((prompt[:, None] + rest) ** 2).sum() - (prompt**2).sum() if rest.size else (prompt**2).sum()
        return float(squares / tokens) if tokens else 0.0

    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: slice) -> list[dict[str, Any]]: ...
    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            return [row[key] for row in self]
        if isinstance(key, slice):
            return [self[i] for i in range(*key.indices(len(self)))]
        if not -len(self) <= key < len(self):
            raise IndexError(key)
        members = self.members(key % len(self))
        origin = {
            "languages": [self.documents.language(record) for record in members],
            "sources": [self.documents.source(record) for record in members],
        }
        if self.documents.documents_per_record == 3:
            (pair,) = members
            names = ("prompt_ids", "chosen_ids", "rejected_ids")
            ids = {name: self.documents.input_ids(pair, i).tolist() for i, name in enumerate(names)}
            return {**ids, **origin, "pair": self.first_pair + int(pair)}
        return {
            "input_ids": [token for record in members for token in self.documents.input_ids(record).tolist()],
            "labels": [label for record in members for label in self.documents.labels(record).tolist()],
            "seq_lengths": [len(self.documents.input_ids(record)) for record in members],
            **origin,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))


class RowStream:
    """All rows of a run in one seeded order: epoch after epoch, each packed and shuffled again.

    The order depends only on the seed and the data: at any number of processes, and after any resume, a run sees the
    same rows in the same optimizer steps.

    Args:
        documents: the token store.
        records: records to train on.
        seed: seed of sampling, packing and shuffling.
        capacity: tokens per packed row; None for one record per row.
        groups: how often each group of records is drawn per epoch; empty to draw every record once.
    """

    def __init__(
        self,
        documents: Documents,
        records: IntArray,
        *,
        seed: int,
        capacity: int | None = None,
        groups: Sequence[Group] = (),
    ) -> None:
        self.documents, self.records = documents, records
        self._seed, self._capacity = seed, capacity
        self._groups = groups
        self._lengths = documents.lengths
        self._packing: tuple[bytes, list[list[int]]] | None = None
        self._counts: list[int] = []
        self.epoch = lru_cache(maxsize=2)(self._epoch)  # a batch may span two epochs

    def unpacked(self) -> RowStream:
        """The same records, one per row."""
        return RowStream(self.documents, self.records, seed=self._seed, groups=self._groups)

    def locate(self, position: int) -> tuple[int, int]:
        """The epoch, and the row within it, at a position of the stream."""
        epoch = 0
        while True:
            if epoch == len(self._counts):
                self._counts.append(len(self.epoch(epoch)))
            if position < self._counts[epoch]:
                return epoch, position
            position -= self._counts[epoch]
            epoch += 1

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, row = self.locate(position)
        return self.epoch(epoch)[row]

    def _epoch(self, epoch: int) -> Rows:
        rng = np.random.default_rng([self._seed, epoch])
        records = self._draw(rng)
        if self._capacity is None:
            return Rows(self.documents, rng.permutation(records), np.arange(len(records) + 1))
        lengths = self._lengths[records]
        order = np.lexsort((rng.random(len(records)), -lengths))  # longest first, equal lengths shuffled
        packed = self._pack(lengths[order])
        shuffled = [packed[i] for i in rng.permutation(len(packed))]
        return _packed_rows(self.documents, records[order], shuffled)

    def _draw(self, rng: np.random.Generator) -> IntArray:
        """The records of one epoch, with repetitions."""
        if not self._groups:
            return self.records
        return np.concatenate([group.draw(self._lengths, rng) for group in self._groups])

    def _pack(self, lengths: IntArray) -> list[list[int]]:
        """Best-fit packing of sorted lengths; cached, because epochs of the same lengths pack alike."""
        assert self._capacity is not None
        key = lengths.tobytes()
        if self._packing is None or self._packing[0] != key:
            self._packing = key, best_fit(lengths.tolist(), self._capacity)
        return self._packing[1]


def sequential_rows(documents: Documents, records: IntArray, capacity: int | None, first_pair: int = 0) -> Rows:
    """Rows in a fixed order, for evaluation: packed like training rows if `capacity` is given, never shuffled."""
    if capacity is None:
        return Rows(documents, records, np.arange(len(records) + 1), first_pair)
    lengths = documents.lengths[records]
    order = np.argsort(-lengths, kind="stable")
    return _packed_rows(documents, records[order], best_fit(lengths[order].tolist(), capacity))


def _packed_rows(documents: Documents, records: IntArray, packed: Sequence[Sequence[int]]) -> Rows:
    """Rows of records; `packed` holds indices into `records`, one list per row."""
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in packed], dtype=np.int64)]).astype(np.int64)
    positions = np.fromiter(chain.from_iterable(packed), dtype=np.int64, count=int(bounds[-1]))
    return Rows(documents, records[positions], bounds)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing (Johnson, 1973): each document goes where it leaves the least free space.

    Args:
        lengths: document lengths in descending order, none above `capacity`.
        capacity: tokens per packed row.

    Returns:
        One list of indices into `lengths` per row. No document is split.

    Raises:
        ValueError: if a document is longer than `capacity`.
    """
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[int]] = {}  # rows by the free space left in them
    spaces = 0  # bit s is set if some row has s tokens free: the best fit is the lowest bit at or above a length
    for position, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(f"a document of {length} tokens does not fit into rows of {capacity}")
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
            rows[row].append(position)
        else:
            space, row = capacity, len(rows)
            rows.append([position])
        if left := space - length:
            rows_by_space.setdefault(left, []).append(row)
            spaces |= 1 << left
    return rows
