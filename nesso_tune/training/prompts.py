"""Prompts with known answers, taken from the data: what a model is asked while it trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nesso_tune.data.documents import Documents
from nesso_tune.data.packing import Rows


@dataclass(frozen=True)
class Prompt:
    """Token ids that a generation starts from, and the answers that the data has for it.

    Attributes:
        ids: up to and with the assistant's header.
        expected: the answer's ids, end token included (in preference data the chosen one).
        rejected: the rejected answer's ids; empty for conversations.
        language: code.
    """

    ids: list[int]
    expected: list[int]
    rejected: list[int]
    language: str


def choose_prompts(rows: Rows, count: int) -> list[Prompt]:
    """`count` prompts of the entries in `rows`, as evenly as possible over the languages, in a fixed order."""
    by_language: dict[str, list[int]] = defaultdict(list)
    for entry in np.unique(rows.entries):
        by_language[rows.documents.language(int(entry))].append(int(entry))
    chosen: list[Prompt] = []
    queues = [iter(entries) for _, entries in sorted(by_language.items())]
    while queues and len(chosen) < count:
        for queue in list(queues):
            entry = next(queue, None)
            if entry is None:
                queues.remove(queue)
            elif len(chosen) < count and (prompt := _prompt(rows.documents, entry)) is not None:
                chosen.append(prompt)
    return chosen


def _prompt(documents: Documents, entry: int) -> Prompt | None:
    """The last answer of a conversation, or a pair."""
    language = documents.language(entry)
    if documents.parts == 3:
        prompt, chosen, rejected = (documents.input_ids(entry, part).tolist() for part in range(3))
        return Prompt(prompt, chosen, rejected, language)
    ids, learned = documents.input_ids(entry).tolist(), documents.trained[documents.part(entry)]
    start, end = _last_run(learned.tolist())
    return Prompt(ids[:start], ids[start:end], [], language) if start > 0 else None


def _last_run(flags: Sequence[int]) -> tuple[int, int]:
    """Bounds of the last run of true flags; (0, 0) if there is none."""
    end = next((i + 1 for i in range(len(flags) - 1, -1, -1) if flags[i]), 0)
    start = end
    while start > 0 and flags[start - 1]:
        start -= 1
    return start, end
