"""How far the preparation of data is: rows a second and the time that is left, on stderr."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from nesso_tune.chat.encoding import Encoded, EncodedPair
from nesso_tune.chat.tokenizer import ChatTokenizer
from nesso_tune.conversation import Completion, Conversation, PreferencePair, Tokenized
from nesso_tune.data.anomalies import find_anomalies, length_histograms, preference_statistics
from nesso_tune.data.convert import Example, Unusable
from nesso_tune.data.files import Block
from nesso_tune.data.filtering import (
    EvaluationTexts,
    find_duplicates,
    find_exact_duplicates,
    minhash_signature,
    read_evaluation_texts,
)
from nesso_tune.data.languages import has_language_mismatch, load_language_model
from nesso_tune.data.record_reader import Drop, DropCounter, RecordReader, make_record_reader
from nesso_tune.data.sources import source_blocks, source_size
from nesso_tune.data.token_store import Chunk, Documents, DocumentWriter, identity_of, open_documents
from nesso_tune.data.workers import worked
from nesso_tune.errors import DataError
from nesso_tune.logs import print_notes, print_text
from nesso_tune.recipes.schema import Recipe, SFTRecipe
from nesso_tune.recipes.sections import AUTO, DPOData, SFTData, Source

FIRST = 2.0  # seconds before anything is said
EVERY = {True: 0.5, False: 30.0}  # seconds between two lines, in a terminal and elsewhere


class Progress:
    """Counts rows and bytes of the sources; speaks only where it takes a while."""

    def __init__(self, total: int) -> None:
        """`total`: bytes of all sources."""
        self._total, self._started = max(1, total), monotonic()
        self._rows = self._done = 0
        self._terminal = sys.stderr.isatty()
        self._next = self._started + FIRST
        self._spoken = False

    def advance(self, rows: int, size: int) -> None:
        """Adds a block."""
        self._rows, self._done = self._rows + rows, min(self._total, self._done + size)
        now = monotonic()
        if now >= self._next:
            self._next = now + EVERY[self._terminal]
            self._say(now - self._started)

    def end(self) -> None:
        """Leaves the line, if there is one."""
        if self._spoken and self._terminal:
            print_notes("")

    def _say(self, seconds: float) -> None:
        share = self._done / self._total
        left = seconds * (1 - share) / max(share, 1e-9)
        clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
        line = f"{self._rows:,} rows, {self._rows / seconds:,.0f} a second, {share:.0%}, {clock} left"
        start, end = ("\r", "") if self._terminal else ("", "\n")
        print_text(f"{start}{line:<70}{end}", error=True, keep="\r\n")
        self._spoken = True


@dataclass
class Worked:
    """What came of a block.

    Attributes:
        source: index of its source.
        rows: how many it had.
        size: bytes of the source that it stands for.
        chunk: the entries.
        dropped: rows that became none.
        marks: oddities of the entries, counted by name, each with the place of the first.
        signatures: MinHash of each entry, laid end to end, where near duplicates are looked for.
    """

    source: int
    rows: int
    size: int
    chunk: Chunk
    dropped: list[Drop] = field(default_factory=list)
    marks: Counter[str] = field(default_factory=Counter)
    marked: dict[str, str] = field(default_factory=dict)
    signatures: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True)
class Work:
    """Makes encoded entries of the blocks of all sources of a recipe.

    Attributes:
        readings: how each source is read.
        data: the recipe's section.
        chat: the tokenizer.
        contamination: evaluation texts that no row may contain.
    """

    readings: Sequence[RecordReader]
    data: SFTData | DPOData
    chat: ChatTokenizer
    contamination: EvaluationTexts | None = None

    def __call__(self, task: tuple[int, Block]) -> Worked:
        """The entries of a block of the source with this index.

        Raises:
            DataError: for a row that is none, and where the recipe does not let rows be dropped.
        """
        source, block = task
        done = Worked(source, 0, block.size, Chunk(block.prefix))
        items: list[tuple[Example, int]] = []
        for row, number in block.numbered_records():
            done.rows += 1
            where = f"{block.prefix}{number}"
            try:
                item = self.readings[source].read(row, where)
                if isinstance(item, Tokenized) and not 0 <= min(item.input_ids) <= max(item.input_ids) < self.chat.size:
                    raise Unusable("id_outside_vocabulary", f"the tokenizer has {self.chat.size:,} ids")
                if self.contamination is not None and (of := self.contamination.find_in(item)) is not None:
                    raise Unusable("contains_evaluation_text", of)
                items.append((item, number))
            except Unusable as why:
                done.dropped.append(Drop(where, str(why), why.detail))
        for (item, number), entry in zip(items, self._encoded([item for item, _ in items]), strict=True):
            where = f"{block.prefix}{number}"
            try:
                self._add(item, self._fitted(entry, where), number, where, done)
            except Unusable as why:
                done.dropped.append(Drop(where, str(why), why.detail))
        return done

    def _add(self, item: Example, entry: Encoded | EncodedPair, number: int, where: str, done: Worked) -> None:
        mismatched = isinstance(item, PreferencePair) and has_language_mismatch(item)
        done.chunk.add(entry, item.language, number, identity_of(item), mismatched)
        for mark in find_anomalies(item, self.chat.template.control_tokens):
            done.marks[mark] += 1
            done.marked.setdefault(mark, where)
        if self.data.clean.near_duplicates is not None:
            done.signatures += minhash_signature(item).tobytes()

    def _encoded(self, items: list[Example]) -> list[Encoded | EncodedPair]:
        """Every item encoded, in order; those of one kind together."""
        encoder, data = self.chat.encoder, self.data
        if not isinstance(data, SFTData):
            return list(encoder.pairs([item for item in items if isinstance(item, PreferencePair)]))
        talks = [item for item in items if isinstance(item, Conversation)]
        texts = [item.text for item in items if isinstance(item, Completion)]
        encoded = {
            Conversation: iter(encoder.conversations(talks, data.roles_to_train, data.train_on_eos)),
            Completion: iter(encoder.texts(texts, learn_end=data.train_on_eos != "none")),
        }
        return [_as_it_is(item) if isinstance(item, Tokenized) else next(encoded[type(item)]) for item in items]

    def _fitted(self, entry: Encoded | EncodedPair, where: str) -> Encoded | EncodedPair:
        """The entry if it can be trained on, cut if the recipe says so. Raises Unusable with the reason if not."""
        limit = self.data.sequence_len
        if isinstance(entry, EncodedPair):
            if entry.chosen == entry.rejected:  # one of them a call as text, say
                raise Unusable("chosen_equals_rejected")
            sizes = {name: len(entry.prompt) + len(getattr(entry, name)) for name in ("chosen", "rejected")}
            length = max(sizes.values())
            detail = f"{' and '.join(name for name, size in sizes.items() if size > limit)}, {length:,} tokens"
        else:
            length, detail = len(entry.ids), f"{len(entry.ids):,} tokens"
            if not any(islice(entry.trained, 1, None)):
                raise Unusable("nothing_to_learn")
        if length <= limit:
            return entry
        if self.data.too_long == "error":
            raise DataError(where, f"has {length:,} tokens, more than data.sequence_len {limit:,}",
                            "raise sequence_len, or set data.too_long: drop")  # fmt: skip
        if isinstance(self.data, SFTData) and isinstance(entry, Encoded) and self.data.too_long == "truncate":
            cut = entry.cut_to(limit, learn_end=self.data.train_on_eos == "last")
            if cut is not None:
                return cut
        raise Unusable("too_long", detail)


def _as_it_is(item: Tokenized) -> Encoded:
    return Encoded(list(item.input_ids), [label >= 0 for label in item.labels])


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
        lost = list(find_duplicates(documents, recipe.data.clean, folder / SIGNATURES))
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
        [make_record_reader(source, recipe.method, data.clean) for source in sources],
        data, chat, None if asked is None else read_evaluation_texts(asked),
    )  # fmt: skip
    if recipe.method == "dpo" or any(source.language == AUTO for source in sources):
        load_language_model()  # once, not in every process
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
        self.dropped = [DropCounter() for _ in range(sources)]
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
    def all_dropped(self) -> DropCounter:
        whole = DropCounter()
        for drops in self.dropped:
            whole.merge(drops)
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
        "duplicates": int((find_exact_duplicates(documents.identities[kept]) >= 0).sum()),
        "oddities": dict(sorted(tally.marks.items(), key=lambda mark: -mark[1]["rows"])),
        "lengths": length_histograms(documents, kept),
    }
    if documents.parts == 3:
        report["preferences"] = preference_statistics(documents, kept, dropped, sum(tally.rows))
    return report
