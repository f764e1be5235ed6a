"""Rows to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

Batch = dict[str, Any]
Row = dict[str, Any]
CountedBatch = tuple[Batch, bool]  # False: computed only so that all processes take part


@dataclass(frozen=True)
class ConversationCollator:
    """Packed rows to a batch [rows, length], or, for flash attention, to one row of all tokens end to end.

    Documents are told apart by `position_ids` that restart at 0, and by the absence of an attention mask; the tail of
    a shorter row is one more document that teaches nothing. The first token of every document has no label: it would
    be predicted from another document. `language_ids` says for every token which language its document is in.
    """

    pad_id: int
    languages: tuple[str, ...]
    flat: bool = False

    def __call__(self, rows: Sequence[Row]) -> Batch:
        length = max(len(row["input_ids"]) for row in rows)
        tensors = [self._row(row, len(row["input_ids"]) if self.flat else length) for row in rows]
        join = (lambda parts: torch.cat(parts)[None]) if self.flat else torch.stack
        batch: Batch = {name: join([tensor[name] for tensor in tensors]) for name in tensors[0]}
        batch["tokens"] = torch.tensor(sum(len(row["input_ids"]) for row in rows))
        if self.flat:
            starts = (batch["position_ids"][0] == 0).nonzero().flatten()
            bounds = torch.cat([starts, torch.tensor([batch["position_ids"].shape[1]])]).to(torch.int32)
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = bounds
            batch["max_length_q"] = batch["max_length_k"] = int(bounds.diff().max())
        return batch

    def _row(self, row: Row, length: int) -> dict[str, torch.Tensor]:
        lengths = [*row["seq_lengths"], length - len(row["input_ids"])]
        positions = np.concatenate([np.arange(n) for n in lengths])
        languages = [self.languages.index(code) for code in row["languages"]]
        labels = np.full(length, -100)
        labels[: len(row["labels"])] = row["labels"]
        labels[positions == 0] = -100
        ids = np.full(length, self.pad_id)
        ids[: len(row["input_ids"])] = row["input_ids"]
        of_token = np.repeat([*languages, 0], lengths)
        names = ("input_ids", "labels", "position_ids", "language_ids")
        return {
            n: torch.from_numpy(a.astype(np.int64))
            for n, a in zip(names, (ids, labels, positions, of_token), strict=True)
        }


class PairCollator:
    """Preference pairs to TRL's batch [chosen … rejected …, length], with the reference's log-probabilities.

    `language_ids` says for every pair which language it is in.
    """

    def __init__(self, pad_id: int, languages: tuple[str, ...]) -> None:
        self._padded = DataCollatorForPreference(pad_token_id=pad_id, max_length=None)
        self._languages = languages

    def __call__(self, rows: Sequence[Row]) -> Batch:
        batch: Batch = self._padded(list(rows))
        batch["language_ids"] = torch.tensor([self._languages.index(row["languages"][0]) for row in rows])
        batch["entries"] = torch.tensor([row["pair"] for row in rows])
        batch["tokens"] = torch.tensor(
            sum(len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
        )
        return batch
