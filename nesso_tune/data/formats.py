"""Data formats as small mappings: which column holds what, and what the data calls the roles."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import Field

from nesso_tune.data.files import Record
from nesso_tune.errors import DataError, RecipeError, closest, shortened
from nesso_tune.recipes.load import find_spec, read_spec
from nesso_tune.recipes.sections import NonEmpty, Plain, Role, Section, Source

Names = Annotated[tuple[NonEmpty, ...], Field(strict=False)]
FIELDS = ("messages_field", "role_field", "content_field", "system_field", "tools_field", "prompt_field",
          "input_field", "response_field", "text_field", "chosen_field", "rejected_field")  # fmt: skip
LISTED = ("choice_fields", "label_fields", "labels")
DETECTED_FORMATS = ("preference", "messages", "sharegpt", "alpaca")  # in this order: the most telling columns first
NAMED_ONLY_FORMATS = {  # formats that are never guessed: their mistakes would be silent
    "completion": "plain texts are learned whole and without turns",
    "pretokenized": "token ids are taken as they are",
}
TEMPLATE_COLUMN = re.compile(r"\{([^{}]+)\}")
MOST_COLUMNS = 30  # that a message lists
MISSING = object()


class DataFormat(Section):
    """A mapping from columns to what is learned from a row.

    Each `*_field` lists the names looked for, in order; a dotted name goes into objects and lists (`answers.0.text`).
    """

    kind: Literal["conversation", "instruction", "completion", "pretokenized", "preference", "choice"]
    messages_field: Names = ()
    role_field: Names = ()
    content_field: Names = ()
    speakers: Annotated[tuple[Role, ...], Field(strict=False)] = ()
    """Who speaks, in turn, where messages are plain texts without roles; lists of such texts are laid end to end."""
    system_field: Names = ()
    tools_field: Names = ()
    prompt_field: Names = ()
    prompt_template: NonEmpty | None = None
    """The prompt as a text with columns in it, `{context} {question}`, instead of prompt_field."""
    input_field: Names = ()
    response_field: Names = ()
    text_field: Names = ()
    ids_field: Names = ()
    labels_field: Names = ()
    mask_field: Names = ()
    chosen_field: Names = ()
    rejected_field: Names = ()
    choice_fields: Names = ()
    """Columns of the two answers of which one is better."""
    label_fields: Names = ()
    """Columns that say which: a label, or the votes of several people."""
    labels: Annotated[tuple[Plain, ...], Field(strict=False)] = ()
    """What they say for the first answer, and what for the second; anything else is no vote."""
    roles: dict[str, Role] = Field(default_factory=dict)
    call_roles: Names = ()
    """Roles whose whole content is a call of a tool, as JSON."""

    @property
    def pairs(self) -> bool:
        """Whether its rows are preference pairs."""
        return self.kind in ("preference", "choice")

    def adapted(self, source: Source) -> DataFormat:
        """This format with the columns and roles that a source names instead."""
        named: dict[str, Any] = {f: (getattr(source, f),) for f in FIELDS if getattr(source, f) is not None}
        named |= {f: getattr(source, f) for f in LISTED if getattr(source, f)}
        if source.prompt_field is not None:
            named["prompt_template"] = None
        if source.roles is not None:
            named["roles"] = {**self.roles, **source.roles}
        return self.model_copy(update=named)

    def role_of(self, said: Any) -> Role | None:
        """What a role of the data is called here; capitals do not count where the data's own word is not listed."""
        if not isinstance(said, str):
            return None
        return self.roles.get(said) or self.roles.get(said.strip().lower())

    @property
    def role_keys(self) -> Names:
        """Keys of a message that hold its role."""
        return self.role_field or ("role",)

    @property
    def content_keys(self) -> Names:
        """Keys of a message that hold its text."""
        return self.content_field or ("content",)

    @property
    def lacks(self) -> tuple[str, str] | None:
        """The first key that its kind needs and that names no column, or not as many as it must, and what is wrong."""
        prompt = [] if self.prompt_template is not None else ["prompt_field"]
        blanked = [key for key in ("role_field", "content_field") if key in self.model_fields_set]
        needed = {
            "conversation": ["messages_field", *([] if self.speakers else blanked)],
            "instruction": [*prompt, "response_field"],
            "completion": ["text_field"],
            "pretokenized": ["ids_field", "labels_field or mask_field"],
            "preference": ["chosen_field", "rejected_field", *blanked],
            "choice": [*prompt, "choice_fields", "label_fields"],
        }[self.kind]
        for key in needed:
            if not any(getattr(self, one) for one in key.split(" or ")):
                return key, f"names no column in {key}, which kind {self.kind} needs"
        if self.kind == "choice" and len(self.choice_fields) != 2:
            return "choice_fields", f"names {len(self.choice_fields)} columns in choice_fields, where two answers stand"
        return None

    @property
    def required(self) -> tuple[Names, ...]:
        """The columns without which no row has this format."""
        asked = tuple((n,) for n in TEMPLATE_COLUMN.findall(self.prompt_template or ""))
        prompt = (self.prompt_field,) if self.prompt_template is None else asked
        return {
            "conversation": (self.messages_field,),
            "instruction": (*prompt, self.response_field),
            "completion": (self.text_field,),
            "pretokenized": (self.ids_field, (*self.labels_field, *self.mask_field)),
            "preference": (self.chosen_field, self.rejected_field),
            "choice": (*((name,) for name in self.choice_fields), self.label_fields),
        }[self.kind]

    def fits(self, row: Record) -> bool:
        """Whether the row's columns look like this format."""
        if not all(find_column(row, names) is not None for names in self.required):
            return False
        if self.kind == "conversation":
            messages = lookup(row, self.messages_field)
            if isinstance(messages, str) and messages.lstrip().startswith("["):
                with suppress(ValueError, RecursionError):
                    messages = json.loads(messages)
            if not isinstance(messages, list) or not messages:
                return False
            if self.speakers:
                return isinstance(messages[0], (str, list))
            first = messages[0]
            return isinstance(first, Mapping) and None not in (
                find_column(first, self.role_keys),
                find_column(first, self.content_keys),
            )
        if self.kind in ("instruction", "completion"):
            return all(isinstance(lookup(row, names), str) for names in self.required)
        return True


def find_column(row: Record, names: Sequence[str]) -> str | None:
    """The first of `names` that the row has a value for, else the first that it has; None if it has none."""
    there = [name for name in names if name in row or ("." in name and _inside(row, name) is not MISSING)]
    return next((name for name in there if lookup(row, (name,)) is not None), there[0] if there else None)


def lookup(row: Record, names: Sequence[str]) -> Any:
    """The value of the first of `names` that the row has one for; None if it has none."""
    for name in names:
        value = row[name] if name in row else _inside(row, name) if "." in name else MISSING
        if value is not MISSING and value is not None:
            return value
    return None


def _inside(row: Any, name: str) -> Any:
    for part in name.split("."):
        if isinstance(row, Mapping) and part in row:
            row = row[part]
        elif isinstance(row, list) and part.isdecimal() and int(part) < len(row):
            row = row[int(part)]
        else:
            return MISSING
    return row


def load_format(name: str) -> DataFormat:
    """A shipped format by name, or a file of that kind.

    Raises:
        RecipeError: if there is none, or if the file is wrong.
    """
    path = find_spec("formats", name, "format", also=("auto",))
    return read_spec(path, DataFormat)[0]


def recognise_format(source: Source, rows: Sequence[Record], names: Sequence[str] = DETECTED_FORMATS) -> str | None:
    """The shipped format that most of a source's first rows fit; None if none of them fits any."""
    formats = [load_format(name).adapted(source) for name in names]
    counted = [(sum(fmt.fits(row) for row in rows), -i) for i, fmt in enumerate(formats)]
    best, position = max(counted)
    return names[-position] if best else None


def choose_format(source: Source, rows: Sequence[Record]) -> DataFormat:
    """The format of a source: the named one, or the shipped one that most of its first rows fit.

    Raises:
        DataError: if the rows have not the columns of the named format, or fit none.
    """
    named = None if source.format == "auto" else load_format(source.format).adapted(source)
    if named is not None and named.lacks is not None:
        raise _incomplete(source.format, *named.lacks)
    found = recognise_format(source, rows, DETECTED_FORMATS if source.format == "auto" else (source.format,))
    if found is None:
        raise _not_of_format(source, rows)
    fmt = load_format(found).adapted(source)
    if fmt.kind == "choice" and len(fmt.labels) != 2:
        said = sorted({str(row[name]) for row in rows for name in fmt.label_fields if name in row})
        raise DataError(
            source.path, f"which of its two answers is better is not said: {', '.join(fmt.label_fields)} "
            f"{'is' if len(fmt.label_fields) == 1 else 'are'} {', '.join(said[:5])}",
            "say what stands for the first answer and what for the second, e.g. labels: [1, 2]",
        )  # fmt: skip
    return fmt


def _incomplete(name: str, key: str, what: str) -> RecipeError:
    """What is said of a format that names too few columns: with the line of its file where the key stands there."""
    path = find_spec("formats", name, "format")
    _, document = read_spec(path, DataFormat)
    where = next((document.where((one,)) for one in key.split(" or ") if one in document.value), f"{path}:1")
    return RecipeError(where, f"the format {what}", f"name the column there, e.g. {key.split(' or ')[0]}: [NAME]"
                       + (", or in the source" if key in (*FIELDS, *LISTED) else ""))  # fmt: skip


def _not_of_format(source: Source, rows: Sequence[Record]) -> DataError:
    """What rows lack for the format that a source names, and what they look like instead."""
    has = f"its columns are {describe_columns(rows)}"
    if source.format == "auto":
        asked = recognise_format(source, rows, tuple(NAMED_ONLY_FORMATS))
        remedy = "name the columns (messages_field, or prompt_field and response_field, …) or a format"
        if asked is not None:
            remedy = f"set format: {asked} if that is what they are ({NAMED_ONLY_FORMATS[asked]}), or {remedy}"
        return DataError(source.path, f"its format is not recognised ({has})", remedy)
    likes = recognise_format(Source(path=source.path), rows)
    if likes not in (None, source.format):
        what = f"its rows are not of format {source.format} ({has})"
        pairs = " (preference pairs: for method: dpo)" if likes == "preference" else ""

        return DataError(source.path, what, f"they look like format {likes}{pairs}: set format: {likes}, or auto")
    columns = sorted({column for row in rows for column in row})
    fmt = load_format(source.format).adapted(source)
    for missing in (names for names in fmt.required if not any(find_column(row, names) for row in rows)):
        guess = closest(missing[0], columns)
        return DataError(
            source.path, f"no column `{'` or `'.join(missing)}` for format {source.format}; {has}",
            f"did you mean `{guess}`?" if guess else "name the column in the recipe, or set format: auto",
        )  # fmt: skip
    inside, remedy = "both filled with text", "check the rows, or name other columns"
    if fmt.kind == "completion":
        inside = "filled with text"
    if fmt.kind == "conversation":
        inside = f"messages with {'/'.join(fmt.role_keys)} and {'/'.join(fmt.content_keys)} in them"
        remedy = "set role_field and content_field to the keys of a message"
    return DataError(source.path, f"its rows have the columns of format {source.format}, but not {inside}", remedy)


def describe_columns(rows: Sequence[Record]) -> str:
    """The columns of rows, and the keys of the objects that lists among them hold."""
    shown, columns = [], sorted({column for row in rows for column in row})
    for column in columns[:MOST_COLUMNS]:
        value = next((row[column] for row in rows if row.get(column)), None)
        first = value[0] if isinstance(value, list) and value else None
        keys = (
            f" (a list of objects with {', '.join(shortened(str(key)) for key in islice(first, MOST_COLUMNS))})"
            if isinstance(first, Mapping)
            else ""
        )
        shown.append(f"{shortened(column)}{keys}")
    left = len(columns) - len(shown)
    return ", ".join([*shown, *([f"and {left:,} more"] if left else [])]) or "none"


PROMPTS = ("instruction", "prompt", "question", "query", "request", "user", "input", "domanda", "istruzione",
           "richiesta", "utente", "quesito")  # fmt: skip
INPUTS = ("context", "contesto", "input", "ingresso", "passage", "brano", "document", "documento", "testo", "text")
ANSWERS = ("output", "response", "answer", "completion", "reply", "assistant", "target", "risposta", "gpt", "solution",
           "uscita", "assistente", "soluzione")  # fmt: skip
BETTER = ("chosen", "preferred", "better", "win", "winner", "accepted", "scelta", "scelto", "preferita", "migliore",
          "response_chosen", "risposta_scelta", "risposta_preferita")  # fmt: skip
WORSE = ("rejected", "dispreferred", "worse", "lose", "loser", "refused", "rifiutata", "rifiutato", "scartata",
         "peggiore", "response_rejected", "risposta_rifiutata", "risposta_scartata")  # fmt: skip
LABELS = ("label", "preference", "winner", "better", "choice", "vote", "etichetta", "preferenza", "scelta")
SIDES = (("1", "2"), ("a", "b"), ("0", "1"))  # how the names of two answers end
LANGUAGES = ("lingua", "lang_code", "language_code", "locale", "idioma")
CONTENTS = ("content", "value", "text", "testo", "message", "messaggio", "utterance", "contenuto", "body", "corpo")
ROLES = {
    "system": ("system", "sistema", "developer"),
    "user": ("user", "human", "utente", "umano", "prompter", "customer", "client", "cliente", "question"),
    "assistant": ("assistant", "assistente", "gpt", "bot", "model", "ai", "chatgpt", "agent", "answer", "chatbot"),
    "tool": ("tool", "observation", "function", "ipython", "strumento", "tool_response"),
}
Guess = tuple[str, dict[str, Any]]  # the shipped format it is nearest to, and the keys of a source that say the rest


def infer_format(rows: Sequence[Record]) -> Guess | None:
    """The format that rows are nearest to and the columns that it needs to be told; None if nothing is near."""
    columns = Counter(column for row in rows for column in row)
    common = [column for column, n in columns.items() if n >= len(rows) / 2]
    found = _messages(rows, common) or _preference(rows, common)
    found = found or _choice(rows, common) or _instruction(rows, common)
    if found is None:
        return None
    language = _named([column for column in common if _is_text(rows, column)], LANGUAGES)
    return found[0], {**found[1], **({"language_field": language} if language else {})}


def used_columns(name: str, fields: Mapping[str, Any], rows: Sequence[Record]) -> set[str]:
    """Columns that a format reads, with what a source names instead."""
    fmt = load_format(name)
    named = {value for key, value in fields.items() if key.endswith("_field")}
    named |= {value for key in ("choice_fields", "label_fields") for value in fields.get(key, ())}
    there = {column for row in rows for column in row}
    own = {column for key in type(fmt).model_fields if key.endswith("_field") for column in getattr(fmt, key)}
    return there & (own | named | {"language", "lang"})


def _named(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column that has one of these names, the first name first; capitals do not count."""
    by_name = {column.lower(): column for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)


def _messages(rows: Sequence[Record], columns: Sequence[str]) -> Guess | None:
    """A column of lists of objects that have a role and a text."""
    for column in columns:
        entries = [entry for row in rows for entry in _list(row.get(column)) if isinstance(entry, Mapping)]
        if len(entries) < len(rows):
            continue
        texts = [key for key in {key: None for entry in entries for key in entry} if _is_text(entries, key)]
        said = {key: {entry[key] for entry in entries if isinstance(entry.get(key), str)} for key in texts}
        role_key = next((key for key in texts if len(said[key]) <= 8 and _roles(said[key]) is not None), None)
        others = [key for key in texts if key != role_key]
        content = _named(others, CONTENTS) or (others[0] if len(others) == 1 else None)
        if role_key is None or content is None:
            continue
        roles = _roles(said[role_key])
        return "messages", {
            "messages_field": column, "role_field": role_key, "content_field": content, "roles": roles,
        }  # fmt: skip
    return None


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _roles(said: set[str]) -> dict[str, str] | None:
    """What each of these words is called here; None unless all are known, and both sides of a dialogue among them."""
    known = {word: role for word in sorted(said) for role, names in ROLES.items() if word.strip().lower() in names}
    return known if len(known) == len(said) and {"user", "assistant"} <= set(known.values()) else None


def _preference(rows: Sequence[Record], columns: Sequence[str]) -> Guess | None:
    better, worse = _named(columns, BETTER), _named(columns, WORSE)
    if better is None or worse is None:
        return None
    prompt = _named([column for column in columns if _is_text(rows, column)], PROMPTS)
    return "preference", {
        "chosen_field": better, "rejected_field": worse, **({"prompt_field": prompt} if prompt else {}),
    }  # fmt: skip


def _choice(rows: Sequence[Record], columns: Sequence[str]) -> Guess | None:
    """Two answers whose names differ in their ends alone, and a column that says which one is better."""
    texts = {column.lower(): column for column in columns if _is_text(rows, column)}
    label, prompt = _named(columns, LABELS), _named(list(texts.values()), PROMPTS)
    if label is None or prompt is None:
        return None
    for first, second in SIDES:
        for name, column in texts.items():
            other = f"{name[: -len(first)]}{second}"
            if not name.endswith(first) or other not in texts:
                continue
            if (labels := _meanings([row.get(label) for row in rows], (name, other))) is not None:
                fields = {"prompt_field": prompt, "choice_fields": [column, texts[other]], "label_fields": [label]}
                return "choice", {**fields, "labels": labels}
    return None


def _meanings(said: Sequence[Any], names: tuple[str, str]) -> list[Any] | None:
    """What labels say for the first answer and for the second; None if that can be read in two ways."""
    values = {str(value).lower(): value for value in said if value is not None}
    pairs = [pair for pair in (*SIDES, names) if set(pair) <= set(values)]
    return [values[end] for end in pairs[0]] if len(pairs) == 1 else None


def _instruction(rows: Sequence[Record], columns: Sequence[str]) -> Guess | None:
    texts = [column for column in columns if _is_text(rows, column)]
    answer = _named(texts, ANSWERS)
    prompt = _named([column for column in texts if column != answer], PROMPTS)
    if answer is None or prompt is None:
        return None
    further = _named([column for column in texts if column not in (answer, prompt)], INPUTS)
    return "alpaca", {
        "prompt_field": prompt, "response_field": answer, **({"input_field": further} if further else {}),
    }  # fmt: skip


def _is_text(rows: Sequence[Record], column: str) -> bool:
    return sum(isinstance(row.get(column), str) for row in rows) >= len(rows) / 2
