"""Best-fit packing, and the seeded order in which rows are seen through all epochs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from nesso_tune.data.mixture import Group
from nesso_tune.data.token_store import Documents

IntArray = npt.NDArray[Any]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing (Johnson, 1973): each document goes where it leaves the least room.

    Args:
        lengths: document lengths, longest first, none above `capacity`.
        capacity: tokens a row holds.

    Returns:
        Rows of positions in `lengths`. No document is split.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by the room they have left
    rooms = 0  # bit r is set if some row has room r: the tightest fit is its lowest bit at or above a length
    for position, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(f"a document of {length} tokens does not fit into rows of {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            rows[row].append(position)
        else:
            room, row = capacity, len(rows)
            rows.append([position])
        if left := room - length:
            by_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return rows


@dataclass(frozen=True)
class Rows(Sequence[dict[str, Any]]):
    """Rows as a model sees them; each is documents laid end to end, or one preference pair.

    A row of conversations has `input_ids`, `labels` (-100 where not learned), `seq_lengths` (tokens of each document),
    `languages` and `sources` (code and source of each document). A row of pairs has `prompt_ids`, `chosen_ids`,
    `rejected_ids`, `languages`, `sources` and `pair`, its number.
    """

    documents: Documents
    records: IntArray
    bounds: IntArray
    first_pair: int = 0  # pairs of validation sources are numbered after those of the training sources

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def members(self, row: int) -> IntArray:
        """Positions of the row's records in `documents`."""
        return self.records[self.bounds[row] : self.bounds[row + 1]]

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
        of = {
            "languages": [self.documents.language(record) for record in members],
            "sources": [self.documents.source(record) for record in members],
        }
        if self.documents.documents_per_record == 3:
            (pair,) = members
            names = ("prompt_ids", "chosen_ids", "rejected_ids")
            ids = {name: self.documents.input_ids(pair, i).tolist() for i, name in enumerate(names)}
            return {**ids, **of, "pair": self.first_pair + int(pair)}
        return {
            "input_ids": [token for record in members for token in self.documents.input_ids(record).tolist()],
            "labels": [label for record in members for label in self.documents.labels(record).tolist()],
            "seq_lengths": [len(self.documents.input_ids(record)) for record in members],
            **of,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))


class RowStream:
    """All rows of a run in one seeded order: epoch after epoch, each packed and shuffled anew.

    The order depends on the seed and the data alone, so that a run at any number of processes, and after any resume,
    sees the same rows in the same optimizer steps.
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
        """Packs into rows of `capacity` tokens, or not at all (None). `groups` say how often; without any, all once."""
        self.documents, self.records = documents, records
        self._seed, self._capacity = seed, capacity
        self._groups = groups
        self._lengths = documents.lengths
        self._pattern: tuple[bytes, list[list[int]]] | None = None
        self._counts: list[int] = []
        self.epoch = lru_cache(maxsize=2)(self._epoch)  # the current one, and the next at a border

    def unpacked(self) -> RowStream:
        """The same documents in as many rows."""
        return RowStream(self.documents, self.records, seed=self._seed, groups=self._groups)

    def locate(self, position: int) -> tuple[int, int]:
        """The epoch, and the row in it, of a position in the stream."""
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
        records = self._drawn(rng)
        if self._capacity is None:
            return Rows(self.documents, rng.permutation(records), np.arange(len(records) + 1))
        lengths = self._lengths[records]
        order = np.lexsort((rng.random(len(records)), -lengths))  # longest first, equal lengths shuffled
        packed = self._packed(lengths[order])
        shuffled = [packed[i] for i in rng.permutation(len(packed))]
        bounds = np.concatenate([[0], np.cumsum([len(row) for row in shuffled], dtype=np.int64)]).astype(np.int64)
        positions = np.fromiter((p for row in shuffled for p in row), dtype=np.int64, count=int(bounds[-1]))
        return Rows(self.documents, records[order[positions]], bounds)

    def _drawn(self, rng: np.random.Generator) -> IntArray:
        """The records of an epoch."""
        if not self._groups:
            return self.records
        return np.concatenate([group.draw(self._lengths, rng) for group in self._groups])

    def _packed(self, lengths: IntArray) -> list[list[int]]:
        """How lengths are packed; it depends on nothing else, so one packing serves all epochs of the same lengths."""
        assert self._capacity is not None
        key = lengths.tobytes()
        if self._pattern is None or self._pattern[0] != key:
            self._pattern = key, best_fit(lengths.tolist(), self._capacity)
        return self._pattern[1]


def sequential_rows(documents: Documents, records: IntArray, capacity: int | None, first_pair: int = 0) -> Rows:
    """Rows for evaluation: packed the same way, never shuffled."""
    if capacity is None:
        return Rows(documents, records, np.arange(len(records) + 1), first_pair)
    lengths = documents.lengths[records]
    order = np.argsort(-lengths, kind="stable")
    packed = best_fit(lengths[order].tolist(), capacity)
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in packed], dtype=np.int64)]).astype(np.int64)
    positions = np.array([p for row in packed for p in row], dtype=np.int64)
    return Rows(documents, records[order[positions]], bounds)
