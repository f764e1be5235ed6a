"""Holding rows out for evaluation, stratified by language."""

from __future__ import annotations

import hashlib
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nesso_tune import cache
from nesso_tune.chat.tokenizer import ChatTokenizer, chat_tokenizer
from nesso_tune.data.anomalies import check_preferences
from nesso_tune.data.files import content_hash, expand, is_local
from nesso_tune.data.mixture import mixture_groups, mixture_report, mixture_warnings
from nesso_tune.data.packing import Rows, RowStream, sequential_rows
from nesso_tune.data.pipeline import DROPPED, build_documents
from nesso_tune.data.privacy import Names, Privacy, file_names, other_names, renamed_note, source_name, write_renamed
from nesso_tune.data.record_reader import OTHER
from nesso_tune.data.report import Anomaly, CorpusReport, DataReport, PackingReport
from nesso_tune.data.sources import Content, content_of
from nesso_tune.data.token_store import IDS_FILE, MASK_FILE, Documents, IntArray, open_documents
from nesso_tune.data.workers import wait_for_background_preparation
from nesso_tune.errors import DataError, RecipeError
from nesso_tune.planning.plan import DataVolume
from nesso_tune.recipes.builtin import shipped
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import CleanSection, DPOData, SFTData, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def hold_out(languages: IntArray, size: int | float, seed: int) -> tuple[IntArray, IntArray]:
    """Positions to train on and positions held out, both ascending.

    Args:
        languages: language index of every row.
        size: rows (int) or share (float) to hold out. Languages are held out in proportion; a share holds out at
            least one row of every language that has ten.
        seed: decides which rows.

    Raises:
        RecipeError: if nothing would be left to train on.
    """
    total = len(languages)
    if not size:
        return np.arange(total), np.zeros(0, dtype=np.int64)
    check_size(size, total)
    codes, counts = np.unique(languages, return_counts=True)
    rng = np.random.default_rng([seed, 7])
    chosen = [
        rng.choice(np.flatnonzero(languages == code), size=wanted, replace=False)
        for code, wanted in zip(codes, _shares(counts, size), strict=True)
    ]
    held_out = np.sort(np.concatenate(chosen)).astype(np.int64)
    return np.setdiff1d(np.arange(total), held_out), held_out


def check_size(size: int | float, total: int) -> None:
    """Raises RecipeError if holding out `size` of `total` rows would leave nothing to train on."""
    if isinstance(size, int) and size and size >= total:
        raise RecipeError(
            "data.validation_size", f"{size:,} of {total:,} usable rows leave nothing to train on",
            f"hold out fewer, e.g. {max(1, total // 20)}, or a share like 0.05",
        )  # fmt: skip


def _shares(counts: IntArray, size: int | float) -> list[int]:
    """How many rows each language gives, by largest remainders."""
    if isinstance(size, float):
        return [max(int(size * n), 1 if n >= 10 else 0) for n in counts]
    exact = size * counts / counts.sum()
    floors = np.floor(exact).astype(int)
    for i in np.argsort(floors - exact, kind="stable")[: size - floors.sum()]:
        floors[i] += 1
    return [int(n) for n in floors]


KIND = "documents"
SUSPICIOUS = 0.1  # share of rows with control tokens as text: someone rendered them already
PACKAGES = ("nesso-tune", "tokenizers", "py3langid", "rensa", "numpy", "pyarrow", "datasets")  # that decide documents


@dataclass(frozen=True)
class PreparedData:
    """Data ready to train on.

    Attributes:
        train: rows as trained in epoch 0.
        validation: rows held out, in order.
        stream: the rows of all epochs.
        report: what was read, dropped and kept; see `prepare_data`.
        chat: the chat-ready tokenizer's files.
        key: name of the training sources' folder in the cache.
        names: of files that were called otherwise when they were prepared: then and now.
    """

    train: Rows
    validation: Rows
    stream: RowStream
    report: DataReport
    chat: ChatTokenizer
    key: str = ""
    names: Names = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The chat-ready tokenizer, as transformers knows it."""
        return self.chat.load()

    @property
    def volume(self) -> DataVolume:
        """What one epoch holds."""
        return DataVolume(
            len(self.train), self.report.train.tokens, self.report.train.supervised_tokens,
            len(self.validation.records),
            dropped={reason: rows / self.report.rows_read for reason, rows in self.report.dropped.items()},
        )  # fmt: skip


def _packing(rows: Rows, sequence_len: int, unpacked: bool = False) -> PackingReport:
    used = int(rows.documents.sequence_lengths[rows.records].sum())
    fill = round(used / (len(rows) * sequence_len), 4) if len(rows) else 0.0
    return PackingReport(len(rows), fill, unpacked)


def unpacked(data: PreparedData, recipe: Recipe) -> PreparedData:
    """The same conversations, a row each: for a base that cannot keep packed ones apart."""
    stream = data.stream.unpacked()
    rows, held = stream.epoch(0), data.validation
    validation = Rows(held.documents, np.sort(held.records), np.arange(len(held.records) + 1), held.first_pair)
    packing = _packing(rows, recipe.data.sequence_len, unpacked=True)
    report = replace(data.report, packing=packing, fingerprint=cache.key_of([data.report.fingerprint, "unpacked"]))
    return replace(data, train=rows, validation=validation, stream=stream, report=report)


def prepare_data(recipe: Recipe) -> PreparedData:
    """Reads, encodes and caches the data of a recipe, without torch.

    The report holds `rows_read`, `rows_kept`, `dropped` ({reason: count}), `tokens`, `supervised_tokens`,
    `languages` ({code: {rows, tokens, supervised_tokens}}), `sources` (the same per source), `train` and `validation`
    (the same of either side), `packing` ({rows, fill}), `mixture` (what the first epoch is made of), `lengths`
    (histograms), `duplicates`, `oddities`, `preferences` (of pairs), `warnings`, `fingerprint`, `cache_hit`.

    Raises:
        DataError: if a file cannot be read or nothing usable is left.
        RecipeError, ModelError: if the recipe or the base's tokenizer does not fit.
    """
    _check_alone()
    wait_for_background_preparation(recipe)
    data, chat = recipe.data, chat_tokenizer(recipe.model, recipe.chat)
    documents, note, hit = _documents(recipe, data.sources, chat)
    corpus: CorpusReport = note["report"]
    content = [note["content"]]
    if data.validation_sources:
        held, held_note, held_hit = _documents(recipe, data.validation_sources, chat, held=True)
        train, held_out, hit = documents.kept, held.kept, hit and held_hit
        content.append(held_note["content"])
    else:
        seen, unseen = hold_out(documents.languages[documents.kept], data.validation_size, recipe.seed)
        train, held_out, held = documents.kept[seen], documents.kept[unseen], documents
    train, overlap = _apart(documents, train, held, held_out, data.clean)
    capacity = data.sequence_len if isinstance(data, SFTData) and data.packing else None
    groups = mixture_groups(documents, train, data)
    stream = RowStream(documents, train, seed=recipe.seed, capacity=capacity, groups=groups)
    rows = stream.epoch(0)
    validation = sequential_rows(held, held_out, capacity, first_pair=0 if held is documents else len(documents))
    arranged = [{i: source.weight for i, source in enumerate(data.sources)}, *_arranging(data)]
    none_held = data.validation_size and not data.validation_sources and not len(held_out)
    warnings = [
        *chat.notes, *_data_warnings(corpus, overlap, data), *mixture_warnings(documents, groups, train, data),
        *([f"data.validation_size {data.validation_size:g} of {len(train):,} rows is less than one row: "
           "nothing is held out or evaluated; raise it"] if none_held else []),
    ]  # fmt: skip
    report = DataReport(
        **{field.name: getattr(corpus, field.name) for field in fields(corpus)},
        validation_overlap=overlap,
        train=documents.counts(rows.records),
        validation=held.counts(held_out),
        packing=_packing(rows, data.sequence_len),
        mixture=mixture_report(documents, groups, rows.records),
        fingerprint=cache.key_of([content, _hash_of(train, held_out), recipe.seed, capacity, *arranged]),
        cache_hit=hit,
        warnings=tuple(warnings),
    )
    return PreparedData(rows, validation, stream, report, chat, note["key"], note["renamed"])


def _data_warnings(corpus: CorpusReport, overlap: int, data: SFTData | DPOData) -> list[str]:
    """What a person should know before training on this data.

    Raises:
        DataError: if preference data is worse than the recipe accepts.
    """
    said = []
    if isinstance(data, DPOData):
        assert corpus.preferences is not None
        said += check_preferences(corpus.preferences, data.preferences)
    if overlap and data.clean.validation_overlap == "keep":
        remedy = "data.clean.validation_overlap: drop leaves them out"
        said.append(f"{_rows(overlap, 'ask')} what a held-out row asks: {remedy}")
    spelt = corpus.anomalies.get("control_token_as_text", Anomaly(0, ""))
    if spelt.rows > SUSPICIOUS * corpus.rows_kept:
        what = f"{_rows(spelt.rows, 'spell')} control tokens, e.g. {spelt.example}; they are read as plain text"
        said.append(f"{what}: if the rows are rendered already, give their messages instead")
    if corpus.duplicates:
        remedy = "data.clean.duplicates: drop keeps one of each"
        said.append(f"{_rows(corpus.duplicates, 'repeat')} an earlier one: {remedy}")
    return said


def _rows(count: int, verb: str) -> str:
    return f"1 row {verb}s" if count == 1 else f"{count:,} rows {verb}"


def _check_alone() -> None:
    """Raises AssertionError inside an initialised process group: others would wait for longer than it allows."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise AssertionError("data is prepared before a process group exists, never inside one")


def _apart(
    documents: Documents, train: IntArray, held: Documents, held_out: IntArray, clean: CleanSection
) -> tuple[IntArray, int]:
    """The entries to train on, and how many of them ask what a held-out one asks; these are left out if asked for."""
    same = np.isin(documents.identities[train, 1], held.identities[held_out, 1])
    left = train[~same] if clean.validation_overlap == "drop" else train
    if not len(left):
        raise DataError("data.clean.validation_overlap", "every row asks what a held-out row asks",
                        "give other validation_sources, or keep them")  # fmt: skip
    return left, int(same.sum())


def _arranging(data: SFTData | DPOData) -> list[Any]:
    """What else decides which rows an epoch has; nothing where the recipe asks for nothing."""
    mixture = data.mixture.model_dump(mode="json") if data.mixture is not None else None
    if mixture is not None and mixture["by"] == "source":  # by position: what a source is called does not count
        shares = mixture["shares"]
        named = {str(i): shares[source_name(s)] for i, s in enumerate(data.sources) if source_name(s) in shares}
        mixture["shares"] = {**named, OTHER: shares.get(OTHER)}
    weights = [{code: rule.weight for code, rule in source.rules.items()} for source in data.sources]
    asked = [mixture, weights if any(weights) else None, data.clean.validation_overlap]
    return asked if asked != [None, None, "keep"] else []


def is_prepared(recipe: Recipe) -> bool:
    """Whether the data of a recipe is in the cache, so that `prepare_data` only maps it."""
    chat = chat_tokenizer(recipe.model, recipe.chat)
    groups = [g for g in (recipe.data.sources, recipe.data.validation_sources) if g]
    if not all(is_local(source.path) for group in groups for source in group):
        return False
    return all(cache.find(KIND, _key(recipe, _files(recipe, group), chat)) for group in groups)


def dropped_file(data: PreparedData) -> Path:
    """The list of all rows of the training sources that were dropped, one JSON object a line."""
    file = cache.cache_root() / KIND / data.key / DROPPED
    if not data.names:
        return file
    today = file.with_name(f"dropped-{cache.key_of(data.names)[:8]}.jsonl")
    write_renamed(file, data.names, today)
    return today


def _documents(
    recipe: Recipe, sources: Sequence[Source], chat: ChatTokenizer, held: bool = False
) -> tuple[Documents, dict[str, Any], bool]:
    content, privacy = _files(recipe, sources), Privacy(recipe.data)
    key = _key(recipe, content, chat)
    files = file_names(sources, recipe.data.clean)

    def build(staging: Path) -> dict[str, Any]:
        store, report = build_documents(staging, recipe, sources, chat)
        if _files(recipe, sources) != content:
            paths = ", ".join(source.path for source in sources)
            raise DataError(paths, "changed while it was read", "run again when nothing writes into it any more")
        return {"documents": store, "report": report.to_dict(), "files": files}

    def opened(folder: Path, note: dict[str, Any]) -> Documents:
        try:
            documents = open_documents(folder, **renamed_note(note, files)["documents"])
        except (ValueError, OSError, EOFError, KeyError, TypeError) as error:
            raise cache.Damaged(str(error)) from None
        return replace(
            documents, source_names=privacy.source_names(held), private_sources=privacy.hidden_sources(held),
            private_files=privacy.hidden_files(documents.prefixes),
        )  # fmt: skip

    documents, note, hit = cache.get_or_build(KIND, key, build, opened, "prepared data")
    corpus = CorpusReport.from_dict(renamed_note(note, files)["report"])
    named = [
        replace(report, path=source.path, alias=source.alias or None)
        for report, source in zip(corpus.sources, sources, strict=True)
    ]
    whole = {"key": key, "report": replace(corpus, sources=tuple(named)), "renamed": other_names(note, files)}
    return documents, {**whole, "content": _identity(documents, content, key)}, hit


def _identity(documents: Documents, files: tuple[list[str], list[Content]], key: str) -> list[Any]:
    """Identifies documents: the bytes of the files and the tokens made of them. Neither names nor versions count."""
    evaluations, sources = files
    digests = cache.file_hashes(KIND, key)
    whole = _hash_of(documents.offsets, documents.languages, documents.sources)
    tokens = [digests[IDS_FILE], digests[MASK_FILE], whole, documents.language_names, documents.documents_per_record]
    return [tokens, evaluations, [(source.rows, source.tools, source.reads) for source in sources]]


def _hash_of(*arrays: IntArray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _files(recipe: Recipe, sources: Sequence[Source]) -> tuple[list[str], list[Content]]:
    """What is in the files that evaluations and sources name."""
    asked = recipe.data.clean.decontaminate
    evaluations = [] if asked is None else [content_hash(expand(name)) for name in asked.files]
    return evaluations, [content_of(source) for source in sources]


def _key(recipe: Recipe, files: tuple[list[str], list[Content]], chat: ChatTokenizer) -> str:
    """Hash of everything that decides documents on disk: content and settings, and the code and packages at work."""
    data = recipe.data
    arranging = {"sources", "validation_sources", "validation_size", "packing", "mixture", "preferences"}
    settings = data.model_dump(mode="json", exclude=arranging)
    settings["clean"].pop("validation_overlap")
    settings["clean"]["decontaminate"] = {**(settings["clean"]["decontaminate"] or {}), "files": None}
    return cache.key_of([software_versions(), recipe.method, chat.fingerprint, settings, *files])


@lru_cache(maxsize=1)
def software_versions() -> list[str]:
    """What makes documents of rows: this package's own code and shipped formats, and the packages that it uses."""
    package = Path(__file__).parents[1]
    code = [file for folder in ("chat", "data") for file in sorted((package / folder).glob("*.py"))]
    formats = sorted((shipped("data_templates") / "formats").glob("*.yaml"))
    own = content_hash([*code, package / "conversation.py", *formats])
    return [own, unicodedata.unidata_version, *(f"{name} {version(name)}" for name in PACKAGES)]
