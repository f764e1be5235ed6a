"""What is done to an item before it is encoded, as `data.clean` asks: characters, empty turns, the order of roles."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple

from nesso_tune.chat.render import CALL
from nesso_tune.conversation import UNKNOWN_LANGUAGE, Completion, Conversation, Message, PreferencePair
from nesso_tune.data.convert import Example, Tool, Unusable, is_empty, read_tool_file, record_language, to_example
from nesso_tune.data.files import Record
from nesso_tune.data.formats import (
    DETECTED_FORMATS,
    NAMED_ONLY_FORMATS,
    DataFormat,
    choose_format,
    describe_columns,
    infer_format,
    load_format,
    lookup,
    recognise_format,
)
from nesso_tune.data.languages import detect_example_language
from nesso_tune.data.sources import source_records
from nesso_tune.data.user_readers import UserReader, is_user_reader, load_user_reader
from nesso_tune.errors import DataError, first_line
from nesso_tune.recipes.builtin import local_path
from nesso_tune.recipes.sections import AUTO, CleanSection, Rule, Source

# Zero-width and control characters without tab, line feed and carriage return; soft hyphens, and marks of direction.
INVISIBLE_CHARACTERS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]"
    # the two joiners have a meaning inside emoji and in Arabic and Indian scripts, not beside a Latin letter or a space
    "|(?<![^\x00-\u024f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\u024f])"
)


def clean(item: Example, settings: CleanSection) -> Example:
    """The item, cleaned.

    Raises:
        Unusable: if a step asks for it to be dropped, or nothing is left of a text.
    """
    steps = _steps(settings)
    if isinstance(item, Completion):
        text = _through(item.text, steps)
        if not text.strip():
            raise Unusable("empty_text")
        return item if text is item.text else replace(item, text=text)
    if isinstance(item, Conversation):
        messages = _turns(item.messages, settings, steps)
        return item if messages is item.messages else replace(item, messages=messages)
    if isinstance(item, PreferencePair):
        return _pair(item, settings, steps)
    return item


def _pair(pair: PreferencePair, settings: CleanSection, steps: Sequence[Callable[[str], str]]) -> PreferencePair:
    """The prompt's turns with either answer after them."""
    one, other = (_turns((*pair.prompt, answer), settings, steps) for answer in (pair.chosen, pair.rejected))
    if len(one) < 2:
        raise Unusable("no_prompt")
    if (one[-1].content, one[-1].tool_calls) == (other[-1].content, other[-1].tool_calls):
        raise Unusable("chosen_equals_rejected")
    return replace(pair, prompt=one[:-1], chosen=one[-1], rejected=other[-1])


def _steps(settings: CleanSection) -> list[Callable[[str], str]]:
    steps: list[Callable[[str], str]] = []
    if settings.invisible == "remove":
        steps.append(partial(INVISIBLE_CHARACTERS.sub, ""))
    if settings.unicode == "nfc":
        steps.append(_composed)
    return steps


def _composed(text: str) -> str:
    return text if text.isascii() or unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _through(text: str, steps: Sequence[Callable[[str], str]]) -> str:
    for step in steps:
        text = step(text)
    return text


def _turns(
    messages: tuple[Message, ...], settings: CleanSection, steps: Sequence[Callable[[str], str]]
) -> tuple[Message, ...]:
    if steps:
        messages = tuple(replace(m, content=_through(m.content, steps)) for m in messages)
        if any(m.role == "assistant" and is_empty(m) for m in messages):
            raise Unusable("empty_answer")
    if settings.empty_turns != "keep" and any(is_empty(m) and m.role in ("user", "system") for m in messages):
        if settings.empty_turns == "drop":
            raise Unusable("empty_turn")
        messages = tuple(m for m in messages if not (is_empty(m) and m.role in ("user", "system")))
    fault = None if settings.role_order == "keep" else role_order_fault(messages)
    if fault is not None and settings.role_order == "merge":
        messages = merge_consecutive_turns(messages)
        fault = role_order_fault(messages)
    if fault is not None:
        raise Unusable("roles_out_of_order", fault)
    return messages


def role_order_fault(messages: Sequence[Message]) -> str | None:
    """What is wrong with the order of the roles, in words; None if nothing is."""
    before, speaker = "", None
    for message in messages:
        role = message.role
        if role == before and role != "tool":
            return f"{role} twice in a row"
        if role == "system" and before:
            return f"system after {before}"
        if role == "tool" and not _calls(speaker):
            return "a tool's result without a call"
        if role != "tool":
            speaker = message
        before = role
    return None


def _calls(message: Message | None) -> bool:
    if message is None or message.role != "assistant":
        return False
    return bool(message.tool_calls) or CALL.search(message.content) is not None


def merge_consecutive_turns(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Neighbours of one role put together, a blank line between their texts; results of tools stay apart."""
    out: list[Message] = []
    for message in messages:
        last = out[-1] if out else None
        if last is None or last.role != message.role or message.role == "tool" or last.train != message.train:
            out.append(message)
            continue
        text = "\n\n".join(m.content for m in (last, message) if m.content)
        out[-1] = replace(last, content=text, tool_calls=(*last.tool_calls, *message.tool_calls))
    return tuple(out)


OTHER_KEY = "other"  # in rules and shares: all that is not named


class Drop(NamedTuple):
    """A row that is not used: where it stands, the reason as a word, and what more there is to say."""

    where: str
    reason: str
    detail: str = ""


class DropCounter(Counter[str]):
    """Rows that are not used, counted by reason, with an example of each."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, str] = {}

    def add_unusable(self, why: Unusable, where: str) -> None:
        """Counts one row; the first of each reason is kept as its example."""
        self.add(Drop(where, str(why), why.detail))

    def add(self, drop: Drop) -> None:
        """The same."""
        self[drop.reason] += 1
        self.examples.setdefault(drop.reason, f"{drop.where}: {drop.detail}" if drop.detail else drop.where)

    def merge(self, other: DropCounter) -> None:
        """Adds the drops of another source."""
        self.update(other)
        self.examples = other.examples | self.examples


@dataclass(frozen=True)
class RecordReader:
    """How the rows of one source are read.

    Attributes:
        source: which.
        fmt: its format, or a function of the user's.
        method: `sft` or `dpo`.
        clean: what is done to what is read.
        tools: on offer in rows that name none.
    """

    source: Source
    fmt: DataFormat | UserReader
    method: str
    clean: CleanSection
    tools: tuple[Tool, ...] = ()

    def read(self, row: Record, where: str) -> Example:
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
            item = replace(item, language=detect_example_language(item))
        if source.rules:
            self._follow(language_rule(source, item.language), row, where)
        if self.tools and not item.tools and isinstance(item, (Conversation, PreferencePair)):
            item = replace(item, tools=self.tools)
        return clean(item, self.clean)

    def _converted(self, row: Record, where: str) -> Example:
        fmt, source = self.fmt, self.source
        if isinstance(fmt, DataFormat):
            return to_example(row, fmt, self.method, record_language(row, source), source.path)
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
        language = record_language(made, source)
        language = language if language != UNKNOWN_LANGUAGE else record_language(row, source)
        return to_example(made, shape, self.method, language, source.path)

    def _checked(self, made: Conversation | PreferencePair, row: Record, where: str) -> Example:
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
        plain: Record = {"messages": turns, "tools": tools}
        if pair:
            plain = {"prompt": turns[:-2], "chosen": turns[-2:-1], "rejected": turns[-1:], "tools": tools}
        known = isinstance(made.language, str) and made.language != UNKNOWN_LANGUAGE
        language = made.language if known else record_language(row, self.source)
        return to_example(plain, fmt, self.method, language, self.source.path)

    def _follow(self, rule: Rule | None, row: Record, where: str) -> None:
        """What the rule of a language asks of its rows."""
        if rule is not None and not rule.keep:
            raise Unusable("language_not_kept")
        least = self.source.min_score if rule is None or rule.min_score is None else rule.min_score
        if least is not None:
            check_score(row, self.source, least, where)


@lru_cache(maxsize=1)
def _shapes() -> list[DataFormat]:
    return [load_format(name) for name in (*DETECTED_FORMATS, *NAMED_ONLY_FORMATS)]


def language_rule(source: Source, language: str) -> Rule | None:
    """The rule that a source has for a language: its own, or that of all others."""
    return source.rules.get(language) or source.rules.get(OTHER_KEY)


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


def read_examples(
    reading: RecordReader, rows: Iterator[tuple[Record, str]], dropped: DropCounter
) -> Iterator[Example | None]:
    """What each row holds, or None for one that is not used, with the reason counted."""
    for row, where in rows:
        try:
            yield reading.read(row, where)
        except Unusable as why:
            dropped.add_unusable(why, where)
            yield None


PEEK = 50  # rows


def make_record_reader(source: Source, method: str, clean: CleanSection = CleanSection()) -> RecordReader:  # noqa: B008 - frozen
    """How the rows of a source are to be read, by the first of them that it selects.

    Args:
        source: which.
        method: `sft` wants conversations, `dpo` pairs.
        clean: what is done to what is read.

    Raises:
        DataError: if there are no rows, or they are not of this kind.
    """
    rows = (row for row, _ in source_records(source))
    first = list(islice((row for row in rows if not source.where or is_selected(row, source)), PEEK))
    tools = read_tool_file(local_path(source.tools_file)) if source.tools_file is not None else ()
    return RecordReader(source, _format(source, method, first), method, clean, tools)


def _format(source: Source, method: str, rows: Sequence[Record]) -> DataFormat | UserReader:
    if not rows and source.where and next(source_records(source), None) is not None:
        asked = ", ".join(f"{column}: {value}" for column, value in source.where.items())
        raise DataError(source.path, f"no row has what `where` asks for ({asked})", "correct it, or remove the source")
    if not rows:
        raise DataError(source.path, "holds no rows", "give a file with rows, or remove the source")
    if is_user_reader(source.format):
        return load_user_reader(source.format, source.reads)
    if source.format == "auto" and recognise_format(source, rows) is None and (guess := infer_format(rows)) is not None:
        name, keys = guess
        said = ", ".join(f"{key}: {value}" for key, value in {"format": name, **keys}.items())
        raise DataError(
            source.path, f"its format is not recognised (its columns are {describe_columns(rows)})",
            f"name its columns, it seems {said.replace(chr(39), '')}",
        )  # fmt: skip
    fmt, field = choose_format(source, rows), source.language_field
    if field is not None and not any(field in row for row in rows):
        columns = sorted({column for row in rows for column in row})
        raise DataError(source.path, f"no column `{field}` (language_field)", f"its columns are {', '.join(columns)}")
    _check_kind(source, method, fmt, rows)
    return fmt


def _check_kind(source: Source, method: str, fmt: DataFormat, rows: Sequence[Record]) -> None:
    wants_pairs = method == "dpo"
    # the dialogue before two answers is no conversation to learn, unless someone names its column on purpose
    before_answers = fmt.kind == "conversation" and source.messages_field is None and _has_pairs(rows)
    if fmt.pairs == wants_pairs and (wants_pairs or not before_answers):
        return
    if wants_pairs:
        raise DataError(
            source.path, "holds conversations, but DPO needs a chosen and a rejected answer",
            "use preference data, or method: sft",
        )  # fmt: skip
    raise DataError(
        source.path, "holds preference pairs, but SFT learns from conversations", "use method: dpo, or another source"
    )


def _has_pairs(rows: Sequence[Record]) -> bool:
    return sum("chosen" in row and "rejected" in row for row in rows) > len(rows) / 2
