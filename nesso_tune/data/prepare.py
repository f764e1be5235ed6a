"""Holding rows out for evaluation, stratified by language."""

from __future__ import annotations

import hashlib
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nesso_tune import cache
from nesso_tune.chat.tokenizer import ChatTokenizer, chat_tokenizer
from nesso_tune.data.anomalies import check_preferences
from nesso_tune.data.files import content_hash, expand, is_local
from nesso_tune.data.mixture import groups_of, mixture_report, mixture_warnings
from nesso_tune.data.packing import Rows, RowStream, in_order
from nesso_tune.data.pipeline import DROPPED, build_documents
from nesso_tune.data.privacy import Names, Privacy, file_names, name_of, other_names, renamed_note, write_renamed
from nesso_tune.data.record_reader import OTHER_KEY
from nesso_tune.data.sources import SourceContent, source_content
from nesso_tune.data.token_store import IDS, TRAINED, Documents, Ints, open_documents
from nesso_tune.data.workers import wait_for_it
from nesso_tune.errors import DataError, RecipeError
from nesso_tune.planning.plan import DataVolume
from nesso_tune.recipes.builtin import shipped
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import CleanSection, DPOData, SFTData, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def hold_out(languages: Ints, size: int | float, seed: int) -> tuple[Ints, Ints]:
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


def _shares(counts: Ints, size: int | float) -> list[int]:
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
    report: dict[str, Any]
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
            len(self.train), self.report["train"]["tokens"], self.report["train"]["supervised_tokens"],
            len(self.validation.entries),
            dropped={r: n / self.report["rows_read"] for r, n in self.report["dropped"].items()},
        )  # fmt: skip


def _packing(rows: Rows, sequence_len: int) -> dict[str, Any]:
    """How many rows there are, and what share of them is tokens of documents."""
    used = int(rows.documents.spans[rows.entries].sum())
    return {"rows": len(rows), "fill": round(used / (len(rows) * sequence_len), 4) if len(rows) else 0.0}


def unpacked(data: PreparedData, recipe: Recipe) -> PreparedData:
    """The same conversations, a row each: for a base that cannot keep packed ones apart."""
    stream = data.stream.unpacked()
    rows, held = stream.epoch(0), data.validation
    validation = Rows(held.documents, np.sort(held.entries), np.arange(len(held.entries) + 1), held.first_pair)
    packing = {**_packing(rows, recipe.data.sequence_len), "unpacked": True}
    report = data.report | {"packing": packing, "fingerprint": cache.key_of([data.report["fingerprint"], "unpacked"])}
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
    wait_for_it(recipe)
    data, chat = recipe.data, chat_tokenizer(recipe.model, recipe.chat)
    documents, note, hit = _documents(recipe, data.sources, chat)
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
    groups = groups_of(documents, train, data)
    stream = RowStream(documents, train, seed=recipe.seed, capacity=capacity, groups=groups)
    rows = stream.epoch(0)
    validation = in_order(held, held_out, capacity, first_pair=0 if held is documents else len(documents))
    arranged = [{i: source.weight for i, source in enumerate(data.sources)}, *_arranging(data)]
    report = {
        **note["report"],
        "validation_overlap": overlap,
        "train": documents.counts(rows.entries),
        "validation": held.counts(held_out),
        "packing": _packing(rows, data.sequence_len),
        "mixture": mixture_report(documents, groups, rows.entries),
        "fingerprint": cache.key_of([content, _hash_of(train, held_out), recipe.seed, capacity, *arranged]),
        "cache_hit": hit,
    }
    none_held = data.validation_size and not data.validation_sources and not len(held_out)
    report["warnings"] = [
        *chat.notes, *warnings_of(report, data), *mixture_warnings(documents, groups, train, data),
        *([f"data.validation_size {data.validation_size:g} of {len(train):,} rows is less than one row: "
           "nothing is held out or evaluated; raise it"] if none_held else []),
    ]  # fmt: skip
    return PreparedData(rows, validation, stream, report, chat, note["key"], note["renamed"])


def warnings_of(report: dict[str, Any], data: SFTData | DPOData) -> list[str]:
    """What a person should know before training on this data.

    Raises:
        DataError: if preference data is worse than the recipe accepts.
    """
    said = check_preferences(report["preferences"], data.preferences) if isinstance(data, DPOData) else []
    if overlap := report["validation_overlap"] if data.clean.validation_overlap == "keep" else 0:
        remedy = "data.clean.validation_overlap: drop leaves them out"
        said.append(f"{_rows(overlap, 'ask')} what a held-out row asks: {remedy}")
    spelt = report["oddities"].get("control_token_as_text", {"rows": 0, "example": ""})
    if spelt["rows"] > SUSPICIOUS * report["rows_kept"]:
        what = f"{_rows(spelt['rows'], 'spell')} control tokens, e.g. {spelt['example']}; they are read as plain text"
        said.append(f"{what}: if the rows are rendered already, give their messages instead")
    if report["duplicates"]:
        remedy = "data.clean.duplicates: drop keeps one of each"
        said.append(f"{_rows(report['duplicates'], 'repeat')} an earlier one: {remedy}")
    return said


def _rows(count: int, verb: str) -> str:
    return f"1 row {verb}s" if count == 1 else f"{count:,} rows {verb}"


def _check_alone() -> None:
    """Raises AssertionError inside an initialised process group: others would wait for longer than it allows."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise AssertionError("data is prepared before a process group exists, never inside one")


def _apart(documents: Documents, train: Ints, held: Documents, held_out: Ints, clean: CleanSection) -> tuple[Ints, int]:
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
        named = {str(i): shares[name_of(s)] for i, s in enumerate(data.sources) if name_of(s) in shares}
        mixture["shares"] = {**named, OTHER_KEY: shares.get(OTHER_KEY)}
    weights = [{code: rule.weight for code, rule in source.rules.items()} for source in data.sources]
    asked = [mixture, weights if any(weights) else None, data.clean.validation_overlap]
    return asked if asked != [None, None, "keep"] else []


def cached_only(recipe: Recipe) -> bool:
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
        note = build_documents(staging, recipe, sources, chat)
        if _files(recipe, sources) != content:
            paths = ", ".join(source.path for source in sources)
            raise DataError(paths, "changed while it was read", "run again when nothing writes into it any more")
        return {**note, "files": files}

    def opened(folder: Path, note: dict[str, Any]) -> Documents:
        try:
            documents = open_documents(folder, **renamed_note(note, files)["documents"])
        except (ValueError, OSError, EOFError, KeyError, TypeError) as error:
            raise cache.Damaged(str(error)) from None
        return replace(
            documents, source_names=privacy.names(held), private_sources=privacy.hidden_sources(held),
            private_files=privacy.hidden_files(documents.prefixes),
        )  # fmt: skip

    documents, note, hit = cache.make(KIND, key, build, opened, "prepared data")
    report = renamed_note(note, files)["report"]
    report = {**report, "sources": [_under_its_name(*pair) for pair in zip(report["sources"], sources, strict=True)]}
    whole = {"key": key, "report": report, "renamed": other_names(note, files)}
    return documents, {**whole, "content": _identity(documents, content, key)}, hit


def _under_its_name(figures: dict[str, Any], source: Source) -> dict[str, Any]:
    """What is reported of a source, with the names that it has in this recipe."""
    named = {"path": source.path, **({"alias": source.alias} if source.alias else {})}
    return {**named, **{key: value for key, value in figures.items() if key not in ("path", "alias")}}


def _identity(documents: Documents, files: tuple[list[str], list[SourceContent]], key: str) -> list[Any]:
    """Identifies documents: the bytes of the files and the tokens made of them. Neither names nor versions count."""
    evaluations, sources = files
    digests = cache.digests(KIND, key)
    whole = _hash_of(documents.offsets, documents.languages, documents.sources)
    tokens = [digests[IDS], digests[TRAINED], whole, documents.language_names, documents.parts]
    return [tokens, evaluations, [(source.rows, source.tools, source.reads) for source in sources]]


def _hash_of(*arrays: Ints) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _files(recipe: Recipe, sources: Sequence[Source]) -> tuple[list[str], list[SourceContent]]:
    """What is in the files that evaluations and sources name."""
    asked = recipe.data.clean.decontaminate
    evaluations = [] if asked is None else [content_hash(expand(name)) for name in asked.files]
    return evaluations, [source_content(source) for source in sources]


def _key(recipe: Recipe, files: tuple[list[str], list[SourceContent]], chat: ChatTokenizer) -> str:
    """Hash of everything that decides documents on disk: content and settings, and the code and packages at work."""
    data = recipe.data
    arranging = {"sources", "validation_sources", "validation_size", "packing", "mixture", "preferences"}
    settings = data.model_dump(mode="json", exclude=arranging)
    settings["clean"].pop("validation_overlap")
    settings["clean"]["decontaminate"] = {**(settings["clean"]["decontaminate"] or {}), "files": None}
    return cache.key_of([software(), recipe.method, chat.fingerprint, settings, *files])


@lru_cache(maxsize=1)
def software() -> list[str]:
    """What makes documents of rows: this package's own code and shipped formats, and the packages that it uses."""
    package = Path(__file__).parents[1]
    code = [file for folder in ("chat", "data") for file in sorted((package / folder).glob("*.py"))]
    formats = sorted((shipped("data_templates") / "formats").glob("*.yaml"))
    own = content_hash([*code, package / "conversation.py", *formats])
    return [own, unicodedata.unidata_version, *(f"{name} {version(name)}" for name in PACKAGES)]
