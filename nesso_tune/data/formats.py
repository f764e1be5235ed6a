"""Data formats: which columns hold the conversation, texts or answers of a record, and what its roles are called.

A format is chosen by name, or recognised by the columns of the first records. If no shipped format matches, the columns
are inferred from their names and values, to suggest recipe keys.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from nesso_tune.data.files import Record
from nesso_tune.errors import DataError, RecipeError, closest, shortened
from nesso_tune.recipes.load import find_spec, read_spec
from nesso_tune.recipes.sections import NonEmpty, Plain, Role, Section, Source

Names = Annotated[tuple[NonEmpty, ...], Field(strict=False)]

TEMPLATE_COLUMN = re.compile(r"\{([^{}]+)\}")
DETECTED_FORMATS = ("preference", "messages", "sharegpt", "alpaca")  # the most specific columns first
EXPLICIT_FORMATS = {  # never detected, since a wrong guess would go unnoticed
    "completion": "trains on whole texts, without turns",
    "pretokenized": "uses token ids as they are",
}

# Keys of a source that replace those of a format: with one column, and with a list
_COLUMN_KEYS = ("messages_field", "role_field", "content_field", "system_field", "tools_field", "prompt_field",
                "input_field", "response_field", "text_field", "chosen_field", "rejected_field")  # fmt: skip
_LIST_KEYS = ("choice_fields", "label_fields", "labels")
_MAX_SHOWN = 30  # columns, and keys of objects, in a message
_MISSING = object()


class DataFormat(Section):
    """A mapping from columns to the parts of an example.

    Each `*_field` lists column names in order of precedence; a dotted name descends into objects and lists
    (`answers.0.text`).
    """

    kind: Literal["conversation", "instruction", "completion", "pretokenized", "preference", "choice"]
    messages_field: Names = ()
    role_field: Names = ()
    content_field: Names = ()
    speakers: Annotated[tuple[Role, ...], Field(strict=False)] = ()
    """Roles in turn, for messages that are plain texts without roles; lists of such texts are concatenated."""
    system_field: Names = ()
    tools_field: Names = ()
    prompt_field: Names = ()
    prompt_template: NonEmpty | None = None
    """The prompt as a text with columns in braces, `{context} {question}`, instead of prompt_field."""
    input_field: Names = ()
    response_field: Names = ()
    text_field: Names = ()
    ids_field: Names = ()
    labels_field: Names = ()
    mask_field: Names = ()
    chosen_field: Names = ()
    rejected_field: Names = ()
    choice_fields: Names = ()
    """Columns of the two answers, one of which is preferred."""
    label_fields: Names = ()
    """Columns of the preference: one label, or the votes of several annotators."""
    labels: Annotated[tuple[Plain, ...], Field(strict=False)] = ()
    """The label of the first answer and that of the second; any other value is ignored."""
    roles: dict[str, Role] = Field(default_factory=dict)
    call_roles: Names = ()
    """Roles whose content is a tool call as JSON."""

    @property
    def has_pairs(self) -> bool:
        """Whether its records are preference pairs."""
        return self.kind in ("preference", "choice")

    def adapted(self, source: Source) -> DataFormat:
        """This format with the columns and roles that a source sets."""
        update: dict[str, Any] = {
            key: (getattr(source, key),) for key in _COLUMN_KEYS if getattr(source, key) is not None
        }
        update |= {key: getattr(source, key) for key in _LIST_KEYS if getattr(source, key)}
        if source.prompt_field is not None:
            update["prompt_template"] = None
        if source.roles is not None:
            update["roles"] = {**self.roles, **source.roles}
        return self.model_copy(update=update)

    def role_of(self, name: Any) -> Role | None:
        """The role that the data calls `name`: an exact match, or a match of the lower-case name; None if unknown."""
        if not isinstance(name, str):
            return None
        return self.roles.get(name) or self.roles.get(name.strip().lower())

    @property
    def role_keys(self) -> Names:
        """Keys of a message that hold its role."""
        return self.role_field or ("role",)

    @property
    def content_keys(self) -> Names:
        """Keys of a message that hold its text."""
        return self.content_field or ("content",)

    @property
    def fault(self) -> tuple[str, str] | None:
        """The first key with too few columns for its kind, and what is wrong; None if the format is complete."""
        prompt = [] if self.prompt_template is not None else ["prompt_field"]
        set_keys = [key for key in ("role_field", "content_field") if key in self.model_fields_set]
        needed = {
            "conversation": ["messages_field", *([] if self.speakers else set_keys)],
            "instruction": [*prompt, "response_field"],
            "completion": ["text_field"],
            "pretokenized": ["ids_field", "labels_field or mask_field"],
            "preference": ["chosen_field", "rejected_field", *set_keys],
            "choice": [*prompt, "choice_fields", "label_fields"],
        }[self.kind]
        for key in needed:
            if not any(getattr(self, name) for name in key.split(" or ")):
                return key, f"names no column in {key}, which kind {self.kind} requires"
        if self.kind == "choice" and len(self.choice_fields) != 2:
            return "choice_fields", f"names {len(self.choice_fields)} columns in choice_fields instead of two"
        return None

    @property
    def required_columns(self) -> tuple[Names, ...]:
        """The alternative names of each column that every record of this format has."""
        template = tuple((name,) for name in TEMPLATE_COLUMN.findall(self.prompt_template or ""))
        prompt = (self.prompt_field,) if self.prompt_template is None else template
        return {
            "conversation": (self.messages_field,),
            "instruction": (*prompt, self.response_field),
            "completion": (self.text_field,),
            "pretokenized": (self.ids_field, (*self.labels_field, *self.mask_field)),
            "preference": (self.chosen_field, self.rejected_field),
            "choice": (*((name,) for name in self.choice_fields), self.label_fields),
        }[self.kind]

    def matches(self, record: Record) -> bool:
        """Whether the columns of a record have the names and types of this format."""
        if not all(find_column(record, names) is not None for names in self.required_columns):
            return False
        if self.kind == "conversation":
            return self._matches_messages(lookup(record, self.messages_field))
        if self.kind in ("instruction", "completion"):
            return all(isinstance(lookup(record, names), str) for names in self.required_columns)
        return True

    def _matches_messages(self, messages: Any) -> bool:
        if isinstance(messages, str) and messages.lstrip().startswith("["):
            with suppress(ValueError, RecursionError):
                messages = json.loads(messages)
        if not isinstance(messages, list) or not messages:
            return False
        first = messages[0]
        if self.speakers:
            return isinstance(first, (str, list))
        keys = (self.role_keys, self.content_keys)
        return isinstance(first, Mapping) and all(find_column(first, names) is not None for names in keys)


def load_format(name: str) -> DataFormat:
    """A shipped format by name, or the format in a YAML file.

    Raises:
        RecipeError: if there is none, or the file is invalid.
    """
    path = find_spec("formats", name, "format", also=("auto",))
    status = path.stat()
    return _read_format(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)  # the detection of a format tries all shipped ones on every source
def _read_format(path: Path, modified_ns: int, size: int) -> DataFormat:
    return read_spec(path, DataFormat)[0]


def choose_format(source: Source, records: Sequence[Record]) -> DataFormat:
    """The format of a source: the one it names, or the shipped one that most of its first records match.

    Raises:
        DataError: if the records do not match the named format, or no shipped one.
    """
    named = None if source.format == "auto" else load_format(source.format).adapted(source)
    if named is not None and named.fault is not None:
        raise _incomplete(source.format, *named.fault)
    name = recognise_format(source, records, DETECTED_FORMATS if source.format == "auto" else (source.format,))
    if name is None:
        raise _not_matching(source, records)
    data_format = load_format(name).adapted(source)
    if data_format.kind == "choice" and len(data_format.labels) != 2:
        columns = data_format.label_fields
        values = sorted({str(record[column]) for record in records for column in columns if column in record})
        raise DataError(
            source.path, f"the recipe does not say which answer each label prefers: {', '.join(columns)} "
            f"{'is' if len(columns) == 1 else 'are'} {', '.join(values[:5])}",
            "give the label of the first answer and that of the second, e.g. labels: [1, 2]",
        )  # fmt: skip
    return data_format


def recognise_format(source: Source, records: Sequence[Record], names: Sequence[str] = DETECTED_FORMATS) -> str | None:
    """The format among `names` that most records match; None if no record matches any."""
    formats = [load_format(name).adapted(source) for name in names]
    matches = [(sum(data_format.matches(record) for record in records), -i) for i, data_format in enumerate(formats)]
    count, position = max(matches)
    return names[-position] if count else None


def find_column(record: Record, names: Sequence[str]) -> str | None:
    """The first of `names` that is not null in the record, else the first that it has; None if it has none."""
    present = [name for name in names if name in record or ("." in name and _descend(record, name) is not _MISSING)]
    return next((name for name in present if lookup(record, (name,)) is not None), present[0] if present else None)


def lookup(record: Record, names: Sequence[str]) -> Any:
    """The value of the first of `names` that is not null in the record; None if there is none."""
    for name in names:
        value = record[name] if name in record else _descend(record, name) if "." in name else _MISSING
        if value is not _MISSING and value is not None:
            return value
    return None


def _descend(value: Any, name: str) -> Any:
    for key in name.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return _MISSING
    return value


def used_columns(name: str, fields: Mapping[str, Any], records: Sequence[Record]) -> set[str]:
    """The columns of records that a format reads, with those that a source's `fields` add."""
    data_format = load_format(name)
    added = {value for key, value in fields.items() if key.endswith("_field")}
    added |= {value for key in ("choice_fields", "label_fields") for value in fields.get(key, ())}
    keys = [key for key in type(data_format).model_fields if key.endswith("_field")]
    own = {column for key in keys for column in getattr(data_format, key)}
    return {column for record in records for column in record} & (own | added | {"language", "lang"})


def describe_columns(records: Sequence[Record]) -> str:
    """The columns of records, and the keys of objects in lists, as a text."""
    shown, columns = [], sorted({column for record in records for column in record})
    for column in columns[:_MAX_SHOWN]:
        value = next((record[column] for record in records if record.get(column)), None)
        first = value[0] if isinstance(value, list) and value else None
        keys = ""
        if isinstance(first, Mapping):
            names = ", ".join(shortened(str(key)) for key in islice(first, _MAX_SHOWN))
            keys = f" (a list of objects with {names})"
        shown.append(f"{shortened(column)}{keys}")
    left = len(columns) - len(shown)
    return ", ".join([*shown, *([f"and {left:,} more"] if left else [])]) or "none"


def _incomplete(name: str, key: str, fault: str) -> RecipeError:
    """The error for a format that names too few columns, with the line of its file."""
    path = find_spec("formats", name, "format")
    _, document = read_spec(path, DataFormat)
    where = next((document.where((one,)) for one in key.split(" or ") if one in document.value), f"{path}:1")
    in_source = ", or in the source" if key in (*_COLUMN_KEYS, *_LIST_KEYS) else ""
    remedy = f"name the column there, e.g. {key.split(' or ')[0]}: [NAME]{in_source}"
    return RecipeError(where, f"the format {fault}", remedy)


def _not_matching(source: Source, records: Sequence[Record]) -> DataError:
    """The error for records that do not match the format of their source."""
    columns = f"its columns are {describe_columns(records)}"
    if source.format == "auto":
        explicit = recognise_format(source, records, tuple(EXPLICIT_FORMATS))
        remedy = "name the columns (messages_field, or prompt_field and response_field, …) or a format"
        if explicit is not None:
            remedy = f"set format: {explicit} if they are of this kind ({EXPLICIT_FORMATS[explicit]}), or {remedy}"
        return DataError(source.path, f"its format is not recognised ({columns})", remedy)
    likely = recognise_format(Source(path=source.path), records)
    if likely not in (None, source.format):
        what = f"its rows are not of format {source.format} ({columns})"
        pairs = " (preference pairs, for method: dpo)" if likely == "preference" else ""
        return DataError(source.path, what, f"they look like format {likely}{pairs}: set format: {likely}, or auto")
    data_format = load_format(source.format).adapted(source)
    for names in data_format.required_columns:
        if not any(find_column(record, names) for record in records):
            guess = closest(names[0], sorted({column for record in records for column in record}))
            return DataError(
                source.path, f"no column `{'` or `'.join(names)}` for format {source.format}; {columns}",
                f"did you mean `{guess}`?" if guess else "name the column in the recipe, or set format: auto",
            )  # fmt: skip
    fault, remedy = "they are not both text", "check the rows, or name other columns"
    if data_format.kind == "completion":
        fault = "they are not text"
    if data_format.kind == "conversation":
        keys = f"{'/'.join(data_format.role_keys)} and {'/'.join(data_format.content_keys)}"
        fault, remedy = f"not messages with {keys}", "set role_field and content_field to the keys of a message"
    return DataError(source.path, f"its rows have the columns of format {source.format}, but {fault}", remedy)


# Column names, role names and labels from which a format is inferred, English and Italian; the best name first
_PROMPTS = ("instruction", "prompt", "question", "query", "request", "user", "input", "domanda", "istruzione",
            "richiesta", "utente", "quesito")  # fmt: skip
_INPUTS = ("context", "contesto", "input", "ingresso", "passage", "brano", "document", "documento", "testo", "text")
_ANSWERS = ("output", "response", "answer", "completion", "reply", "assistant", "target", "risposta", "gpt", "solution",
            "uscita", "assistente", "soluzione")  # fmt: skip
_CHOSEN = ("chosen", "preferred", "better", "win", "winner", "accepted", "scelta", "scelto", "preferita", "migliore",
           "response_chosen", "risposta_scelta", "risposta_preferita")  # fmt: skip
_REJECTED = ("rejected", "dispreferred", "worse", "lose", "loser", "refused", "rifiutata", "rifiutato", "scartata",
             "peggiore", "response_rejected", "risposta_rifiutata", "risposta_scartata")  # fmt: skip
_LABELS = ("label", "preference", "winner", "better", "choice", "vote", "etichetta", "preferenza", "scelta")
_ANSWER_SUFFIXES = (("1", "2"), ("a", "b"), ("0", "1"))  # of the columns of two answers
_LANGUAGES = ("lingua", "lang_code", "language_code", "locale", "idioma")
_CONTENTS = ("content", "value", "text", "testo", "message", "messaggio", "utterance", "contenuto", "body", "corpo")
_ROLES = {
    "system": ("system", "sistema", "developer"),
    "user": ("user", "human", "utente", "umano", "prompter", "customer", "client", "cliente", "question"),
    "assistant": ("assistant", "assistente", "gpt", "bot", "model", "ai", "chatgpt", "agent", "answer", "chatbot"),
    "tool": ("tool", "observation", "function", "ipython", "strumento", "tool_response"),
}


class InferredFormat(NamedTuple):
    """The shipped format that records are closest to, and the keys of a source that adapt it to their columns."""

    name: str
    fields: dict[str, Any]


def infer_format(records: Sequence[Record]) -> InferredFormat | None:
    """Infers the format of records from the names and values of their columns; None if no format is close."""
    counts = Counter(column for record in records for column in record)
    columns = [column for column, count in counts.items() if count >= len(records) / 2]
    inferred = _infer_messages(records, columns) or _infer_preference(records, columns)
    inferred = inferred or _infer_choice(records, columns) or _infer_instruction(records, columns)
    if inferred is None:
        return None
    language = _first_named(_text_columns(records, columns), _LANGUAGES)
    return InferredFormat(inferred.name, {**inferred.fields, **({"language_field": language} if language else {})})


def _infer_messages(records: Sequence[Record], columns: Sequence[str]) -> InferredFormat | None:
    """A column of lists of objects, each with a role and a text."""
    for column in columns:
        lists = [value for record in records if isinstance(value := record.get(column), list)]
        messages = [message for value in lists for message in value if isinstance(message, Mapping)]
        if len(messages) < len(records):
            continue
        texts = _text_columns(messages, list({key: None for message in messages for key in message}))
        values = {key: {m[key] for m in messages if isinstance(m.get(key), str)} for key in texts}
        role_key = next((key for key in texts if len(values[key]) <= 8 and _infer_roles(values[key]) is not None), None)
        others = [key for key in texts if key != role_key]
        content = _first_named(others, _CONTENTS) or (others[0] if len(others) == 1 else None)
        if role_key is None or content is None:
            continue
        return InferredFormat("messages", {
            "messages_field": column, "role_field": role_key, "content_field": content,
            "roles": _infer_roles(values[role_key]),
        })  # fmt: skip
    return None


def _infer_roles(names: set[str]) -> dict[str, str] | None:
    """The role of each name; None unless all names are known, and include both a user and an assistant."""
    roles = {name: role for name in sorted(names) for role, known in _ROLES.items() if name.strip().lower() in known}
    return roles if len(roles) == len(names) and {"user", "assistant"} <= set(roles.values()) else None


def _infer_preference(records: Sequence[Record], columns: Sequence[str]) -> InferredFormat | None:
    chosen, rejected = _first_named(columns, _CHOSEN), _first_named(columns, _REJECTED)
    if chosen is None or rejected is None:
        return None
    prompt = _first_named(_text_columns(records, columns), _PROMPTS)
    fields = {"chosen_field": chosen, "rejected_field": rejected, **({"prompt_field": prompt} if prompt else {})}
    return InferredFormat("preference", fields)


def _infer_choice(records: Sequence[Record], columns: Sequence[str]) -> InferredFormat | None:
    """Two answers in columns that differ in their suffix alone, and a column with the label of the preferred one."""
    texts = {column.lower(): column for column in _text_columns(records, columns)}
    label, prompt = _first_named(columns, _LABELS), _first_named(list(texts.values()), _PROMPTS)
    if label is None or prompt is None:
        return None
    for first, second in _ANSWER_SUFFIXES:
        for name, column in texts.items():
            other = f"{name[: -len(first)]}{second}"
            if not name.endswith(first) or other not in texts:
                continue
            if (labels := _infer_labels([record.get(label) for record in records], (name, other))) is not None:
                fields = {"prompt_field": prompt, "choice_fields": [column, texts[other]], "label_fields": [label]}
                return InferredFormat("choice", {**fields, "labels": labels})
    return None


def _infer_labels(labels: Sequence[Any], names: tuple[str, str]) -> list[Any] | None:
    """The labels of the first and of the second answer; None if they are ambiguous."""
    values = {str(label).lower(): label for label in labels if label is not None}
    pairs = [pair for pair in (*_ANSWER_SUFFIXES, names) if set(pair) <= set(values)]
    return [values[label] for label in pairs[0]] if len(pairs) == 1 else None


def _infer_instruction(records: Sequence[Record], columns: Sequence[str]) -> InferredFormat | None:
    texts = _text_columns(records, columns)
    answer = _first_named(texts, _ANSWERS)
    prompt = _first_named([column for column in texts if column != answer], _PROMPTS)
    if answer is None or prompt is None:
        return None
    further = _first_named([column for column in texts if column not in (answer, prompt)], _INPUTS)
    fields = {"prompt_field": prompt, "response_field": answer, **({"input_field": further} if further else {})}
    return InferredFormat("alpaca", fields)


def _first_named(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column with the first of `names` that occurs, ignoring case."""
    by_name = {column.lower(): column for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)


def _text_columns(records: Sequence[Record], columns: Sequence[str]) -> list[str]:
    """The columns that are text in at least half of the records."""
    half = len(records) / 2
    return [column for column in columns if sum(isinstance(r.get(column), str) for r in records) >= half]
