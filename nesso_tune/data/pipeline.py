"""The encoding pipeline: reads all sources in blocks, encodes them in parallel, and writes the token store."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from nesso_tune.data.report import Anomaly, CorpusReport, SourceReport
from nesso_tune.data.sources import source_blocks, source_size
from nesso_tune.data.token_store import Chunk, Documents, DocumentWriter, IntArray, identity_of, open_documents
from nesso_tune.data.workers import parallel_map
from nesso_tune.errors import DataError
from nesso_tune.logs import logger, print_text
from nesso_tune.recipes.schema import Recipe, SFTRecipe
from nesso_tune.recipes.sections import AUTO, DPOData, SFTData, Source

DROPPED = "dropped.jsonl"
_SIGNATURES = "signatures.bin"
_QUIET_SECONDS = 2.0  # before the first progress line
_INTERVAL_SECONDS = {True: 0.5, False: 30.0}  # between progress lines, on a terminal and elsewhere
_REMEDIES = {  # by the most frequent reason for dropping rows, if none is left
    "too_long": "raise data.sequence_len",
    "nothing_to_learn": "check data.roles_to_train",
    "below_min_score": "lower min_score",
    "unknown_role": "map the roles of the data, e.g. roles: {utente: user, assistente: assistant}",
    "roles_out_of_order": "set data.clean.role_order: merge, or keep",
    "not_selected": "correct `where`",
}


def build_documents(
    folder: Path, recipe: Recipe, sources: Sequence[Source], chat: ChatTokenizer
) -> tuple[dict[str, Any], CorpusReport]:
    """Reads and encodes all sources into a folder.

    Returns:
        The arguments of `open_documents` as plain data, and the report.

    Raises:
        DataError: if a file cannot be read or does not have the given format, or no usable row is left.
    """
    counters = _Counters(len(sources))
    writer = DocumentWriter(folder, 1 if isinstance(recipe, SFTRecipe) else 3)
    with (folder / DROPPED).open("w", encoding="utf-8", errors="backslashreplace") as dropped:
        with (folder / _SIGNATURES).open("wb") as signatures:
            for block in _encoded_blocks(recipe, sources, chat):
                writer.write(block.chunk, block.source)
                signatures.write(block.signatures)
                counters.add(block)
                dropped.writelines(_json_line(drop) for drop in block.dropped if drop.reason != "not_selected")
        store = writer.close()
        documents = open_documents(folder, **store)
        duplicates = list(find_duplicates(documents, recipe.data.clean, folder / _SIGNATURES))
        for record, earlier, reason in duplicates:
            drop = Drop(documents.location(record), reason, f"of {documents.location(earlier)}")
            counters.drop(int(documents.sources[record]), drop)
            dropped.write(_json_line(drop))
    (folder / _SIGNATURES).unlink()
    kept = np.setdiff1d(np.arange(len(documents)), [record for record, _, _ in duplicates])
    if len(kept) == 0:
        raise _no_usable_rows(sources, counters)
    if duplicates:
        writer.keep(kept)
    return store, _corpus_report(documents, kept, sources, counters)


def _encoded_blocks(recipe: Recipe, sources: Sequence[Source], chat: ChatTokenizer) -> Iterator[EncodedBlock]:
    """The encoded blocks of all sources, in order; prints the progress."""
    data = recipe.data
    decontaminate = data.clean.decontaminate
    encoder = BlockEncoder(
        [make_record_reader(source, recipe.method, data.clean) for source in sources],
        data, chat, None if decontaminate is None else read_evaluation_texts(decontaminate),
    )  # fmt: skip
    if recipe.method == "dpo" or any(source.language == AUTO for source in sources):
        load_language_model()  # before the worker processes are forked, so that they share it
    progress = Progress(sum(map(source_size, sources)))
    tasks = chain.from_iterable(((i, block) for block in source_blocks(s)) for i, s in enumerate(sources))
    for block in parallel_map(encoder, tasks):
        progress.advance(block.rows, block.size)
        yield block
    progress.end()


@dataclass
class EncodedBlock:
    """The result of encoding one block of a source.

    Attributes:
        source: index of the source.
        rows: number of rows read.
        size: bytes of the source that were read.
        chunk: the encoded records.
        dropped: the rows that were dropped.
        anomalies: number of records with each anomaly.
        anomaly_examples: location of the first record with each anomaly.
        signatures: MinHash of each record, concatenated, if near duplicates are to be found.
    """

    source: int
    rows: int
    size: int
    chunk: Chunk
    dropped: list[Drop] = field(default_factory=list)
    anomalies: Counter[str] = field(default_factory=Counter)
    anomaly_examples: dict[str, str] = field(default_factory=dict)
    signatures: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True)
class BlockEncoder:
    """Converts and encodes blocks of rows; called in the worker processes.

    Attributes:
        readings: how to read each source.
        data: the recipe's `data` section.
        chat: the tokenizer.
        contamination: evaluation texts that no record may contain.
    """

    readings: Sequence[RecordReader]
    data: SFTData | DPOData
    chat: ChatTokenizer
    contamination: EvaluationTexts | None = None

    def __call__(self, task: tuple[int, Block]) -> EncodedBlock:
        """Encodes a block, given as (index of the source, block).

        Raises:
            DataError: for a row that cannot be read, and for an unusable one if the recipe does not allow dropping it.
        """
        source, block = task
        result = EncodedBlock(source, 0, block.size, Chunk(block.prefix))
        items: list[tuple[Example, int]] = []
        for row, number in block.numbered_records():
            result.rows += 1
            where = f"{block.prefix}{number}"
            try:
                item = self.readings[source].read(row, where)
                if isinstance(item, Tokenized) and not 0 <= min(item.input_ids) <= max(item.input_ids) < self.chat.size:
                    raise Unusable("id_outside_vocabulary", f"the tokenizer has {self.chat.size:,} ids")
                if self.contamination is not None and (of := self.contamination.find_in(item)) is not None:
                    raise Unusable("contains_evaluation_text", of)
                items.append((item, number))
            except Unusable as why:
                result.dropped.append(Drop(where, str(why), why.detail))
        for (item, number), encoded in zip(items, self._encode([item for item, _ in items]), strict=True):
            where = f"{block.prefix}{number}"
            try:
                self._add(item, self._fit(encoded, where), number, where, result)
            except Unusable as why:
                result.dropped.append(Drop(where, str(why), why.detail))
        return result

    def _add(
        self, item: Example, encoded: Encoded | EncodedPair, number: int, where: str, result: EncodedBlock
    ) -> None:
        mismatched = isinstance(item, PreferencePair) and has_language_mismatch(item)
        result.chunk.add(encoded, item.language, number, identity_of(item), mismatched)
        for name in find_anomalies(item, self.chat.template.control_tokens):
            result.anomalies[name] += 1
            result.anomaly_examples.setdefault(name, where)
        if self.data.clean.near_duplicates is not None:
            result.signatures += minhash_signature(item).tobytes()

    def _encode(self, items: list[Example]) -> list[Encoded | EncodedPair]:
        """Encodes all items, those of one type as a batch; returns them in order."""
        encoder, data = self.chat.encoder, self.data
        if not isinstance(data, SFTData):
            return list(encoder.pairs([item for item in items if isinstance(item, PreferencePair)]))
        conversations = [item for item in items if isinstance(item, Conversation)]
        texts = [item.text for item in items if isinstance(item, Completion)]
        encoded = {
            Conversation: iter(encoder.conversations(conversations, data.roles_to_train, data.train_on_eos)),
            Completion: iter(encoder.texts(texts, learn_end=data.train_on_eos != "none")),
        }
        return [
            Encoded(list(item.input_ids), [label >= 0 for label in item.labels])
            if isinstance(item, Tokenized) else next(encoded[type(item)])
            for item in items
        ]  # fmt: skip

    def _fit(self, encoded: Encoded | EncodedPair, where: str) -> Encoded | EncodedPair:
        """The encoded record, truncated if the recipe says so. Raises Unusable if it cannot be trained on."""
        limit = self.data.sequence_len
        if isinstance(encoded, EncodedPair):
            if encoded.chosen == encoded.rejected:  # e.g. a tool call, and the same call as text
                raise Unusable("chosen_equals_rejected")
            sizes = {name: len(encoded.prompt) + len(getattr(encoded, name)) for name in ("chosen", "rejected")}
            length = max(sizes.values())
            detail = f"{' and '.join(name for name, size in sizes.items() if size > limit)}, {length:,} tokens"
        else:
            length, detail = len(encoded.ids), f"{len(encoded.ids):,} tokens"
            if not any(islice(encoded.trained, 1, None)):
                raise Unusable("nothing_to_learn")
        if length <= limit:
            return encoded
        if self.data.too_long == "error":
            raise DataError(where, f"has {length:,} tokens, more than data.sequence_len {limit:,}",
                            "raise sequence_len, or set data.too_long: drop")  # fmt: skip
        if isinstance(self.data, SFTData) and isinstance(encoded, Encoded) and self.data.too_long == "truncate":
            cut = encoded.cut_to(limit, learn_end=self.data.train_on_eos == "last")
            if cut is not None:
                return cut
        raise Unusable("too_long", detail)


class _Counters:
    """Totals over all blocks."""

    def __init__(self, sources: int) -> None:
        self.rows = [0] * sources
        self.dropped = [DropCounter() for _ in range(sources)]
        self.anomalies: dict[str, Anomaly] = {}

    def add(self, block: EncodedBlock) -> None:
        self.rows[block.source] += block.rows
        for drop in block.dropped:
            self.drop(block.source, drop)
        for name, rows in block.anomalies.items():
            seen = self.anomalies.get(name, Anomaly(0, block.anomaly_examples[name]))
            self.anomalies[name] = replace(seen, rows=seen.rows + rows)

    def drop(self, source: int, drop: Drop) -> None:
        self.dropped[source].add(drop)

    @property
    def all_dropped(self) -> DropCounter:
        total = DropCounter()
        for drops in self.dropped:
            total.merge(drops)
        return total


def _json_line(drop: Drop) -> str:
    return json.dumps(drop._asdict(), ensure_ascii=False) + "\n"


def _no_usable_rows(sources: Sequence[Source], counters: _Counters) -> DataError:
    dropped = counters.all_dropped
    why = "; ".join(f"{reason}: {n}, e.g. {dropped.examples[reason]}" for reason, n in dropped.most_common())
    main = dropped.most_common(1)[0][0] if dropped else ""
    return DataError(
        ", ".join(source.path for source in sources),
        f"none of {sum(counters.rows):,} rows can be used ({why or 'there are no rows'})",
        _REMEDIES.get(main, "correct the data, or the columns and the format that the recipe names"),
    )


def _corpus_report(
    documents: Documents, kept: IntArray, sources: Sequence[Source], counters: _Counters
) -> CorpusReport:
    dropped = counters.all_dropped
    language_codes, source_indices = documents.languages[kept], documents.sources[kept]
    by_language = {
        name: documents.counts(kept[language_codes == i])
        for i, name in enumerate(documents.language_names)
        if (language_codes == i).any()
    }
    by_source = [
        SourceReport(source.path, source.alias or None, counters.rows[i], dict(counters.dropped[i].most_common()),
                     **documents.counts(kept[source_indices == i]).to_dict())
        for i, source in enumerate(sources)
    ]  # fmt: skip
    counts, rows_read = documents.counts(kept), sum(counters.rows)
    pairs = documents.documents_per_record == 3
    return CorpusReport(
        rows_read=rows_read,
        rows_kept=counts.rows,
        dropped=dict(dropped.most_common()),
        examples_of_dropped={reason: dropped.examples[reason] for reason, _ in dropped.most_common()},
        tokens=counts.tokens,
        supervised_tokens=counts.supervised_tokens,
        languages=dict(sorted(by_language.items())),
        sources=tuple(by_source),
        duplicates=int((find_exact_duplicates(documents.identities[kept]) >= 0).sum()),
        anomalies=dict(sorted(counters.anomalies.items(), key=lambda pair: -pair[1].rows)),
        lengths=length_histograms(documents, kept),
        preferences=preference_statistics(documents, kept, dropped, rows_read) if pairs else None,
    )


class Progress:
    """Shows the progress of the preparation once it takes more than two seconds: a live line, or messages.

    Args:
        total: bytes of all sources.
    """

    def __init__(self, total: int) -> None:
        self._total, self._started = max(1, total), monotonic()
        self._rows = self._done = 0
        self._terminal = sys.stderr.isatty()
        self._next = self._started + _QUIET_SECONDS
        self._printed = False

    def advance(self, rows: int, size: int) -> None:
        """Adds the rows and bytes of a block."""
        self._rows, self._done = self._rows + rows, min(self._total, self._done + size)
        now = monotonic()
        if now >= self._next:
            self._next = now + _INTERVAL_SECONDS[self._terminal]
            self._print(now - self._started)

    def end(self) -> None:
        """Ends the progress line of a terminal."""
        if self._printed:
            print_text("\n", error=True)

    def _print(self, seconds: float) -> None:
        share = self._done / self._total
        left = seconds * (1 - share) / max(share, 1e-9)
        clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
        line = f"{self._rows:,} rows, {self._rows / seconds:,.0f} rows/s, {share:.0%}, {clock} left"
        if self._terminal:
            print_text(f"\r{line:<70}", error=True, keep="\r")
            self._printed = True
        else:
            logger.info(line)
