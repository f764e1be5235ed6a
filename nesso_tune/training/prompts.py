"""Prompts with known answers, taken from the data: what a model is asked while it trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

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
        source: index of the source that it comes from.
        private: whether nothing of it may be shown.
    """

    ids: list[int]
    expected: list[int]
    rejected: list[int]
    language: str
    source: int = 0
    private: bool = False


def choose_prompts(rows: Rows, count: int) -> list[Prompt]:
    """`count` prompts of the entries in `rows`, as evenly as possible over the languages, in a fixed order.

    Those of a language are taken from its sources in turn.
    """
    by_language: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number in map(int, np.unique(rows.entries)):
        by_language[rows.documents.language(number)][int(rows.documents.sources[number])].append(number)
    chosen: list[Prompt] = []
    queues = [_in_turn([by_source[i] for i in sorted(by_source)]) for _, by_source in sorted(by_language.items())]
    while queues and len(chosen) < count:
        for queue in list(queues):
            entry = next(queue, None)
            if entry is None:
                queues.remove(queue)
            elif len(chosen) < count and (prompt := _prompt(rows.documents, entry)) is not None:
                chosen.append(prompt)
    return chosen


def _in_turn(queues: Sequence[Sequence[int]]) -> Iterator[int]:
    """The first of each, then the second of each, and so on."""
    rounds = zip_longest(*queues)
    return (entry for entries in rounds for entry in entries if entry is not None)


def _prompt(documents: Documents, entry: int) -> Prompt | None:
    """The last answer of a conversation, or a pair."""
    origin = documents.language(entry), int(documents.sources[entry]), documents.is_private(entry)
    if documents.parts == 3:
        prompt, chosen, rejected = (documents.input_ids(entry, part).tolist() for part in range(3))
        return Prompt(prompt, chosen, rejected, *origin)
    ids, learned = documents.input_ids(entry).tolist(), documents.trained[documents.part(entry)]
    start, end = _last_run(learned.tolist())
    return Prompt(ids[:start], ids[start:end], [], *origin) if start > 0 else None


def _last_run(flags: Sequence[int]) -> tuple[int, int]:
    """Bounds of the last run of true flags; (0, 0) if there is none."""
    end = next((i + 1 for i in range(len(flags) - 1, -1, -1) if flags[i]), 0)
    start = end
    while start > 0 and flags[start - 1]:
        start -= 1
    return start, end
