"""The rows of a run as torch and accelerate see them: one flat sequence, as long as the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from nesso_tune.chat.encoding import IGNORED
from nesso_tune.data.packing import RowStream
from nesso_tune.model.attention import Segments
from nesso_tune.model.lm_head import Row
from nesso_tune.training.grouped_metrics import Groups


class RunDataset(Dataset):
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


Batch = dict[str, Any]
CountedBatch = tuple[Batch, bool]  # False: computed only so that all processes take part
NON_MODEL_KEYS = ("group_ids", "tokens", "entries")  # columns of a batch that no model takes


@dataclass(frozen=True)
class ConversationCollator:
    """Packed rows to one row of all their tokens, end to end; or, with masks, to a batch [rows, length].

    The first token of every document has no label: it would be predicted from another document. `group_ids` says for
    every token which language and source its document is of.

    Attributes:
        pad_id: fills what is longer than its documents; that is one more document, which teaches nothing.
        groups: languages and sources.
        by_document: the model attends by document. Without, documents are told apart by `position_ids` that restart
            at 0, and by the absence of an attention mask.
        length: tokens that every row is filled up to; None: no more than needed.
        packs: the model keeps documents apart that are told apart so. Without, a row is one document, padded to the
            right, with an attention mask.
    """

    pad_id: int
    groups: Groups
    by_document: bool = True
    length: int | None = None
    packs: bool = True

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        tokens = torch.tensor(sum(len(row["input_ids"]) for row in rows))
        if not self.by_document:
            length = self.length or max(len(row["input_ids"]) for row in rows)
            parts = [self._laid([row], length) for row in rows]
            batch = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
            if not self.packs:
                batch["attention_mask"] = _real(rows, length)
                del batch["position_ids"]
            return {**batch, "tokens": tokens}
        lengths = [n for row in rows for n in row["seq_lengths"]]
        length = self.length * len(rows) if self.length else int(tokens)
        batch = {name: tensor[None] for name, tensor in self._laid(rows, length).items()}
        segments = Segments.of_documents([*lengths, length - int(tokens)])
        before = (batch["labels"][0, 1:] != IGNORED).nonzero().flatten()
        return {**batch, "row": Row(batch["input_ids"], segments, before), "tokens": tokens}

    def _laid(self, rows: Sequence[dict[str, Any]], length: int) -> dict[str, Tensor]:
        """The documents of some rows end to end, [length]."""
        lengths = [n for row in rows for n in row["seq_lengths"]]
        lengths.append(length - sum(lengths))
        positions = np.concatenate([np.arange(n) for n in lengths])
        groups = [self.groups.number(*of) for row in rows for of in zip(row["languages"], row["sources"], strict=True)]
        laid = {"input_ids": np.full(length, self.pad_id), "labels": np.full(length, IGNORED)}
        for name, array in laid.items():
            own = [token for row in rows for token in row[name]]
            array[: len(own)] = own
        laid["labels"][positions == 0] = IGNORED
        laid |= {"position_ids": positions, "group_ids": np.repeat([*groups, 0], lengths)}
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in laid.items()}


def _real(rows: Sequence[dict[str, Any]], length: int) -> Tensor:
    """1 where a row of one document has a token, 0 where it is padding; [rows, length]."""
    assert all(len(row["seq_lengths"]) == 1 for row in rows), "this model cannot keep packed documents apart"
    return (torch.arange(length) < torch.tensor([len(row["input_ids"]) for row in rows])[:, None]).long()


class PairCollator:
    """Preference pairs to TRL's batch [chosen … rejected …, length], and the same as one row without padding.

    In the row every pair is its prompt, its chosen and its rejected answer: the prompt stands there once for both.
    `group_ids` says for every pair which language and source it is of.
    """

    def __init__(self, pad_id: int, groups: Groups, by_document: bool = True) -> None:
        self._padded = DataCollatorForPreference(pad_token_id=pad_id, max_length=None)
        self.groups, self.by_document = groups, by_document

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        batch: Batch = self._padded(list(rows))
        groups = [self.groups.number(row["languages"][0], row["sources"][0]) for row in rows]
        batch["group_ids"] = torch.tensor(groups)
        batch["entries"] = torch.tensor([row["pair"] for row in rows])
        batch["tokens"] = torch.tensor(sum(map(pair_tokens, rows)))
        if self.by_document:
            batch["row"] = one_row(rows)
        return batch


Collator = ConversationCollator | PairCollator
PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")


def pair_tokens(row: dict[str, Any]) -> int:
    """Tokens of a pair, its prompt counted once."""
    return sum(len(row[part]) for part in PARTS)


def one_row(rows: Sequence[dict[str, Any]]) -> Row:
    """Pairs as one row; its learned tokens are in the order of TRL's batch: all chosen answers, then all rejected."""
    ids = torch.tensor([token for row in rows for part in PARTS for token in row[part]])[None]
    sizes = [tuple(len(row[part]) for part in PARTS) for row in rows]
    before: dict[str, list[Tensor]] = {"chosen": [], "rejected": []}
    start = 0
    for prompt, chosen, rejected in sizes:
        asked, end = start + prompt - 1, start + prompt + chosen  # the last token of the prompt precedes both answers
        before["chosen"].append(torch.arange(asked, asked + chosen))
        before["rejected"].append(torch.cat([torch.tensor([asked]), torch.arange(end, end + rejected - 1)]))
        start = end + rejected
    order = torch.cat([*before["chosen"], *before["rejected"]])
    return Row(ids, Segments.of_pairs(sizes), order)  # type: ignore[arg-type]
