"""Guessing which columns hold what, from their names and what is in them, where no shipped format fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nesso_tune.data.formats import Row

PROMPTS = ("instruction", "prompt", "question", "query", "input", "user", "request", "domanda", "istruzione",
           "richiesta", "prompt_it", "text", "source", "context")  # fmt: skip
ANSWERS = ("output", "response", "answer", "completion", "reply", "assistant", "target", "risposta", "gpt", "solution",
           "soluzione", "text_output")  # fmt: skip
BETTER = ("chosen", "preferred", "better", "win", "winner", "accepted", "good", "scelta", "scelto", "preferita",
          "migliore", "response_chosen")  # fmt: skip
WORSE = ("rejected", "dispreferred", "worse", "lose", "loser", "refused", "bad", "rifiutata", "rifiutato", "scartata",
         "peggiore", "response_rejected")  # fmt: skip
ROLES = {
    "system": ("system", "sistema", "developer", "context"),
    "user": ("user", "human", "utente", "umano", "prompter", "customer", "client", "cliente", "person", "question"),
    "assistant": ("assistant", "assistente", "gpt", "bot", "model", "ai", "chatgpt", "agent", "answer", "chatbot"),
    "tool": ("tool", "observation", "function", "ipython", "strumento", "tool_response"),
}
Guess = tuple[str, dict[str, Any]]  # the shipped format it is nearest to, and the keys of a source that say the rest


def guess_fields(rows: Sequence[Row]) -> Guess | None:
    """The format that rows are nearest to and the columns that it needs to be told; None if nothing is near."""
    columns = Counter(column for row in rows for column in row)
    common = [column for column, n in columns.items() if n >= len(rows) / 2]
    return _messages(rows, common) or _preference(rows, common) or _instruction(rows, common)


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
        texts = {key for entry in entries for key, value in entry.items() if isinstance(value, str)}
        kinds = {key: {entry.get(key) for entry in entries} for key in sorted(texts)}
        role_key = next((key for key, said in kinds.items() if len(said) <= 8 and _roles(said) is not None), None)
        others = sorted(texts - {role_key}, key=lambda key: -sum(len(str(entry.get(key, ""))) for entry in entries))
        if role_key is None or not others:
            continue
        roles = _roles(kinds[role_key])
        return "messages", {
            "messages_field": column, "role_field": role_key, "content_field": others[0], "roles": roles,
        }  # fmt: skip
    return None


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _roles(said: set[Any]) -> dict[str, str] | None:
    """What each of these words is called here; None unless all are known and one is the assistant's."""
    words = [word for word in said if isinstance(word, str)]
    known = {word: role for word in words for role, names in ROLES.items() if word.strip().lower() in names}
    return known if len(known) == len(said) and "assistant" in known.values() else None


def _preference(rows: Sequence[Row], columns: Sequence[str]) -> Guess | None:
    better, worse = _named(columns, BETTER), _named(columns, WORSE)
    if better is None or worse is None:
        return None
    prompt = _named([column for column in columns if _is_text(rows, column)], PROMPTS)
    return "preference", {
        "chosen_field": better, "rejected_field": worse, **({"prompt_field": prompt} if prompt else {}),
    }  # fmt: skip


def _instruction(rows: Sequence[Row], columns: Sequence[str]) -> Guess | None:
    texts = [column for column in columns if _is_text(rows, column)]
    answer = _named(texts, ANSWERS)
    prompt = _named([column for column in texts if column != answer], PROMPTS)
    if answer is None or prompt is None:
        return None
    return "alpaca", {"prompt_field": prompt, "response_field": answer}


def _is_text(rows: Sequence[Row], column: str) -> bool:
    return sum(isinstance(row.get(column), str) for row in rows) >= len(rows) / 2
