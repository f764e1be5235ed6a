"""Reading and encoding sources into documents on disk; rows that are not used are counted by reason, and listed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nesso_tune.chat.tokenizer import ChatTokenizer
from nesso_tune.data.contamination import read_contamination
from nesso_tune.data.documents import Documents, DocumentWriter, open_documents
from nesso_tune.data.filters import exact_duplicates, repeated
from nesso_tune.data.languages import load_detector
from nesso_tune.data.lengths import histograms
from nesso_tune.data.peek import reading_of
from nesso_tune.data.pool import worked
from nesso_tune.data.preferences import preference_figures
from nesso_tune.data.progress import Progress
from nesso_tune.data.read import Drop, Drops
from nesso_tune.data.sources import source_blocks, source_size
from nesso_tune.data.work import Work, Worked
from nesso_tune.errors import DataError
from nesso_tune.recipes.data import AUTO, Source
from nesso_tune.recipes.schema import Recipe, SFTRecipe

DROPPED, SIGNATURES = "dropped.jsonl", "signatures.bin"
REMEDIES = {  # of the reason why most rows were dropped, when nothing is left
    "too_long": "raise data.sequence_len",
    "nothing_to_learn": "check data.roles_to_train",
    "below_min_score": "lower min_score",
    "unknown_role": "say what the data's roles are here, e.g. roles: {utente: user, assistente: assistant}",
    "roles_out_of_order": "set data.clean.role_order: merge, or keep",
    "not_selected": "correct `where`",
}


def build_documents(folder: Path, recipe: Recipe, sources: Sequence[Source], chat: ChatTokenizer) -> dict[str, Any]:
    """Reads and encodes all sources into a folder.

    Returns:
        `documents`: what `open_documents` needs; `report`: what was read, dropped and kept.

    Raises:
        DataError: if a file cannot be read, has another format than named, or nothing usable is in them.
    """
    tally = _Tally(len(sources))
    writer = DocumentWriter(folder, 1 if isinstance(recipe, SFTRecipe) else 3)
    with (folder / DROPPED).open("w", encoding="utf-8", errors="backslashreplace") as listed:
        with (folder / SIGNATURES).open("wb") as signatures:
            for done in _worked(recipe, sources, chat):
                writer.write(done.chunk, done.source)
                signatures.write(done.signatures)
                tally.add(done)
                listed.writelines(_line(drop) for drop in done.dropped if drop.reason != "not_selected")
        note = writer.close()
        documents = open_documents(folder, **note)
        lost = list(repeated(documents, recipe.data.clean, folder / SIGNATURES))
        for entry, earlier, reason in lost:
            drop = Drop(documents.place(entry), reason, f"of {documents.place(earlier)}")
            tally.drop(int(documents.sources[entry]), drop)
            listed.write(_line(drop))
    (folder / SIGNATURES).unlink()
    kept = np.setdiff1d(np.arange(len(documents)), [entry for entry, _, _ in lost])
    if len(kept) == 0:
        raise _nothing(sources, tally)
    if lost:
        writer.keep(kept)
    return {"documents": note, "report": _report(documents, kept, sources, tally)}


def _worked(recipe: Recipe, sources: Sequence[Source], chat: ChatTokenizer) -> Iterator[Worked]:
    """What comes of each block of each source, in order; on a terminal, how far it is."""
    data = recipe.data
    asked = data.clean.decontaminate
    work = Work(
        [reading_of(source, recipe.method, data.clean) for source in sources],
        data, chat, None if asked is None else read_contamination(asked),
    )  # fmt: skip
    if recipe.method == "dpo" or any(source.language == AUTO for source in sources):
        load_detector()  # once, not in every process
    progress = Progress(sum(map(source_size, sources)))
    tasks = chain.from_iterable(((i, block) for block in source_blocks(s)) for i, s in enumerate(sources))
    for done in worked(work, tasks):
        progress.advance(done.rows, done.size)
        yield done
    progress.end()


class _Tally:
    """What is counted over all blocks."""

    def __init__(self, sources: int) -> None:
        self.rows = [0] * sources
        self.dropped = [Drops() for _ in range(sources)]
        self.marks: dict[str, dict[str, Any]] = {}

    def add(self, done: Worked) -> None:
        self.rows[done.source] += done.rows
        for drop in done.dropped:
            self.drop(done.source, drop)
        for mark, rows in done.marks.items():
            seen = self.marks.setdefault(mark, {"rows": 0, "example": done.marked[mark]})
            seen["rows"] += rows

    def drop(self, source: int, drop: Drop) -> None:
        self.dropped[source].add(drop)

    @property
    def all_dropped(self) -> Drops:
        whole = Drops()
        for drops in self.dropped:
            whole.absorb(drops)
        return whole


def _line(drop: Drop) -> str:
    return json.dumps(drop._asdict(), ensure_ascii=False) + "\n"


def _nothing(sources: Sequence[Source], tally: _Tally) -> DataError:
    dropped = tally.all_dropped
    why = "; ".join(f"{reason}: {n}, e.g. {dropped.examples[reason]}" for reason, n in dropped.most_common())
    main = dropped.most_common(1)[0][0] if dropped else ""
    return DataError(
        ", ".join(source.path for source in sources),
        f"none of {sum(tally.rows):,} rows can be used ({why or 'there are no rows'})",
        REMEDIES.get(main, "correct the data, or the columns and the format that the recipe names"),
    )


def _report(documents: Documents, kept: Any, sources: Sequence[Source], tally: _Tally) -> dict[str, Any]:
    dropped = tally.all_dropped
    languages, of = documents.languages[kept], documents.sources[kept]
    by_language = {
        name: documents.counts(kept[languages == i])
        for i, name in enumerate(documents.language_names)
        if (languages == i).any()
    }
    by_source = [
        {"path": source.path, **({"alias": source.alias} if source.alias else {}), "rows_read": tally.rows[i],
         "dropped": dict(tally.dropped[i].most_common()), **documents.counts(kept[of == i])}
        for i, source in enumerate(sources)
    ]  # fmt: skip
    counts = documents.counts(kept)
    report = {
        "rows_read": sum(tally.rows),
        "rows_kept": counts["rows"],
        "dropped": dict(dropped.most_common()),
        "examples_of_dropped": {reason: dropped.examples[reason] for reason, _ in dropped.most_common()},
        "tokens": counts["tokens"],
        "supervised_tokens": counts["supervised_tokens"],
        "languages": dict(sorted(by_language.items())),
        "sources": by_source,
        "duplicates": int((exact_duplicates(documents.identities[kept]) >= 0).sum()),
        "oddities": dict(sorted(tally.marks.items(), key=lambda mark: -mark[1]["rows"])),
        "lengths": histograms(documents, kept),
    }
    if documents.parts == 3:
        report["preferences"] = preference_figures(documents, kept, dropped, sum(tally.rows))
    return report
