"""Rows of a source as conversations, texts or pairs; what cannot be used is counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from nesso_tune.conversation import UNKNOWN_LANGUAGE, Conversation, PreferencePair
from nesso_tune.data.clean import clean
from nesso_tune.data.convert import Item, language_of, to_item
from nesso_tune.data.formats import DETECTED, ON_REQUEST, DataFormat, load_format, lookup
from nesso_tune.data.languages import language_of_item
from nesso_tune.data.readers import OwnReader
from nesso_tune.data.tools import Tool, Unusable
from nesso_tune.errors import DataError, first_line
from nesso_tune.recipes.data import AUTO, CleanSection, Rule, Source

Row = dict[str, Any]
OTHER = "other"  # in rules and shares: all that is not named


class Drop(NamedTuple):
    """A row that is not used: where it stands, the reason as a word, and what more there is to say."""

    where: str
    reason: str
    detail: str = ""


class Drops(Counter[str]):
    """Rows that are not used, counted by reason, with an example of each."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, str] = {}

    def note(self, why: Unusable, where: str) -> None:
        """Counts one row; the first of each reason is kept as its example."""
        self.add(Drop(where, str(why), why.detail))

    def add(self, drop: Drop) -> None:
        """The same."""
        self[drop.reason] += 1
        self.examples.setdefault(drop.reason, f"{drop.where}: {drop.detail}" if drop.detail else drop.where)

    def absorb(self, other: Drops) -> None:
        """Adds the drops of another source."""
        self.update(other)
        self.examples = other.examples | self.examples


@dataclass(frozen=True)
class Reading:
    """How the rows of one source are read.

    Attributes:
        source: which.
        fmt: its format, or a function of the user's.
        method: `sft` or `dpo`.
        clean: what is done to what is read.
        tools: on offer in rows that name none.
    """

    source: Source
    fmt: DataFormat | OwnReader
    method: str
    clean: CleanSection
    tools: tuple[Tool, ...] = ()

    def item(self, row: Row, where: str) -> Item:
        """What a row holds.

        Raises:
            Unusable: with the reason why it is not used.
            DataError: if its score is no number, or a reader of the user's fails.
        """
        source = self.source
        if source.where and not is_selected(row, source):
            raise Unusable("not_selected")
        if source.min_score is not None and not source.rules:
            check_score(row, source, source.min_score, where)
        item = self._converted(row, where)
        if source.language == AUTO and item.language == UNKNOWN_LANGUAGE:
            item = replace(item, language=language_of_item(item))
        if source.rules:
            self._follow(rule_of(source, item.language), row, where)
        if self.tools and not item.tools and isinstance(item, (Conversation, PreferencePair)):
            item = replace(item, tools=self.tools)
        return clean(item, self.clean)

    def _converted(self, row: Row, where: str) -> Item:
        fmt, source = self.fmt, self.source
        if isinstance(fmt, DataFormat):
            return to_item(row, fmt, self.method, language_of(row, source), source.path)
        try:
            made = fmt.function(dict(row))
        except (Exception, SystemExit) as error:  # whatever a user's function raises
            what = f"{fmt.name} raised {type(error).__name__}: {first_line(error)}"
            raise DataError(where, what, "correct the function, or let it return None for such rows") from None
        if made is None:
            raise Unusable("left_out_by_reader")
        if isinstance(made, (Conversation, PreferencePair)):
            return self._checked(made, row, where)
        if not isinstance(made, Mapping):
            what = f"{fmt.name} returned {type(made).__name__}"
            raise DataError(where, what, "return a dict of a known shape, a Conversation, a PreferencePair, or None")
        shape = next((shape for shape in _shapes() if shape.fits(made)), None)
        if shape is None or shape.pairs != (self.method == "dpo"):
            what = f"{fmt.name} returned a row with {', '.join(map(str, made)) or 'nothing'}"
            wanted = "prompt, chosen and rejected" if self.method == "dpo" else "messages, or prompt and response"
            raise DataError(where, what, f"return {wanted}")
        language = language_of(made, source)
        language = language if language != UNKNOWN_LANGUAGE else language_of(row, source)
        return to_item(made, shape, self.method, language, source.path)

    def _checked(self, made: Conversation | PreferencePair, row: Row, where: str) -> Item:
        """What a reader made itself, with everything in it that a row would be checked for."""
        kind, pair = type(made).__name__, isinstance(made, PreferencePair)
        if pair != (self.method == "dpo"):
            raise DataError(where, f"a {kind} is not for method {self.method}", "correct the reader")
        try:
            names = ("role", "content", "tool_calls", "train")
            turns = [{name: getattr(turn, name) for name in names} for turn in made.turns]
            turns = [{**turn, "tool_calls": list(turn["tool_calls"])} for turn in turns]
            tools = [dict(tool) for tool in made.tools]
        except (AttributeError, TypeError, ValueError) as error:
            what = f"a {kind} of this reader is not made of Messages and tools ({first_line(error)})"
            raise DataError(where, what, 'make it of Message("user", "…")') from None
        fmt = load_format("preference" if pair else "messages")
        plain: Row = {"messages": turns, "tools": tools}
        if pair:
            plain = {"prompt": turns[:-2], "chosen": turns[-2:-1], "rejected": turns[-1:], "tools": tools}
        known = isinstance(made.language, str) and made.language != UNKNOWN_LANGUAGE
        language = made.language if known else language_of(row, self.source)
        return to_item(plain, fmt, self.method, language, self.source.path)

    def _follow(self, rule: Rule | None, row: Row, where: str) -> None:
        """What the rule of a language asks of its rows."""
        if rule is not None and not rule.keep:
            raise Unusable("language_not_kept")
        least = self.source.min_score if rule is None or rule.min_score is None else rule.min_score
        if least is not None:
            check_score(row, self.source, least, where)


@lru_cache(maxsize=1)
def _shapes() -> list[DataFormat]:
    return [load_format(name) for name in (*DETECTED, *ON_REQUEST)]


def rule_of(source: Source, language: str) -> Rule | None:
    """The rule that a source has for a language: its own, or that of all others."""
    return source.rules.get(language) or source.rules.get(OTHER)


def is_selected(row: Mapping[str, Any], source: Source) -> bool:
    """Whether a row has the values that `where` asks for."""
    for column, wanted in source.where.items():
        value = lookup(row, (column,))
        values = wanted if isinstance(wanted, tuple) else (wanted,)
        if not any(isinstance(value, bool) == isinstance(v, bool) and value == v for v in values):
            return False
    return True


def check_score(row: Mapping[str, Any], source: Source, least: float, where: str) -> None:
    """Raises Unusable for a row with a lower score, DataError for a score that is no number."""
    assert source.score_field is not None
    score = lookup(row, (source.score_field,))
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise DataError(where, f"`{source.score_field}` is no number", "correct it, or remove min_score")
    if not score >= least:  # NaN is below too
        raise Unusable("below_min_score")


def usable(reading: Reading, rows: Iterator[tuple[Row, str]], dropped: Drops) -> Iterator[Item | None]:
    """What each row holds, or None for one that is not used, with the reason counted."""
    for row, where in rows:
        try:
            yield reading.item(row, where)
        except Unusable as why:
            dropped.note(why, where)
            yield None
