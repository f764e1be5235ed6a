"""Private sources: what may be shown of a recipe and of its data in files that others read.

A private source is shown as `private source N`; so is a public source that reads only files of a private one. In the
manifest of a run, private values are stored as salted digests, so that a change of them is still detected.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from nesso_tune.data.files import expand, is_glob, is_local
from nesso_tune.data.locations import ROW_NUMBER
from nesso_tune.data.record_reader import OTHER_KEY
from nesso_tune.data.report import Unread
from nesso_tune.errors import DataError
from nesso_tune.recipes.builtin import SOURCE_SEPARATOR, local_path, reader_file
from nesso_tune.recipes.schema import Recipe, dump
from nesso_tune.recipes.sections import DataSection, Source

HIDDEN = "…"
_SOURCE_KEYS = ("sources", "validation_sources")
_SHOWN_KEYS = frozenset({"private", "weight", "max_rows", "min_score"})  # keys of a private source that reveal nothing
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(?:[-_]\w{2,4})?|auto|other|[iI]talian[o]?|[eE]nglish")
_BUILTIN_FORMAT = re.compile(r"[a-z_]+")
_REPEATED_ROW = ": of "  # precedes the location of the row that a duplicate repeats
_DIGEST = re.compile(r"(.+) #[0-9a-f]{16}", re.DOTALL)
_DATA_KEY = re.compile(r"(?:--set=)?(?:[^:=]*:)?(data\.(?:sources|validation_sources|mixture|clean\.decontaminate)|"
                       r"data\.clean|data|train\.best_metric)(?=[.=\[]|$)")  # fmt: skip
_WORD = re.compile(r"[^\s/\\:=,;\[\]{}\"']+")
_VERBS = ("train", "launch")  # words of a command line that the user did not choose
_DEFAULTS = Source(path="-").model_dump(mode="json")
Placeholder = Callable[[str, Any], str]  # (public name, private value) -> what is shown instead of the value


def source_name(source: Source) -> str:
    """Name of a source in its own recipe: its alias, or its path."""
    return source.alias or source.path


def manifest_recipe(recipe: Recipe, salt: str) -> dict[str, Any]:
    """The recipe as the manifest of a run stores it: private values as salted digests."""
    return Privacy(recipe.data).shown_recipe(recipe, lambda name, value: f"{name} #{_digest(value, salt)}")


def comparable_recipe(old: Any, recipe: Recipe, salt: str) -> dict[str, Any]:
    """The recipe in the form of an earlier `manifest_recipe`, `old`: with digests where `old` has them."""
    raw = dump(recipe)
    numbers = {source_name(source): f"private source {i}" for i, source in enumerate(recipe.data.sources, 1)}
    if raw["data"]["mixture"] is not None:
        before = ((old.get("data") or {}).get("mixture") or {}).get("shares") or {}
        shares = raw["data"]["mixture"]["shares"].items()
        raw["data"]["mixture"]["shares"] = {
            numbers[name] if numbers.get(name) in before else name: share for name, share in shares
        }
    if (metric := raw["train"]["best_metric"]) is not None:
        shown = Privacy(recipe.data).metric_name(metric)
        raw["train"]["best_metric"] = shown if (old.get("train") or {}).get("best_metric") == shown else metric
    comparable: dict[str, Any] = _with_digests_of(old, raw, salt)
    return comparable


@dataclass(frozen=True)
class Privacy:
    """What may be shown of a recipe's `data` section. True if there is anything to hide."""

    data: DataSection

    def __bool__(self) -> bool:
        return bool(self._private)

    def source_names(self, validation: bool = False) -> tuple[str, ...]:
        """Public names of the sources, or of the validation sources."""
        kind = "private validation source" if validation else "private source"
        sources = self.data.validation_sources if validation else self.data.sources
        hidden = self._hidden[validation]
        return tuple(f"{kind} {i + 1}" if i in hidden else source_name(s) for i, s in enumerate(sources))

    def hidden_sources(self, validation: bool = False) -> frozenset[int]:
        """Indices of the sources that are shown by their number."""
        return self._hidden[validation]

    def hidden_files(self, prefixes: Sequence[str]) -> frozenset[int]:
        """Indices of the location prefixes (`FILE:`, `FILE row `) of private files."""
        return frozenset(i for i, prefix in enumerate(prefixes) if not self.shows_location(f"{prefix}1"))

    def shows_location(self, location: str) -> bool:
        """Whether the location of a row, with the details after it, names nothing private.

        File names may contain anything, so a location is shown only if it is certain to be public.
        """
        if not self:
            return True
        ends = [location[: found.start()] for found in ROW_NUMBER.finditer(location)]
        files = [file.rpartition(_REPEATED_ROW)[2] for file in ends] + ends
        if any(self._is_private_file(file) for file in files):
            return False
        return any(_may_read(source, file) for source in self._split[1] for file in files)

    def group_names(self, languages: Iterable[str]) -> dict[str, str]:
        """Public names of the groups of a mixture, by their own names: sources, and languages of sources."""
        if self.data.mixture is not None and self.data.mixture.by == "language":
            return {}
        pairs = list(zip(map(source_name, self.data.sources), self.source_names(), strict=True))
        by_language = {f"{name} {code}": f"{shown} {code}" for code in languages for name, shown in pairs}
        return by_language | dict(pairs)

    def hides_columns(self, source: Source) -> bool:
        """Whether the names of a source's columns are hidden: it is private, or reads a private file."""
        return bool(self) and (source.private or not self._private_files.isdisjoint(_file_ids(source.path)))

    def shown_unread(
        self, counts: Sequence[tuple[Mapping[str, int], Mapping[str, int]]], validation: bool = False
    ) -> tuple[Unread, Unread]:
        """Rows with unread keys, and rows in which these hold text, by the public name of their source.

        The keys of a private source are numbered, and those of a source that reads a private file.

        Args:
            counts: both numbers by column or message key, for each source, or for each validation source.
            validation: which of the two.
        """
        unread: dict[str, Counter[str]] = {}
        texts: dict[str, Counter[str]] = {}
        sources = self.data.validation_sources if validation else self.data.sources
        for source, name, (of_rows, of_texts) in zip(sources, self.source_names(validation), counts, strict=True):
            hides = self.hides_columns(source)
            for number, (key, rows) in enumerate(of_rows.items(), 1):
                shown = f"key {number}" if hides else key
                unread.setdefault(name, Counter())[shown] += rows
                if rows := of_texts.get(key, 0):
                    texts.setdefault(name, Counter())[shown] += rows
        return {name: dict(keys) for name, keys in unread.items()}, {name: dict(keys) for name, keys in texts.items()}

    def metric_name(self, metric: str) -> str:
        """Public name of a metric: `eval_loss/source/ALIAS` with the number of a private source."""
        stem, by_source, name = metric.partition(SOURCE_SEPARATOR)
        validation = bool(self.data.validation_sources)
        sources = self.data.validation_sources if validation else self.data.sources
        shown = dict(zip(map(source_name, sources), self.source_names(validation), strict=True))
        return f"{stem}{by_source}{shown.get(name, name)}"

    def shown_recipe(self, recipe: Recipe, placeholder: Placeholder = lambda name, value: name) -> dict[str, Any]:
        """The recipe as plain data, with private values replaced by `placeholder(public name, value)`."""
        raw = deepcopy(dump(recipe))
        if not self:
            return raw
        for key, validation in zip(_SOURCE_KEYS, (False, True), strict=True):
            hidden, names = self._hidden[validation], self.source_names(validation)
            raw["data"][key] = [
                self._shown_source(name, i in hidden, source, placeholder)
                for i, (name, source) in enumerate(zip(names, raw["data"][key], strict=True))
            ]
        if raw["data"]["mixture"] is not None and raw["data"]["mixture"]["by"] == "source":
            raw["data"]["mixture"]["shares"] = self._shown_shares(raw["data"]["mixture"]["shares"])
        if (evaluations := raw["data"]["clean"]["decontaminate"]) is not None:
            files = [self._shown_path(text, placeholder) for text in evaluations["files"]]
            if files != evaluations["files"] and evaluations["fields"]:
                evaluations["fields"] = placeholder("private columns", evaluations["fields"])
            evaluations["files"] = files
        if raw["train"]["best_metric"] is not None:
            raw["train"]["best_metric"] = self.metric_name(raw["train"]["best_metric"])
        return raw

    def shown_command(self, words: Sequence[str]) -> list[str]:
        """The words of a command line, with private ones replaced by an ellipsis."""
        return [self._shown_word(word) for word in words] if self else list(words)

    def shown_changes(self, changed: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
        """Changed recipe keys with their old and new values, private ones replaced by an ellipsis."""
        out: dict[str, tuple[Any, Any]] = {}
        for key, values in changed.items():
            found = _DATA_KEY.match(key) if self else None
            public = found is None or (
                found[1] in ("data", "data.clean") and not self.reveals(json.dumps([key, values]))
            )
            out[key if public or found is None else found[1]] = values if public else (HIDDEN, HIDDEN)
        return out

    def reveals(self, text: str) -> bool:
        """Whether a text contains the path or alias of a private source, or a word that only private sources have."""
        words = self._private_words
        return bool(self) and (
            any(name in text for name in self._private_names)
            or not words.isdisjoint(_WORD.findall(text))
            or (not words.isdisjoint(_texts_in(text)))
        )

    @cached_property
    def _private(self) -> tuple[Source, ...]:
        return tuple(source for source in (*self.data.sources, *self.data.validation_sources) if source.private)

    @cached_property
    def _private_files(self) -> frozenset[object]:
        """Ids of the files of private sources: those that are read, and those that say how to read them."""
        return frozenset(file for source in self._private for path in _paths(source) for file in _file_ids(path))

    @cached_property
    def _private_names(self) -> frozenset[str]:
        return frozenset(name for source in self._private for name in (source.path, source.alias) if name)

    @cached_property
    def _hidden(self) -> dict[bool, frozenset[int]]:
        """Indices of the sources that are shown by number: {validation: indices}."""
        lists = {False: self.data.sources, True: self.data.validation_sources}
        return {
            validation: frozenset(i for i, source in enumerate(sources) if self._hides(source))
            for validation, sources in lists.items()
        }

    @cached_property
    def _split(self) -> tuple[list[Source], list[Source]]:
        """All sources that are shown by their number, and all that are shown by name."""
        lists = ((False, self.data.sources), (True, self.data.validation_sources))
        hidden = [s for validation, of in lists for i, s in enumerate(of) if i in self._hidden[validation]]
        return hidden, [s for validation, of in lists for i, s in enumerate(of) if i not in self._hidden[validation]]

    @cached_property
    def _private_words(self) -> frozenset[str]:
        """Words that occur only in private sources: their values, and the names of folders and files in them."""
        hidden, shown = self._split
        private = {text for source in hidden for key, value in source.model_dump(mode="json").items()
                   if not _is_shown(key, value) for text in _texts_in(value)}  # fmt: skip
        public = {text for source in shown for text in _texts_in(source.path)}
        here = set(_texts_in(str(Path.cwd())))
        return frozenset(text for text in private - public - here if len(text) > 2)

    def _hides(self, source: Source) -> bool:
        """Whether a source is shown by its number.

        A public source is, too, if all its files are private. A folder with other files keeps its name; a pattern that
        matches a private file does not, because it may spell that file's name.
        """
        if source.private or not self:
            return source.private
        if not self._private_names.isdisjoint((source.path, source.alias)):
            return True
        if source.tools_file is not None and not self._private_files.isdisjoint(_file_ids(source.tools_file)):
            return True  # the tools become part of its rows
        own = frozenset(_file_ids(source.path))
        return not own.isdisjoint(self._private_files) and (own <= self._private_files or is_glob(source.path))

    def _is_private_file(self, file: str) -> bool:
        named = file in self._private_names or any(_may_read(source, file) for source in self._private)
        return named or _file_id(Path(file)) in self._private_files

    def _shown_source(
        self, name: str, hidden: bool, source: dict[str, Any], placeholder: Placeholder
    ) -> dict[str, Any]:
        if hidden:
            return {key: v if _is_shown(key, v) else placeholder(name, v) for key, v in source.items()}
        shared = ("format", "reads")  # a public source may have the reader of a private one
        return {key: self._shown_path(value, placeholder) if key in shared else value for key, value in source.items()}

    def _shown_path(self, value: Any, placeholder: Placeholder) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._shown_path(item, placeholder) for item in value]
        if not isinstance(value, str) or self._private_files.isdisjoint(_file_ids(reader_file(value))):
            return value
        return placeholder("private file", value)

    def _shown_shares(self, shares: Mapping[str, float]) -> dict[str, float]:
        shown = dict(zip(map(source_name, self.data.sources), self.source_names(), strict=True)) | {
            OTHER_KEY: OTHER_KEY
        }
        return {shown.get(name, f"unknown source {i}"): share for i, (name, share) in enumerate(shares.items(), 1)}

    def _shown_word(self, word: str) -> str:
        if word in _VERBS:
            return word
        if found := _DATA_KEY.match(word):
            rest = word[found.end() :]
            simple = found[1] == "data" and re.fullmatch(r"\.[a-z_]+=[\w.]+", rest)
            return word if simple and not self.reveals(rest) else f"{word[: found.end()]}{HIDDEN}"
        return HIDDEN if self.reveals(word) else word


def _with_digests_of(old: Any, new: Any, salt: str) -> Any:
    if isinstance(old, str) and (found := _DIGEST.fullmatch(old)):
        return f"{found[1]} #{_digest(new, salt)}"
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {key: _with_digests_of(old.get(key), value, salt) for key, value in new.items()}
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [_with_digests_of(a, b, salt) for a, b in zip(old, new, strict=True)]
    return new


def _digest(value: Any, salt: str) -> str:
    return hashlib.sha256(f"{salt} {json.dumps(value, sort_keys=True)}".encode()).hexdigest()[:16]


def _is_shown(key: str, value: Any) -> bool:
    """Whether a value of a private source may be shown: a number, a language, a built-in format, or a default."""
    if key in _SHOWN_KEYS or value == _DEFAULTS[key]:
        return True
    if key == "language":
        return bool(_LANGUAGE.fullmatch(value))
    if key == "rules":
        return all(map(_LANGUAGE.fullmatch, value))
    return key == "format" and bool(_BUILTIN_FORMAT.fullmatch(value)) and not Path(value).exists()


def _paths(source: Source) -> Iterator[str]:
    """The paths in a source: of its rows, and of the files that say how to read them."""
    yield source.path
    for value in (source.tools_file, source.format, *getattr(source, "reads", ())):
        if value is not None and not _BUILTIN_FORMAT.fullmatch(value):
            yield reader_file(value)


def _file_ids(path: str) -> Iterator[object]:
    """Ids of the files that a path, pattern or hub id stands for: equal for two paths to the same file."""
    if not is_local(path):
        yield path
        return
    root = local_path(path)
    if not root.is_dir():
        yield _file_id(root)
    try:
        yield from map(_file_id, expand(path))
    except DataError:  # it does not exist or holds no data: only its own name can be compared
        return


def _file_id(path: Path) -> object:
    """Device and inode of a file; its absolute path if it does not exist."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return str(path.absolute())
    return found.st_dev, found.st_ino


def _may_read(source: Source, file: str) -> bool:
    """Whether a file (or a hub id) belongs to a source, or matches its pattern."""
    path, here = local_path(source.path), Path(file)
    pattern = str(path).replace("**/", "*")
    return file == source.path or here == path or path in here.parents or fnmatchcase(file, pattern)


def _texts_in(value: Any) -> Iterator[str]:
    """All strings in a value, and the names of files and folders in them, with and without suffix."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from (*_texts_in(key), *_texts_in(item))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts_in(item)
    elif isinstance(value, str):
        yield value
        for name in re.split(r"[/\\:]", value):
            yield from {name, name.partition(".")[0]}
