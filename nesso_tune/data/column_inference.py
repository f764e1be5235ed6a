"""Infers the format of records from the names and values of their columns, to suggest recipe keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nesso_tune.data.blocks import Record

# Column names, role names and labels from which a format is inferred, English and Italian; the best name first
_PROMPTS = ("instruction", "prompt", "question", "query", "request", "user", "input", "domanda", "istruzione",
            "richiesta", "utente", "quesito")  # fmt: skip
_INPUTS = ("context", "contesto", "input", "ingresso", "passage", "brano", "document", "documento", "testo", "text")
_ANSWERS = ("output", "response", "answer", "completion", "reply", "assistant", "target", "risposta", "gpt", "solution",
            "generation", "uscita", "assistente", "soluzione")  # fmt: skip
_CHOSEN = ("chosen", "preferred", "better", "win", "winner", "accepted", "scelta", "scelto", "preferita", "migliore",
           "response_chosen", "risposta_scelta", "risposta_preferita")  # fmt: skip
_REJECTED = ("rejected", "dispreferred", "worse", "lose", "loser", "refused", "rifiutata", "rifiutato", "scartata",
             "peggiore", "response_rejected", "risposta_rifiutata", "risposta_scartata")  # fmt: skip
_LABELS = ("label", "preference", "winner", "better", "choice", "vote", "etichetta", "preferenza", "scelta")
_ANSWER_SUFFIXES = (("1", "2"), ("a", "b"), ("0", "1"))  # of the columns of two answers
_LANGUAGES = ("lingua", "lang_code", "language_code", "locale", "idioma")
_CONTENTS = ("content", "value", "text", "testo", "message", "messaggio", "utterance", "contenuto", "body", "corpo")
_KEYS_OF_MESSAGES = ("role_field", "content_field")
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
        return _infer_inside(records, columns)
    language = _first_named(_text_columns(records, columns), _LANGUAGES)
    return InferredFormat(inferred.name, {**inferred.fields, **({"language_field": language} if language else {})})


def _infer_inside(records: Sequence[Record], columns: Sequence[str]) -> InferredFormat | None:
    """The format of the records in the only column of objects that has one, with dotted names."""
    found: list[InferredFormat] = []
    for column in columns:
        inner = [value for record in records if isinstance(value := record.get(column), Mapping)]
        if len(inner) == len(records) and (inferred := infer_format(inner)) is not None:
            found.append(InferredFormat(inferred.name, {
                key: _inside(column, value) if key.endswith(("_field", "_fields")) and key not in _KEYS_OF_MESSAGES
                else value for key, value in inferred.fields.items()
            }))  # fmt: skip
    return found[0] if len(found) == 1 else None


def _inside(column: str, names: Any) -> Any:
    return [f"{column}.{name}" for name in names] if isinstance(names, list) else f"{column}.{names}"


def _infer_messages(records: Sequence[Record], columns: Sequence[str]) -> InferredFormat | None:
    """A column of lists of objects, each with a role and a text. None if there are several: they may be answers."""
    found: list[InferredFormat] = []
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
        found.append(InferredFormat("messages", {
            "messages_field": column, "role_field": role_key, "content_field": content,
            "roles": _infer_roles(values[role_key]),
        }))  # fmt: skip
    return found[0] if len(found) == 1 else None


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
