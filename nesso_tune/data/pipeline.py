"""The encoding pipeline: reads all sources in blocks, encodes them in parallel, and writes the token store."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from nesso_tune.chat.tokenizer import ChatTokenizer
from nesso_tune.data.block_encoder import BlockCounters, BlockEncoder, EncodedBlock, no_usable_rows
from nesso_tune.data.filtering import (
    find_duplicates,
    find_exact_duplicates,
    minhash_signature,
    read_evaluation_texts,
)
from nesso_tune.data.languages import load_language_model
from nesso_tune.data.reasoning import check_reasoning
from nesso_tune.data.record_reader import Drop, make_record_reader
from nesso_tune.data.report import CorpusReport, SourceReport, WholeRows
from nesso_tune.data.sources import source_blocks, source_size
from nesso_tune.data.statistics import length_histograms, preference_statistics
from nesso_tune.data.token_store import Documents, DocumentWriter, IntArray, open_documents
from nesso_tune.data.workers import parallel_map
from nesso_tune.logs import logger, output_flags, print_text
from nesso_tune.recipes.schema import Recipe, SFTRecipe
from nesso_tune.recipes.sections import AUTO, Source

DROPPED = "dropped.jsonl"
MIN_SEQUENCE_LEN = 256  # of the table of sequence lengths
_SIGNATURES = "signatures.bin"
_QUIET_SECONDS = 2.0  # before the first progress line
_INTERVAL_SECONDS = {True: 0.5, False: 30.0}  # between progress lines, on a terminal and elsewhere


def build_documents(
    folder: Path, recipe: Recipe, sources: Sequence[Source], chat: ChatTokenizer
) -> tuple[dict[str, Any], CorpusReport]:
    """Reads and encodes all sources into a folder.

    Returns:
        The arguments of `open_documents` as plain data, and the report.

    Raises:
        DataError: if a file cannot be read or does not have the given format, or no usable row is left.
    """
    counters = BlockCounters(len(sources))
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
    is_kept = np.ones(len(documents), bool)
    is_kept[[record for record, _, _ in duplicates]] = False
    kept = np.flatnonzero(is_kept)
    if len(kept) == 0:
        raise no_usable_rows(sources, counters)
    if duplicates:
        writer.keep(kept)
    report = _corpus_report(documents, kept, sources, counters)
    return store, report if recipe.data.clean.personal_data is None else replace(
        report, personal_data=dict(sorted(counters.personal_data.items(), key=lambda pair: -pair[1].values))
    )


def _encoded_blocks(recipe: Recipe, sources: Sequence[Source], chat: ChatTokenizer) -> Iterator[EncodedBlock]:
    """The encoded blocks of all sources, in order; prints the progress."""
    data = recipe.data
    check_reasoning(data, chat.template)
    clean = data.clean
    encoder = BlockEncoder(
        [make_record_reader(source, recipe.method, clean) for source in sources],
        data, chat, None if clean.decontaminate is None else read_evaluation_texts(clean.decontaminate).find_in,
        None if clean.near_duplicates is None else minhash_signature,
    )  # fmt: skip
    if recipe.method == "dpo" or any(source.language == AUTO for source in sources):
        load_language_model()  # before the worker processes are forked, so that they share it
    progress = Progress(sum(map(source_size, sources)))
    tasks = chain.from_iterable(((i, block) for block in source_blocks(s)) for i, s in enumerate(sources))
    for block in parallel_map(encoder, tasks):
        progress.advance(block.rows, block.size)
        yield block
    progress.end()


def _json_line(drop: Drop) -> str:
    return json.dumps(drop._asdict(), ensure_ascii=False) + "\n"


def _corpus_report(
    documents: Documents, kept: IntArray, sources: Sequence[Source], counters: BlockCounters
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
                     dict(counters.unread[i].rows.most_common()), dict(counters.unread[i].texts.most_common()),
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
        whole_rows=_whole_rows(counters.lengths),
        preferences=preference_statistics(documents, kept, dropped, rows_read) if pairs else None,
    )


def _whole_rows(lengths: Counter[int]) -> dict[int, WholeRows]:
    """The rows that fit into each power of two, up to the first that holds all; see `CorpusReport`."""
    found: dict[int, WholeRows] = {}
    limit, longest = MIN_SEQUENCE_LEN, max(lengths)
    while not found or limit < 2 * longest:
        fitting = {length: rows for length, rows in lengths.items() if length <= limit}
        tokens = sum(length * rows for length, rows in fitting.items())
        found[limit], limit = WholeRows(sum(fitting.values()), tokens), 2 * limit
    return found


class Progress:
    """Shows the progress of the preparation once it takes more than two seconds: a live line, or messages.

    Args:
        total: bytes of all sources.
    """

    def __init__(self, total: int) -> None:
        self._total, self._started = max(1, total), monotonic()
        self._rows = self._done = 0
        self._terminal = sys.stderr.isatty() and not output_flags()
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
