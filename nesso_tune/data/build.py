"""Reading and encoding sources into documents on disk; rows that cannot be used are counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nesso_tune.chat.encoding import Encoded, EncodedPair
from nesso_tune.chat.tokenizer import ChatTokenizer
from nesso_tune.conversation import UNKNOWN_LANGUAGE, Conversation, PreferencePair
from nesso_tune.data.convert import AUTO, language_of, to_conversation, to_pair
from nesso_tune.data.documents import DocumentWriter, open_documents
from nesso_tune.data.languages import language_of_item
from nesso_tune.data.peek import opened
from nesso_tune.data.tools import Unusable
from nesso_tune.errors import DataError
from nesso_tune.recipes.schema import Recipe, SFTRecipe
from nesso_tune.recipes.sections import Source

CHUNK = 1000  # rows encoded at a time
REMEDIES = {  # of the reason why most rows were dropped, when nothing is left
    "too_long": "raise data.sequence_len",
    "nothing_to_learn": "check data.roles_to_train",
    "below_min_score": "lower min_score",
}


def build_documents(folder: Path, recipe: Recipe, sources: Sequence[Source], chat: ChatTokenizer) -> dict[str, Any]:
    """Reads and encodes all sources into a folder.

    Returns:
        `languages`: their codes, by index; `report`: what was read, dropped and kept.

    Raises:
        DataError: if a file cannot be read, has another format than named, or nothing usable is in them.
    """
    writer = DocumentWriter(folder, 1 if isinstance(recipe, SFTRecipe) else 3)
    read, dropped, kept_by_source = 0, Counter[str](), []
    for position, source in enumerate(sources):
        reasons, count = Counter[str](), 0
        for entry, language, is_row in _entries(recipe, source, chat, reasons):
            count += is_row
            if entry is not None:
                writer.add(entry, language, position)
        read += count
        dropped += reasons
        kept_by_source.append((source.path, count, dict(reasons)))
    names = writer.close()
    documents = open_documents(folder, names, writer.parts)
    if len(documents) == 0:
        why = ", ".join(f"{reason}: {n}" for reason, n in dropped.most_common()) or "there are no rows"
        main = dropped.most_common(1)[0][0] if dropped else ""
        raise DataError(
            ", ".join(source.path for source in sources),
            f"none of {read:,} rows can be used ({why})",
            REMEDIES.get(main, "correct the data, or the columns and the format that the recipe names"),
        )
    everything = np.arange(len(documents))
    languages = {n: documents.counts(np.flatnonzero(documents.languages == i)) for i, n in enumerate(names)}
    by_source = []
    for position, (path, count, reasons_of) in enumerate(kept_by_source):
        kept = documents.counts(np.flatnonzero(documents.sources == position))
        by_source.append({"path": path, "rows_read": count, "dropped": reasons_of, **kept})
    counts = documents.counts(everything)
    report = {
        "rows_read": read,
        "rows_kept": counts["rows"],
        "dropped": dict(dropped.most_common()),
        "tokens": counts["tokens"],
        "supervised_tokens": counts["supervised_tokens"],
        "languages": dict(sorted(languages.items())),
        "sources": by_source,
    }
    return {"languages": names, "report": report}


def _entries(
    recipe: Recipe, source: Source, chat: ChatTokenizer, dropped: Counter[str]
) -> Iterator[tuple[Encoded | EncodedPair | None, str, int]]:
    """Every row of a source as (encoded or None, language, 1); drops are counted by reason."""
    fmt, rows = opened(source, recipe.method)
    convert = to_conversation if isinstance(recipe, SFTRecipe) else to_pair
    while chunk := list(islice(rows, CHUNK)):
        usable: list[Conversation | PreferencePair] = []
        places: list[str] = []
        for row, where in chunk:
            try:
                _check_score(row, source, where)
                item = convert(row, fmt, language_of(row, source), source.path)
                if source.language == AUTO and item.language == UNKNOWN_LANGUAGE:
                    item = replace(item, language=language_of_item(item))
                usable.append(item)
                places.append(where)
            except Unusable as reason:
                dropped[str(reason)] += 1
                yield None, "", 1
        for item, entry, where in zip(usable, _encode(recipe, chat, usable), places, strict=True):
            fitted = _fitted(entry, recipe, where, dropped)
            yield fitted, item.language, 1


def _check_score(row: dict[str, Any], source: Source, where: str) -> None:
    if source.min_score is None or source.score_field is None:
        return
    score = row.get(source.score_field)
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise DataError(where, f"`{source.score_field}` is no number", "correct it, or remove min_score")
    if not score >= source.min_score:  # NaN is below too
        raise Unusable("below_min_score")


def _encode(recipe: Recipe, chat: ChatTokenizer, items: list[Any]) -> Sequence[Encoded | EncodedPair]:
    if isinstance(recipe, SFTRecipe):
        return chat.encoder.conversations(items, recipe.data.roles_to_train, recipe.data.train_on_eos)
    return chat.encoder.pairs(items)


def _fitted(
    entry: Encoded | EncodedPair, recipe: Recipe, where: str, dropped: Counter[str]
) -> Encoded | EncodedPair | None:
    """The entry if it can be trained on, cut if the recipe says so, or None with the reason counted."""
    limit = recipe.data.sequence_len
    if isinstance(entry, EncodedPair):
        length = len(entry.prompt) + max(len(entry.chosen), len(entry.rejected))
    else:
        length = len(entry.ids)
        if not any(entry.trained[1:]):
            dropped["nothing_to_learn"] += 1
            return None
    if length <= limit:
        return entry
    if recipe.data.too_long == "error":
        raise DataError(where, f"has {length:,} tokens, more than data.sequence_len {limit:,}",
                        "raise sequence_len, or set data.too_long: drop")  # fmt: skip
    cut = None
    if isinstance(recipe, SFTRecipe) and isinstance(entry, Encoded) and recipe.data.too_long == "truncate":
        cut = entry.cut_to(limit, learn_end=recipe.data.train_on_eos == "last")
    if cut is None:
        dropped["too_long"] += 1
    return cut
