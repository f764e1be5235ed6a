"""Rows of a source as conversations or preference pairs; what cannot be used is counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nesso_tune.conversation import UNKNOWN_LANGUAGE, Conversation, PreferencePair
from nesso_tune.data.convert import AUTO, language_of, to_conversation, to_pair
from nesso_tune.data.languages import language_of_item
from nesso_tune.data.peek import opened
from nesso_tune.data.tools import Unusable
from nesso_tune.errors import DataError
from nesso_tune.recipes.sections import Source

Item = Conversation | PreferencePair


class Drops(Counter[str]):
    """Rows that cannot be used, counted by reason, with an example of each."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, str] = {}

    def note(self, why: Unusable, where: str) -> None:
        """Counts one row; the first of each reason is kept as its example."""
        self[str(why)] += 1
        self.examples.setdefault(str(why), f"{where}: {why.detail}" if why.detail else where)

    def absorb(self, other: Drops) -> None:
        """Adds the drops of another source."""
        self.update(other)
        self.examples = other.examples | self.examples


def read_items(source: Source, method: str, dropped: Drops) -> Iterator[tuple[Item | None, str]]:
    """Every row of a source: the conversation (`sft`) or pair (`dpo`) that it holds, or None, and where it stands.

    Raises:
        DataError: if a file cannot be read, or is of another kind.
    """
    fmt, rows = opened(source, method)
    convert = to_conversation if method == "sft" else to_pair
    for row, where in rows:
        try:
            _check_score(row, source, where)
            item: Item = convert(row, fmt, language_of(row, source), source.path)
        except Unusable as why:
            dropped.note(why, where)
            yield None, where
            continue
        if source.language == AUTO and item.language == UNKNOWN_LANGUAGE:
            item = replace(item, language=language_of_item(item))
        yield item, where


def _check_score(row: dict[str, Any], source: Source, where: str) -> None:
    if source.min_score is None or source.score_field is None:
        return
    score = row.get(source.score_field)
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise DataError(where, f"`{source.score_field}` is no number", "correct it, or remove min_score")
    if not score >= source.min_score:  # NaN is below too
        raise Unusable("below_min_score")
