"""From a recipe to rows: sources are read, encoded, cached by content, split, and packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nesso_tune.chat.tokenizer import ChatTokenizer, chat_tokenizer
from nesso_tune.data import cache
from nesso_tune.data.build import build_documents
from nesso_tune.data.documents import Documents, open_documents
from nesso_tune.data.files import is_local
from nesso_tune.data.packing import Rows, RowStream, in_order
from nesso_tune.data.sources import content_of
from nesso_tune.data.split import hold_out
from nesso_tune.errors import DataError
from nesso_tune.recipes.plan import DataVolume
from nesso_tune.recipes.schema import Recipe, SFTRecipe
from nesso_tune.recipes.sections import SFTData, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 3  # of what is cached; raised when the encoding changes


@dataclass(frozen=True)
class PreparedData:
    """Data ready to train on.

    Attributes:
        train: rows as trained in epoch 0.
        validation: rows held out, in order.
        stream: the rows of all epochs.
        report: what was read, dropped and kept; see `prepare_data`.
        chat: the chat-ready tokenizer's files.
    """

    train: Rows
    validation: Rows
    stream: RowStream
    report: dict[str, Any]
    chat: ChatTokenizer

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The chat-ready tokenizer, as transformers knows it."""
        return self.chat.load()

    @property
    def volume(self) -> DataVolume:
        """What one epoch holds."""
        return DataVolume(
            len(self.train), self.report["train"]["tokens"], self.report["train"]["supervised_tokens"],
            len(self.validation.entries),
            dropped={r: n / self.report["rows_read"] for r, n in self.report["dropped"].items()},
        )  # fmt: skip


def prepare_data(recipe: Recipe) -> PreparedData:
    """Reads, encodes and caches the data of a recipe, without torch.

    The report holds `rows_read`, `rows_kept`, `dropped` ({reason: count}), `tokens`, `supervised_tokens`,
    `languages` ({code: {rows, tokens, supervised_tokens}}), `sources` (the same per source), `train` and `validation`
    (the same of either side), `packing` ({rows, fill}), `fingerprint`, `cache_hit`.

    Raises:
        DataError: if a file cannot be read or nothing usable is left.
        RecipeError, ModelError: if the recipe or the base's tokenizer does not fit.
    """
    data, chat = recipe.data, chat_tokenizer(recipe.model, recipe.chat)
    documents, note, hit = _documents(recipe, data.sources, chat)
    if data.validation_sources:
        train, (held, held_note, held_hit) = (
            np.arange(len(documents)),
            _documents(recipe, data.validation_sources, chat),
        )
        held_out, hit, fingerprint = np.arange(len(held)), hit and held_hit, note["key"] + held_note["key"]
    else:
        train, held_out = hold_out(documents.languages, data.validation_size, recipe.seed)
        held, fingerprint = documents, note["key"]
    capacity = data.sequence_len if isinstance(data, SFTData) and data.packing else None
    weights = {i: source.weight for i, source in enumerate(data.sources)}
    stream = RowStream(documents, train, seed=recipe.seed, capacity=capacity, weights=weights)
    rows = stream.epoch(0)
    if not len(rows):
        raise DataError("data.sources", "their weights leave nothing to train on", "raise a weight, or give more rows")
    validation = in_order(held, held_out, capacity, first_pair=0 if held is documents else len(documents))
    tokens = int(documents.lengths[rows.entries].sum())
    fill = tokens / (len(rows) * data.sequence_len) if len(rows) else 0.0
    report = {
        **note["report"],
        "train": documents.counts(rows.entries),
        "validation": held.counts(held_out),
        "packing": {"rows": len(rows), "fill": round(fill, 4)},
        "fingerprint": cache.key_of([fingerprint, data.validation_size, recipe.seed, capacity, weights]),
        "cache_hit": hit,
    }
    return PreparedData(rows, validation, stream, report, chat)


def cached_only(recipe: Recipe) -> bool:
    """Whether the data of a recipe is in the cache, so that `prepare_data` only maps it."""
    chat = chat_tokenizer(recipe.model, recipe.chat)
    groups = [g for g in (recipe.data.sources, recipe.data.validation_sources) if g]
    if not all(is_local(source.path) for group in groups for source in group):
        return False
    return all(cache.find("documents", _key(recipe, group, chat)) for group in groups)


def _documents(
    recipe: Recipe, sources: Sequence[Source], chat: ChatTokenizer
) -> tuple[Documents, dict[str, Any], bool]:
    parts = 1 if isinstance(recipe, SFTRecipe) else 3
    key = _key(recipe, sources, chat)

    def build(staging: Path) -> dict[str, Any]:
        return build_documents(staging, recipe, sources, chat)

    def opened(folder: Path, note: dict[str, Any]) -> Documents:
        try:
            return open_documents(folder, note["languages"], parts)
        except (ValueError, OSError, EOFError, KeyError, TypeError) as error:
            raise cache.Damaged(str(error)) from None

    documents, note, hit = cache.make("documents", key, build, opened)
    return documents, {"key": key, **note}, hit


def _key(recipe: Recipe, sources: Sequence[Source], chat: ChatTokenizer) -> str:
    settings = recipe.data.model_dump(
        mode="json", exclude={"sources", "validation_sources", "validation_size", "packing"}
    )
    return cache.key_of([FORMAT_VERSION, recipe.method, chat.fingerprint, settings, [content_of(s) for s in sources]])
