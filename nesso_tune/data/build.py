"""Reading and encoding sources into documents on disk; rows that cannot be used are counted by reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nesso_tune.chat.encoding import Encoded, EncodedPair
from nesso_tune.chat.tokenizer import ChatTokenizer
from nesso_tune.conversation import Conversation, PreferencePair
from nesso_tune.data.documents import DocumentWriter, open_documents
from nesso_tune.data.read import Drops, Item, read_items
from nesso_tune.data.tools import Unusable
from nesso_tune.errors import DataError
from nesso_tune.recipes.schema import Recipe, SFTRecipe
from nesso_tune.recipes.sections import Source

CHUNK = 1000  # rows encoded at a time
REMEDIES = {  # of the reason why most rows were dropped, when nothing is left
    "too_long": "raise data.sequence_len",
    "nothing_to_learn": "check data.roles_to_train",
    "below_min_score": "lower min_score",
    "unknown_role": "say what the data's roles are here, e.g. roles: {utente: user, assistente: assistant}",
}


def build_documents(folder: Path, recipe: Recipe, sources: Sequence[Source], chat: ChatTokenizer) -> dict[str, Any]:
    """Reads and encodes all sources into a folder.

    Returns:
        `languages`: their codes, by index; `report`: what was read, dropped and kept.

    Raises:
        DataError: if a file cannot be read, has another format than named, or nothing usable is in them.
    """
    writer = DocumentWriter(folder, 1 if isinstance(recipe, SFTRecipe) else 3)
    read, dropped, kept_by_source = 0, Drops(), []
    for position, source in enumerate(sources):
        reasons, count = Drops(), 0
        for entry, language, count in _entries(recipe, source, chat, reasons):
            if entry is not None:
                writer.add(entry, language, position, count)
        read += count
        dropped.absorb(reasons)
        kept_by_source.append((source.path, count, dict(reasons)))
    names = writer.close()
    documents = open_documents(folder, names, writer.parts)
    if len(documents) == 0:
        why = "; ".join(f"{reason}: {n}, e.g. {dropped.examples[reason]}" for reason, n in dropped.most_common())
        main = dropped.most_common(1)[0][0] if dropped else ""
        raise DataError(
            ", ".join(source.path for source in sources),
            f"none of {read:,} rows can be used ({why or 'there are no rows'})",
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
        "examples_of_dropped": {reason: dropped.examples[reason] for reason, _ in dropped.most_common()},
        "tokens": counts["tokens"],
        "supervised_tokens": counts["supervised_tokens"],
        "languages": dict(sorted(languages.items())),
        "sources": by_source,
    }
    return {"languages": names, "report": report}


def _entries(
    recipe: Recipe, source: Source, chat: ChatTokenizer, dropped: Drops
) -> Iterator[tuple[Encoded | EncodedPair | None, str, int]]:
    """Every row of a source as (encoded or None, language, its number from 1); drops are counted by reason."""
    rows = enumerate(read_items(source, recipe.method, dropped), 1)
    while chunk := list(islice(rows, CHUNK)):
        encoded = iter(_encode(recipe, chat, [item for _, (item, _) in chunk if item is not None]))
        for number, (item, where) in chunk:
            if item is None:
                yield None, "", number
            else:
                yield _fitted(next(encoded), recipe, where, dropped), item.language, number


def _encode(recipe: Recipe, chat: ChatTokenizer, items: list[Item]) -> Sequence[Encoded | EncodedPair]:
    if isinstance(recipe, SFTRecipe):
        conversations = [item for item in items if isinstance(item, Conversation)]
        return chat.encoder.conversations(conversations, recipe.data.roles_to_train, recipe.data.train_on_eos)
    return chat.encoder.pairs([item for item in items if isinstance(item, PreferencePair)])


def _fitted(entry: Encoded | EncodedPair, recipe: Recipe, where: str, dropped: Drops) -> Encoded | EncodedPair | None:
    """The entry if it can be trained on, cut if the recipe says so, or None with the reason counted."""
    limit = recipe.data.sequence_len
    if isinstance(entry, EncodedPair):
        if entry.chosen == entry.rejected:  # one of them a call as text, say
            dropped.note(Unusable("chosen_equals_rejected"), where)
            return None
        length = len(entry.prompt) + max(len(entry.chosen), len(entry.rejected))
    else:
        length = len(entry.ids)
        if not any(entry.trained[1:]):
            dropped.note(Unusable("nothing_to_learn"), where)
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
        dropped.note(Unusable("too_long", f"{length:,} tokens"), where)
    return cut
