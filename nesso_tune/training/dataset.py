"""The data set of a run and its collators: one sequence of rows through all epochs, as torch and accelerate see it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from nesso_tune.chat.encoding import IGNORE_INDEX
from nesso_tune.data.packing import RowStream
from nesso_tune.model.attention import AttentionSpans
from nesso_tune.model.lm_head import PackedRow
from nesso_tune.training.grouped_metrics import Groups

Batch = dict[str, Any]
CountedBatch = tuple[Batch, bool]  # False: a repeated batch that only keeps all processes in step
# Keys of a batch that are not arguments of the model. Counts are Python integers, which cost no wait for the device.
NON_MODEL_KEYS = ("group_ids", "tokens", "supervised_tokens", "chosen_tokens", "entries")
PAIR_PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")


class RunDataset(Dataset):
    """All rows of a run, through all epochs, in training order.

    Accelerate distributes micro batches over the processes round-robin, so optimizer step `s` has the rows
    `s * global_batch` to `(s + 1) * global_batch` whatever the number of processes.

    Args:
        stream: the rows of all epochs.
        rows: number of rows of the run.
    """

    def __init__(self, stream: RowStream, rows: int) -> None:
        self.stream, self.rows = stream, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.stream[position]

    def records(self, positions: Iterable[int]) -> list[int]:
        """Indices of the conversations or pairs in some rows."""
        found: list[int] = []
        for position in positions:
            epoch, row = self.stream.locate(position)
            found += map(int, self.stream.epoch(epoch).members(row))
        return found

    def epoch_at(self, position: int) -> float:
        """Epochs completed after `position` rows."""
        if position == 0:
            return 0.0
        epoch, row = self.stream.locate(position - 1)
        return epoch + (row + 1) / len(self.stream.epoch(epoch))


@dataclass(frozen=True)
class ConversationCollator:
    """Collates packed rows.

    With `by_document`, a batch is one row of all tokens, [1, tokens], without padding. Otherwise it is padded,
    [rows, length]. The first token of every document has no label, because it would be predicted from the document
    before it. `group_ids` has the group of every token, and `supervised_index` the positions of the supervised tokens
    in the flattened `labels[:, 1:]`.

    Attributes:
        pad_id: token id of the padding; padding is one or more documents, without supervised tokens.
        groups: languages and sources.
        by_document: the model's attention takes `AttentionSpans`. Otherwise `position_ids` that restart at 0
            separate documents, without an attention mask.
        length: number of tokens that every row is padded to; None for no more than needed.
        packs: the model separates documents by such `position_ids`. Otherwise a row must have a single document; it
            is padded on the right, with an attention mask.
    """

    pad_id: int
    groups: Groups
    by_document: bool = True
    length: int | None = None
    packs: bool = True

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        tokens = sum(len(row["input_ids"]) for row in rows)
        if not self.by_document:
            length = self.length or max(len(row["input_ids"]) for row in rows)
            padded = [self._concatenate([row], length) for row in rows]
            batch = {name: torch.stack([row[name] for row in padded]) for name in padded[0]}
            if not self.packs:
                batch["attention_mask"] = _attention_mask(rows, length)
                del batch["position_ids"]
            return batch | _supervised(batch["labels"][:, 1:] != IGNORE_INDEX) | {"tokens": tokens}
        lengths = [n for row in rows for n in row["seq_lengths"]]
        length = self.length * len(rows) if self.length else tokens
        batch = {name: tensor[None] for name, tensor in self._concatenate(rows, length).items()}
        spans = AttentionSpans.from_documents([*lengths, *self._padding(length - tokens)], longest=self.length)
        batch |= _supervised(batch["labels"][:, 1:] != IGNORE_INDEX)
        row = PackedRow(batch["input_ids"], spans, batch["supervised_index"])
        return {**batch, "packed_row": row, "tokens": tokens}

    def _concatenate(self, rows: Sequence[dict[str, Any]], length: int) -> dict[str, Tensor]:
        """The documents of some rows end to end, padded; each tensor is [length]."""
        lengths = [n for row in rows for n in row["seq_lengths"]]
        groups = [self.groups.index(*of) for row in rows for of in zip(row["languages"], row["sources"], strict=True)]
        padding = self._padding(length - sum(lengths))
        lengths, groups = lengths + padding, groups + [0] * len(padding)
        positions = np.concatenate([np.arange(n) for n in lengths])
        arrays = {"input_ids": np.full(length, self.pad_id), "labels": np.full(length, IGNORE_INDEX)}
        for name, array in arrays.items():
            values = [value for row in rows for value in row[name]]
            array[: len(values)] = values
        arrays["labels"][positions == 0] = IGNORE_INDEX
        arrays |= {"position_ids": positions, "group_ids": np.repeat(groups, lengths)}
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}

    def _padding(self, tokens: int) -> list[int]:
        """Lengths of the documents of this many padding tokens, none longer than a row."""
        most = self.length or max(tokens, 1)
        return [min(most, tokens - start) for start in range(0, tokens, most)]


def _supervised(mask: Tensor) -> Batch:
    """Index and number of the supervised positions in a mask of `labels[:, 1:]`."""
    index = mask.flatten().nonzero().flatten()
    return {"supervised_index": index, "supervised_tokens": len(index)}


def _attention_mask(rows: Sequence[dict[str, Any]], length: int) -> Tensor:
    """1 for tokens and 0 for padding, [rows, length]; each row must have a single document."""
    assert all(len(row["seq_lengths"]) == 1 for row in rows), "this model cannot keep packed documents apart"
    return (torch.arange(length) < torch.tensor([len(row["input_ids"]) for row in rows])[:, None]).long()


class PairCollator:
    """Collates preference pairs to TRL's batch [chosen ..., rejected ...; length].

    With `by_document`, the batch also has `packed_row`: the same pairs as one row without padding, in which each prompt
    occurs once, followed by its chosen and its rejected answer. `group_ids` has the group of every pair, `entries` its
    index, and `supervised_index` the positions of the answers' tokens in the flattened `input_ids[:, 1:]`, chosen
    answers first.

    Args:
        pad_id: token id of the padding.
        groups: languages and sources.
        by_document: the model's attention takes `AttentionSpans`.
    """

    def __init__(self, pad_id: int, groups: Groups, by_document: bool = True) -> None:
        self._padded = DataCollatorForPreference(pad_token_id=pad_id, max_length=None)
        self.groups, self.by_document = groups, by_document

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        batch: Batch = self._padded(list(rows))
        groups = [self.groups.index(row["languages"][0], row["sources"][0]) for row in rows]
        batch["group_ids"] = torch.tensor(groups)
        batch["entries"] = [row["pair"] for row in rows]
        batch["tokens"] = sum(map(pair_tokens, rows))
        batch |= _supervised(batch["completion_mask"][:, 1:] == 1)
        batch["chosen_tokens"] = sum(len(row["chosen_ids"]) for row in rows)
        if self.by_document:
            batch["packed_row"] = _pairs_as_row(rows)
        return batch


Collator = ConversationCollator | PairCollator


def pair_tokens(row: dict[str, Any]) -> int:
    """Number of tokens of a pair; its prompt counts once."""
    return sum(len(row[part]) for part in PAIR_PARTS)


def _pairs_as_row(rows: Sequence[dict[str, Any]]) -> PackedRow:
    """Pairs as one row. Its supervised tokens are in TRL's order: all chosen answers, then all rejected ones."""
    ids = torch.tensor([token for row in rows for part in PAIR_PARTS for token in row[part]])[None]
    sizes = [tuple(len(row[part]) for part in PAIR_PARTS) for row in rows]
    before_chosen: list[Tensor] = []
    before_rejected: list[Tensor] = []
    start = 0
    for prompt, chosen, rejected in sizes:
        last, end = start + prompt - 1, start + prompt + chosen  # both answers follow the last token of the prompt
        before_chosen.append(torch.arange(last, last + chosen))
        before_rejected.append(torch.cat([torch.tensor([last]), torch.arange(end, end + rejected - 1)]))
        start = end + rejected
    before = torch.cat([*before_chosen, *before_rejected])
    return PackedRow(ids, AttentionSpans.from_pairs(sizes), before)  # type: ignore[arg-type]
