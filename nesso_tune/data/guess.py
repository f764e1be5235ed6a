"""Guessing which columns hold what, from their names and what is in them, where no shipped format fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nesso_tune.data.formats import Row, load_format

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


def guess_fields(rows: Sequence[Row]) -> Guess | None:
    """The format that rows are nearest to and the columns that it needs to be told; None if nothing is near."""
    columns = Counter(column for row in rows for column in row)
    common = [column for column, n in columns.items() if n >= len(rows) / 2]
    found = _messages(rows, common) or _preference(rows, common)
    found = found or _choice(rows, common) or _instruction(rows, common)
    if found is None:
        return None
    language = _named([column for column in common if _is_text(rows, column)], LANGUAGES)
    return found[0], {**found[1], **({"language_field": language} if language else {})}


def used_columns(name: str, fields: Mapping[str, Any], rows: Sequence[Row]) -> set[str]:
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


def _messages(rows: Sequence[Row], columns: Sequence[str]) -> Guess | None:
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


def _preference(rows: Sequence[Row], columns: Sequence[str]) -> Guess | None:
    better, worse = _named(columns, BETTER), _named(columns, WORSE)
    if better is None or worse is None:
        return None
    prompt = _named([column for column in columns if _is_text(rows, column)], PROMPTS)
    return "preference", {
        "chosen_field": better, "rejected_field": worse, **({"prompt_field": prompt} if prompt else {}),
    }  # fmt: skip


def _choice(rows: Sequence[Row], columns: Sequence[str]) -> Guess | None:
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


def _instruction(rows: Sequence[Row], columns: Sequence[str]) -> Guess | None:
    texts = [column for column in columns if _is_text(rows, column)]
    answer = _named(texts, ANSWERS)
    prompt = _named([column for column in texts if column != answer], PROMPTS)
    if answer is None or prompt is None:
        return None
    further = _named([column for column in texts if column not in (answer, prompt)], INPUTS)
    return "alpaca", {
        "prompt_field": prompt, "response_field": answer, **({"input_field": further} if further else {}),
    }  # fmt: skip


def _is_text(rows: Sequence[Row], column: str) -> bool:
    return sum(isinstance(row.get(column), str) for row in rows) >= len(rows) / 2
