"""Preparing the data of a recipe: read, encode, cache, split, mix and pack. Loads no torch."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nesso_tune import cache
from nesso_tune.chat.tokenizer import ChatTokenizer, chat_tokenizer
from nesso_tune.data.cache_key import KIND, cache_key, contents_of
from nesso_tune.data.locations import FileNames, copy_with_current_names, file_names, renamed_files, with_current_names
from nesso_tune.data.mixture import mixture_groups, mixture_report, mixture_warnings
from nesso_tune.data.packing import Rows, RowStream, sequential_rows
from nesso_tune.data.pipeline import DROPPED, build_documents
from nesso_tune.data.privacy import Privacy, source_name
from nesso_tune.data.record_reader import OTHER_KEY
from nesso_tune.data.report import Anomaly, CorpusReport, DataReport, PackingReport, Unread, unread_warnings
from nesso_tune.data.sources import check_sources
from nesso_tune.data.statistics import check_preferences
from nesso_tune.data.token_store import IDS_FILE, MASK_FILE, Documents, IntArray, open_documents
from nesso_tune.data.workers import wait_for_background_preparation
from nesso_tune.errors import DataError
from nesso_tune.planning.plan import DataVolume
from nesso_tune.recipes.data_rules import check_validation_size
from nesso_tune.recipes.load import RecipeSource, as_recipe
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import CleanSection, DPOData, SFTData, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTROL_TOKEN_SHARE = 0.1  # share of rows with control tokens as text from which they look rendered already
_MIN_STRATUM = 10  # records of a language from which a validation share includes at least one of them


@dataclass(frozen=True, repr=False)
class PreparedData:
    """Data that is ready for training.

    Attributes:
        train: the rows of the first epoch.
        validation: the validation rows, in a fixed order.
        stream: the rows of all epochs.
        summary: what was read, dropped and kept.
        chat: files of the chat-ready tokenizer.
        key: name of the training sources' folder in the cache.
        renamed: files that had other names when they were prepared.
        byte_fingerprint: the fingerprint as earlier versions computed it, which also covers the bytes of the files.
    """

    train: Rows
    validation: Rows
    stream: RowStream
    summary: DataReport
    chat: ChatTokenizer
    key: str = ""
    renamed: FileNames = field(default_factory=dict)
    byte_fingerprint: str = ""

    def __repr__(self) -> str:
        return (
            f"PreparedData({len(self.train):,} training rows, {len(self.validation):,} validation rows, "
            f"{self.summary.train.tokens:,} tokens per epoch, fingerprint {self.summary.fingerprint})"
        )

    @property
    def report(self) -> dict[str, Any]:
        """`summary` as JSON data, the same as `nesso-tune prepare --json` prints."""
        return self.summary.to_dict()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The chat-ready tokenizer as a transformers tokenizer."""
        return self.chat.load()

    @property
    def volume(self) -> DataVolume:
        """Size of one epoch."""
        return DataVolume(
            len(self.train), self.summary.train.tokens, self.summary.train.supervised_tokens,
            len(self.validation.records),
            dropped={reason: rows / self.summary.rows_read for reason, rows in self.summary.dropped.items()},
            document_length=self.train.document_length,
            unread=self.summary.unread, warnings=tuple(unread_warnings(self.summary.unread_texts)),
        )  # fmt: skip


def prepare_data(recipe: RecipeSource) -> PreparedData:
    """Reads, encodes and caches the data of a recipe, without torch.

    Call it before `torch.distributed` is initialised: it can take longer than a collective's timeout.

    Args:
        recipe: a recipe, or what `load_recipe` takes.

    Raises:
        DataError: if a file cannot be read or no usable row is left.
        RecipeError: if the recipe does not fit the data.
        ModelError: if the tokenizer of the base model does not fit the recipe.
        RunEnvironmentError: if the disk of the cache is full, or another process prepares the same data for longer
            than `distributed.timeout_s`.
    """
    recipe = as_recipe(recipe)
    _check_no_process_group()
    check_sources(recipe)
    wait_for_background_preparation(recipe)
    data, chat = recipe.data, chat_tokenizer(recipe.model, recipe.chat)
    corpus = _encoded_corpus(recipe, data.sources, chat)
    documents, cache_hit, corpora = corpus.documents, corpus.cache_hit, [corpus]
    if data.validation_sources:
        held_corpus = _encoded_corpus(recipe, data.validation_sources, chat, validation=True)
        held_documents, cache_hit = held_corpus.documents, cache_hit and held_corpus.cache_hit
        train, held_out = documents.kept, held_documents.kept
        corpora.append(held_corpus)
    else:
        seen, unseen = hold_out(documents.languages[documents.kept], data.validation_size, recipe.seed)
        train, held_out, held_documents = documents.kept[seen], documents.kept[unseen], documents
    train, overlap = _without_overlap(documents, train, held_documents, held_out, data.clean)
    capacity = data.sequence_len if isinstance(data, SFTData) and data.packing else None
    groups = mixture_groups(documents, train, data)
    stream = RowStream(documents, train, seed=recipe.seed, capacity=capacity, groups=groups)
    rows = stream.epoch(0)
    first_pair = 0 if held_documents is documents else len(documents)
    validation = sequential_rows(held_documents, held_out, capacity, first_pair)
    unread, unread_texts = _shown_unread(corpora, data)
    order = [{i: source.weight for i, source in enumerate(data.sources)}, *_mixture_settings(data)]
    warnings = [
        *chat.notes, *unread_warnings(unread_texts),
        *_data_warnings(corpus.report, overlap, data), *mixture_warnings(documents, groups, train, data),
        *_split_warnings(data, len(train), len(held_out)),
        *_personal_data_warnings([part.report for part in corpora], data),
    ]  # fmt: skip
    arrangement = [_array_hash(train, held_out), recipe.seed, capacity, *order]
    summary = DataReport(
        **{field.name: getattr(corpus.report, field.name) for field in fields(corpus.report)},
        validation_overlap=overlap,
        train=documents.counts(rows.records),
        validation=held_documents.counts(held_out),
        packing=_packing_report(rows, data.sequence_len),
        mixture=mixture_report(documents, groups, rows.records),
        fingerprint=cache.key_of([[part.tokens for part in corpora], *arrangement]),
        cache_hit=cache_hit,
        unread=unread,
        unread_texts=unread_texts,
        warnings=tuple(warnings),
    )
    of_bytes = cache.key_of([[[part.tokens, *part.content] for part in corpora], *arrangement])
    return PreparedData(rows, validation, stream, summary, chat, corpus.key, corpus.renamed, of_bytes)


def _shown_unread(corpora: Sequence[_Corpus], data: SFTData | DPOData) -> tuple[Unread, Unread]:
    """Rows with each key that was not read, and those in which it holds text; sources by the name that is shown."""
    shown = [Privacy(data).shown_unread(part.unread, validation=i == 1) for i, part in enumerate(corpora)]
    unread = {name: keys for part, _ in reversed(shown) for name, keys in part.items()}
    return unread, {name: keys for _, part in reversed(shown) for name, keys in part.items()}


def unpacked(data: PreparedData, recipe: Recipe) -> PreparedData:
    """The same data with one conversation per row, for a model that cannot isolate packed documents."""
    stream = data.stream.unpacked()
    rows, held = stream.epoch(0), data.validation
    validation = Rows(held.documents, np.sort(held.records), np.arange(len(held.records) + 1), held.first_pair)
    packing = _packing_report(rows, recipe.data.sequence_len, unpacked=True)
    fingerprint = cache.key_of([data.summary.fingerprint, "unpacked"])
    summary = replace(data.summary, packing=packing, fingerprint=fingerprint)
    of_bytes = cache.key_of([data.byte_fingerprint, "unpacked"])
    return replace(data, train=rows, validation=validation, stream=stream, summary=summary, byte_fingerprint=of_bytes)


def dropped_file(data: PreparedData) -> Path:
    """JSON Lines file with every dropped row of the training sources."""
    file = cache.cache_root() / KIND / data.key / DROPPED
    if not data.renamed:
        return file
    current = file.with_name(f"dropped-{cache.key_of(data.renamed)[:8]}.jsonl")
    copy_with_current_names(file, data.renamed, current)
    return current


def hold_out(languages: IntArray, size: int | float, seed: int) -> tuple[IntArray, IntArray]:
    """Splits records into training and validation records, stratified by language.

    Args:
        languages: language index of each record.
        size: number (int) or share (float) of records to hold out. Languages are held out in proportion; a share holds
            out at least one record of each language with ten or more.
        seed: seed of the random choice.

    Returns:
        Indices of the training records and of the validation records, both ascending.

    Raises:
        RecipeError: if no training record would be left.
    """
    total = len(languages)
    if not size:
        return np.arange(total), np.zeros(0, dtype=np.int64)
    check_validation_size(size, total)
    codes, counts = np.unique(languages, return_counts=True)
    rng = np.random.default_rng([seed, 7])
    chosen = [
        rng.choice(np.flatnonzero(languages == code), size=count, replace=False)
        for code, count in zip(codes, _validation_counts(counts, size), strict=True)
    ]
    held_out = np.sort(np.concatenate(chosen)).astype(np.int64)
    return np.setdiff1d(np.arange(total), held_out), held_out


def _validation_counts(counts: IntArray, size: int | float) -> list[int]:
    """Number of records that each language gives; for a total, by the largest-remainder method."""
    if isinstance(size, float):
        return [max(int(size * n), 1 if n >= _MIN_STRATUM else 0) for n in counts]
    exact = size * counts / counts.sum()
    floors = np.floor(exact).astype(int)
    for i in np.argsort(floors - exact, kind="stable")[: size - floors.sum()]:
        floors[i] += 1
    return [int(n) for n in floors]


def _check_no_process_group() -> None:
    """Raises AssertionError inside a process group: the other ranks would wait longer than its timeout allows."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise AssertionError("data must be prepared before the process group is initialised")


def _without_overlap(
    documents: Documents, train: IntArray, held_documents: Documents, held_out: IntArray, clean: CleanSection
) -> tuple[IntArray, int]:
    """The training records, and how many share a prompt with a validation record; the recipe may drop these."""
    overlaps = np.isin(documents.identities[train, 1], held_documents.identities[held_out, 1])
    left = train[~overlaps] if clean.validation_overlap == "drop" else train
    if not len(left):
        raise DataError("data.clean.validation_overlap", "every training row shares a prompt with a validation row",
                        "set other validation_sources, or keep these rows")  # fmt: skip
    return left, int(overlaps.sum())


def _packing_report(rows: Rows, sequence_len: int, unpacked: bool = False) -> PackingReport:
    used = int(rows.documents.sequence_lengths[rows.records].sum())
    fill = round(used / (len(rows) * sequence_len), 4) if len(rows) else 0.0
    return PackingReport(len(rows), fill, unpacked)


def _data_warnings(corpus: CorpusReport, overlap: int, data: SFTData | DPOData) -> list[str]:
    """Warnings about the content of the data.

    Raises:
        DataError: if preference data exceeds a limit of the recipe.
    """
    warnings = []
    if isinstance(data, DPOData):
        assert corpus.preferences is not None
        warnings += check_preferences(corpus.preferences, data.preferences)
    if overlap and data.clean.validation_overlap == "keep":
        remedy = "data.clean.validation_overlap: drop removes them"
        warnings.append(f"{_rows(overlap, 'share')} a prompt with a validation row: {remedy}")
    control = corpus.anomalies.get("control_token_as_text", Anomaly(0, ""))
    if control.rows > _CONTROL_TOKEN_SHARE * corpus.rows_kept:
        what = (
            f"{_rows(control.rows, 'contain')} control tokens, e.g. {control.example}; they are encoded as plain text"
        )
        warnings.append(f"{what}: if the rows are already rendered with a template, provide their messages instead")
    if corpus.duplicates:
        remedy = "data.clean.duplicates: drop keeps one of each"
        warnings.append(f"{_rows(corpus.duplicates, 'repeat')} an earlier row: {remedy}")
    return warnings


def _split_warnings(data: SFTData | DPOData, train_rows: int, validation_rows: int) -> list[str]:
    if not data.validation_size or data.validation_sources or validation_rows:
        return []
    what = f"data.validation_size {data.validation_size:g} of {train_rows:,} rows is less than one row"
    return [f"{what}: nothing is held out or evaluated; raise it"]


def _personal_data_warnings(reports: Sequence[CorpusReport], data: SFTData | DPOData) -> list[str]:
    """A warning for the training and one for the validation sources with personal data that the recipe only reports."""
    if data.clean.personal_data != "report":
        return []
    return [
        f"personal data in the {name} sources: "
        + ", ".join(f"{found.values:,} {kind}" for kind, found in report.personal_data.items())
        + ": data.clean.personal_data: mask replaces it, drop removes the rows"
        for name, report in zip(("training", "validation"), reports, strict=False)
        if report.personal_data
    ]


def _rows(count: int, verb: str) -> str:
    return f"1 row {verb}s" if count == 1 else f"{count:,} rows {verb}"


class _Corpus(NamedTuple):
    """The encoded records of a list of sources, and where they come from."""

    documents: Documents
    report: CorpusReport
    key: str
    renamed: FileNames
    tokens: list[Any]  # identifies the encoded records
    content: list[Any]  # identifies the bytes of the files
    cache_hit: bool

    @property
    def unread(self) -> list[tuple[Mapping[str, int], Mapping[str, int]]]:
        """For each source, the rows with each unread key, and those in which it holds text."""
        return [(source.unread, source.unread_texts) for source in self.report.sources]


def _encoded_corpus(
    recipe: Recipe, sources: Sequence[Source], chat: ChatTokenizer, validation: bool = False
) -> _Corpus:
    """Reads and encodes a list of sources, or finds the result in the cache."""
    contents, privacy = contents_of(recipe, sources), Privacy(recipe.data)
    key = cache_key(recipe, contents, chat)
    files = file_names(sources, recipe.data.clean)

    def build(staging: Path) -> dict[str, Any]:
        store, report = build_documents(staging, recipe, sources, chat)
        if contents_of(recipe, sources) != contents:
            paths = ", ".join(source.path for source in sources)
            raise DataError(paths, "changed while it was read", "run again when no other process writes to it")
        return {"documents": store, "report": report.to_dict(), "files": files}

    def load(folder: Path, note: dict[str, Any]) -> Documents:
        try:
            documents = open_documents(folder, **with_current_names(note, files)["documents"])
        except (ValueError, OSError, EOFError, KeyError, TypeError) as error:
            raise cache.Damaged(str(error)) from None
        return replace(
            documents, source_names=privacy.source_names(validation),
            private_sources=privacy.hidden_sources(validation), private_files=privacy.hidden_files(documents.prefixes),
        )  # fmt: skip

    timeout_s = recipe.distributed.timeout_s
    documents, note, cache_hit = cache.get_or_build(KIND, key, build, load, "prepared data", timeout_s)
    report = CorpusReport.from_dict(with_current_names(note, files)["report"])
    named = [
        replace(part, path=source.path, alias=source.alias or None)
        for part, source in zip(report.sources, sources, strict=True)
    ]
    report = replace(report, sources=tuple(named))
    evaluations, by_source = contents
    content = [evaluations, [(source.rows, source.tools, source.reads) for source in by_source]]
    tokens = _token_identity(documents, key)
    return _Corpus(documents, report, key, renamed_files(note, files), tokens, content, cache_hit)


def _token_identity(documents: Documents, key: str) -> list[Any]:
    """Identifies encoded records by their tokens, languages and sources, not by files, names or versions."""
    hashes = cache.file_hashes(KIND, key)
    columns = _array_hash(documents.offsets, documents.languages, documents.sources)
    return [hashes[IDS_FILE], hashes[MASK_FILE], columns, documents.language_names, documents.documents_per_record]


def _mixture_settings(data: SFTData | DPOData) -> list[Any]:
    """Settings that decide the composition of an epoch, for the fingerprint; empty where all are defaults."""
    mixture = data.mixture.model_dump(mode="json") if data.mixture is not None else None
    if mixture is not None and mixture["by"] == "source":  # by position: the names of sources do not count
        shares = mixture["shares"]
        by_index = {str(i): shares[source_name(s)] for i, s in enumerate(data.sources) if source_name(s) in shares}
        mixture["shares"] = {**by_index, OTHER_KEY: shares.get(OTHER_KEY)}
    weights = [{code: rule.weight for code, rule in source.rules.items()} for source in data.sources]
    settings = [mixture, weights if any(weights) else None, data.clean.validation_overlap]
    return settings if settings != [None, None, "keep"] else []


def _array_hash(*arrays: IntArray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
