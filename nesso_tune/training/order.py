"""The rows of a run as torch and accelerate see them: one flat sequence, as long as the run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils.data import Dataset

from nesso_tune.data.packing import RowStream


class RunOrder(Dataset):
    """Row `i` is the i-th row of the run, through all epochs.

    Accelerate deals micro batches to the processes in turn, so that optimizer step `s` consists of the rows
    `s * global_batch` to `(s + 1) * global_batch` at any number of processes.
    """

    def __init__(self, stream: RowStream, rows: int) -> None:
        self.stream, self.rows = stream, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.stream[position]

    def entries(self, positions: Iterable[int]) -> list[int]:
        """The conversations or pairs in some rows of the run, by their number in the documents."""
        found: list[int] = []
        for position in positions:
            epoch, row = self.stream.locate(position)
            found += map(int, self.stream.epoch(epoch).members(row))
        return found

    def epoch_at(self, position: int) -> float:
        """Epochs seen when `position` rows have been seen."""
        if position == 0:
            return 0.0
        epoch, row = self.stream.locate(position - 1)
        return epoch + (row + 1) / len(self.stream.epoch(epoch))
