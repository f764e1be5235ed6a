"""Remedies of data errors: commands for a shell, and what to do about rows that cannot be used."""

from __future__ import annotations

import shlex
from pathlib import Path

TO_JSON_LINES = "save it as JSON lines, in pandas: df.to_json('rows.jsonl', orient='records', lines=True)"
_SPECIAL = frozenset('"$`\\!')  # in double quotes of a shell
_OF_REASON = {  # by the most frequent reason for dropping rows, if none is left
    "too_long": "raise data.sequence_len",
    "nothing_to_learn": "check data.roles_to_train, and the flags of the messages (train, weight, …)",
    "below_min_score": "lower min_score",
    "unknown_role": "map the roles of the data, e.g. roles: {utente: user, assistente: assistant}",
    "roles_out_of_order": "set data.clean.role_order: merge to join turns of one role, or keep to leave the order",
    "not_selected": "correct `where`",
    "no_assistant_turn": "give rows with answers; if these are in a column of their own, set format: "
    "prompt_completion, prompt_field and response_field",
    "no_common_prompt": "give both answers the same turns before them",
    "content_part_not_text": "remove these parts, or convert them with a reader of your own (see docs/data.md)",
    "weight_not_0_or_1": "write 0 or 1: other weights are not supported",
    "chosen_equals_rejected": "give two different answers; if they differ in reasoning alone, set data.reasoning: keep",
}


def remedy_of(reason: str) -> str:
    """What to do if no row can be used, by the most frequent reason."""
    return _OF_REASON.get(reason, "correct the data, or the columns and the format that the recipe names")


def python(code: str) -> str:
    """A shell command that runs Python code."""
    return f"python -c {shlex.quote(code) if _SPECIAL & set(code) else f'{chr(34)}{code}{chr(34)}'}"


def quoted(file: Path | str) -> str:
    """A file name in a shell command."""
    return shlex.quote(str(file))
