"""Names of files in what is cached: data is its content, so it may have been prepared under other names than today's.

A place is `FILE:LINE`, `FILE row N`, or such a one with words around it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from nesso_tune.data.files import GLOB, expand, is_local
from nesso_tune.data.record_reader import OTHER
from nesso_tune.data.sources import is_here
from nesso_tune.errors import DataError
from nesso_tune.files import atomic_replace
from nesso_tune.recipes.builtin import OF_SOURCE, local_path, reader_file
from nesso_tune.recipes.schema import Recipe, dump
from nesso_tune.recipes.sections import CleanSection, DataSection, Source

Names = Mapping[str, str]  # of files, as they were called and as they are called
NUMBER = re.compile(r"(?::| row )\d+")  # ends the name of a file in a place
BEFORE = re.compile(r": of |: |^of ")  # what may stand before it


def file_names(sources: Sequence[Source], clean: CleanSection) -> list[str]:
    """What the files of sources and of evaluation texts are called, in the order in which they are read."""
    names = [
        name for source in sources for name in (map(str, expand(source.path)) if is_here(source) else [source.path])
    ]
    evaluations = clean.decontaminate.files if clean.decontaminate else ()
    return [*names, *(str(file) for path in evaluations for file in expand(path))]


def renamed(text: str, names: Names) -> str:
    """A text with the names of files in its places replaced."""
    starts = [0, *(before.end() for before in BEFORE.finditer(text))]
    out, done = "", 0
    for number in NUMBER.finditer(text):
        for start in starts:
            if done <= start <= number.start() and (new := names.get(text[start : number.start()])) is not None:
                out, done = f"{out}{text[done:start]}{new}", number.start()
                break
    return out + text[done:]


def other_names(note: Mapping[str, Any], files: Sequence[str]) -> Names:
    """Which files of prepared data are called otherwise today. Raises ValueError if their number is another."""
    return {old: new for old, new in zip(note["files"], files, strict=True) if old != new}


def renamed_note(note: Mapping[str, Any], files: Sequence[str]) -> Mapping[str, Any]:
    """What is noted of prepared data, with every place in it and every prefix of places under today's names."""
    names = other_names(note, files)
    if not names:
        return note
    prefixes = [renamed(f"{prefix}0", names)[:-1] for prefix in note["documents"]["prefixes"]]
    report = _each(note["report"], names)
    return {**note, "report": report, "documents": {**note["documents"], "prefixes": prefixes}}


def _each(value: Any, names: Names) -> Any:
    if isinstance(value, dict):
        return {key: _each(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_each(item, names) for item in value]
    return renamed(value, names) if isinstance(value, str) else value


def write_renamed(lines: Path, names: Names, file: Path) -> None:
    """Copies a list of dropped rows, with their places under today's names."""
    with (
        atomic_replace(file, durable=False) as staging,
        lines.open(encoding="utf-8") as listed,
        staging.open("w", encoding="utf-8", errors="backslashreplace") as out,
    ):
        out.writelines(json.dumps(_each(json.loads(line), names), ensure_ascii=False) + "\n" for line in listed)


HIDDEN = "…"
LISTS = ("sources", "validation_sources")
OPEN = frozenset({"private", "weight", "max_rows", "min_score"})  # keys of a private source that tell nothing of it
LANGUAGE = re.compile(r"[A-Za-z]{2,3}(?:[-_]\w{2,4})?|auto|other|[iI]talian[o]?|[eE]nglish")
SHIPPED_FORMAT = re.compile(r"[a-z_]+")
OF = ": of "  # what comes after it is the place of the row that another one repeats
DIGEST = re.compile(r"(.+) #[0-9a-f]{16}", re.DOTALL)
ABOUT_DATA = re.compile(r"(?:--set=)?(?:[^:=]*:)?(data\.(?:sources|validation_sources|mixture|clean\.decontaminate)|"
                        r"data\.clean|data|train\.best_metric)(?=[.=\[]|$)")  # fmt: skip
WORD = re.compile(r"[^\s/\\:=,;\[\]{}\"']+")
VERBS = ("train", "launch")  # of a command line: no words of its user
Hide = Callable[[str, Any], str]  # what stands for a value of a source that is called so
DEFAULTS = Source(path="-").model_dump(mode="json")


def name_of(source: Source) -> str:
    """What a source is called in reports and shares, by its own recipe."""
    return source.alias or source.path


@dataclass(frozen=True)
class Privacy:
    """Decides for a recipe's `data` section."""

    data: DataSection

    @cached_property
    def _private(self) -> tuple[Source, ...]:
        return tuple(source for source in (*self.data.sources, *self.data.validation_sources) if source.private)

    @cached_property
    def _files(self) -> frozenset[object]:
        """The files of private sources: those that are read, and those that say how."""
        return frozenset(file for source in self._private for text in _paths(source) for file in _identities(text))

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(name for source in self._private for name in (source.path, source.alias) if name)

    def __bool__(self) -> bool:
        """Whether there is anything to hide."""
        return bool(self._private)

    @cached_property
    def _hidden(self) -> dict[bool, frozenset[int]]:
        lists = {False: self.data.sources, True: self.data.validation_sources}
        return {held: frozenset(i for i, s in enumerate(of) if self._hides(s)) for held, of in lists.items()}

    def _hides(self, source: Source) -> bool:
        """Whether a source is called by its number.

        So is a public one that reads nothing but what a private one reads. A folder that holds other files too has its
        name; a pattern may spell that of a private file.
        """
        if source.private or not self:
            return source.private
        if not self._names.isdisjoint((source.path, source.alias)):
            return True
        if source.tools_file is not None and not self._files.isdisjoint(_identities(source.tools_file)):
            return True  # the tools stand in its rows
        own = frozenset(_identities(source.path))
        return not own.isdisjoint(self._files) and (own <= self._files or bool(GLOB & set(source.path)))

    def names(self, held: bool = False) -> tuple[str, ...]:
        """What the sources are called; those of `validation_sources` if `held`."""
        kind = "private validation source" if held else "private source"
        sources = self.data.validation_sources if held else self.data.sources
        hidden = self._hidden[held]
        return tuple(f"{kind} {i + 1}" if i in hidden else name_of(s) for i, s in enumerate(sources))

    def hidden_sources(self, held: bool = False) -> frozenset[int]:
        """Indices of the sources that are called by their number."""
        return self._hidden[held]

    @cached_property
    def _split(self) -> tuple[list[Source], list[Source]]:
        """The sources that are called by their number, and those that have their name."""
        lists = ((False, self.data.sources), (True, self.data.validation_sources))
        hidden = [s for held, of in lists for i, s in enumerate(of) if i in self._hidden[held]]
        return hidden, [s for held, of in lists for i, s in enumerate(of) if i not in self._hidden[held]]

    def hidden_files(self, prefixes: Sequence[str]) -> frozenset[int]:
        """Of what stands before a row's number in its place, the indices of private files."""
        return frozenset(i for i, prefix in enumerate(prefixes) if not self.shows_place(f"{prefix}1"))

    def shows_place(self, place: str) -> bool:
        """Whether the place of a row, with what is said after it, names nothing private.

        Names of files may hold anything: what cannot be told to be public is not shown.
        """
        if not self:
            return True
        ends = [place[: found.start()] for found in NUMBER.finditer(place)]
        files = [file.rpartition(OF)[2] for file in ends] + ends
        if any(self._is_private_file(file) for file in files):
            return False
        return any(_holds(source, file) for source in self._split[1] for file in files)

    def _is_private_file(self, file: str) -> bool:
        own = file in self._names or any(_holds(source, file) for source in self._private)
        return own or _identity(Path(file)) in self._files

    def groups(self, languages: Iterable[str]) -> dict[str, str]:
        """What the groups of an epoch are called, by their own names: sources, and languages of sources."""
        if self.data.mixture is not None and self.data.mixture.by == "language":
            return {}
        pairs = list(zip(map(name_of, self.data.sources), self.names(), strict=True))
        each = {f"{name} {code}": f"{shown} {code}" for code in languages for name, shown in pairs}
        return each | dict(pairs)

    def metric(self, metric: str) -> str:
        """The name of a metric as it is written: `eval_loss/source/ALIAS` with the number of a private source."""
        whole, by_source, name = metric.partition(OF_SOURCE)
        held = bool(self.data.validation_sources)
        sources = self.data.validation_sources if held else self.data.sources
        shown = dict(zip(map(name_of, sources), self.names(held), strict=True))
        return f"{whole}{by_source}{shown.get(name, name)}"

    def recipe(self, recipe: Recipe, hide: Hide = lambda name, value: name) -> dict[str, Any]:
        """The recipe as plain data that others may read: in it `hide` says what stands for what is private."""
        raw = deepcopy(dump(recipe))
        if not self:
            return raw
        for key, held in zip(LISTS, (False, True), strict=True):
            names = [(name, i in self._hidden[held]) for i, name in enumerate(self.names(held))]
            entries = zip(names, raw["data"][key], strict=True)
            raw["data"][key] = [self._entry(*named, entry, hide) for named, entry in entries]
        if raw["data"]["mixture"] is not None and raw["data"]["mixture"]["by"] == "source":
            raw["data"]["mixture"]["shares"] = self._shares(raw["data"]["mixture"]["shares"])
        if (evaluations := raw["data"]["clean"]["decontaminate"]) is not None:
            files = [self._path(text, "private file", hide) for text in evaluations["files"]]
            if files != evaluations["files"] and evaluations["fields"]:
                evaluations["fields"] = hide("private columns", evaluations["fields"])
            evaluations["files"] = files
        if raw["train"]["best_metric"] is not None:
            raw["train"]["best_metric"] = self.metric(raw["train"]["best_metric"])
        return raw

    def _entry(self, name: str, hidden: bool, entry: dict[str, Any], hide: Hide) -> dict[str, Any]:
        if hidden:
            return {key: v if _is_open(key, v) else hide(name, v) for key, v in entry.items()}
        ways = ("format", "reads")  # a public source may be read as a private one is
        return {key: self._path(value, "private file", hide) if key in ways else value for key, value in entry.items()}

    def _path(self, value: Any, name: str, hide: Hide) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._path(item, name, hide) for item in value]
        if not isinstance(value, str) or self._files.isdisjoint(_identities(reader_file(value))):
            return value
        return hide(name, value)

    def _shares(self, shares: Mapping[str, float]) -> dict[str, float]:
        known = dict(zip(map(name_of, self.data.sources), self.names(), strict=True)) | {OTHER: OTHER}
        return {known.get(name, f"unknown source {i}"): share for i, (name, share) in enumerate(shares.items(), 1)}

    def command(self, words: Sequence[str]) -> list[str]:
        """The words of a command line, without those that name what is private."""
        return [self._word(word) for word in words] if self else list(words)

    def _word(self, word: str) -> str:
        if word in VERBS:
            return word
        if found := ABOUT_DATA.match(word):
            said = word[found.end() :]
            plain = found[1] == "data" and re.fullmatch(r"\.[a-z_]+=[\w.]+", said)
            return word if plain and not self._tells(said) else f"{word[: found.end()]}{HIDDEN}"
        return HIDDEN if self._tells(word) else word

    def _tells(self, text: str) -> bool:
        """Whether a text has a private text in it, or a name of one as a word of its own."""
        names = self._telling
        return (
            any(name in text for name in self._names)
            or not names.isdisjoint(WORD.findall(text))
            or (not names.isdisjoint(_parts(text)))
        )

    @cached_property
    def _telling(self) -> frozenset[str]:
        """Words that only private entries say: their texts, and the names of folders and files in them."""
        hidden, shown = self._split
        private = {part for source in hidden for key, value in source.model_dump(mode="json").items()
                   if not _is_open(key, value) for part in _parts(value)}  # fmt: skip
        public = {part for source in shown for part in _parts(source.path)}
        here = set(_parts(str(Path.cwd())))
        return frozenset(part for part in private - public - here if len(part) > 2)

    def changes(self, changed: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
        """Keys of the recipe that changed, with both values, as others may read them."""
        out: dict[str, tuple[Any, Any]] = {}
        for key, values in changed.items():
            found = ABOUT_DATA.match(key) if self else None
            plain = found is None or (found[1] in ("data", "data.clean") and not self._tells(json.dumps([key, values])))
            out[key if plain or found is None else found[1]] = values if plain else (HIDDEN, HIDDEN)
        return out


def recorded(recipe: Recipe, salt: str) -> dict[str, Any]:
    """The recipe for a manifest: what is private as salted digests, so that a change of it is noticed."""
    return Privacy(recipe.data).recipe(recipe, lambda name, value: f"{name} #{_digest(value, salt)}")


def as_recorded(old: Any, recipe: Recipe, salt: str) -> dict[str, Any]:
    """The recipe as an earlier manifest records its own: digests stand where they stand in `old`."""
    raw = dump(recipe)
    numbers = {name_of(source): f"private source {i}" for i, source in enumerate(recipe.data.sources, 1)}
    if raw["data"]["mixture"] is not None:
        before = ((old.get("data") or {}).get("mixture") or {}).get("shares") or {}
        shares = raw["data"]["mixture"]["shares"].items()
        raw["data"]["mixture"]["shares"] = {
            numbers[name] if numbers.get(name) in before else name: share for name, share in shares
        }
    if (metric := raw["train"]["best_metric"]) is not None:
        shown = Privacy(recipe.data).metric(metric)
        raw["train"]["best_metric"] = shown if (old.get("train") or {}).get("best_metric") == shown else metric
    alike: dict[str, Any] = _alike(old, raw, salt)
    return alike


def _alike(old: Any, new: Any, salt: str) -> Any:
    if isinstance(old, str) and (found := DIGEST.fullmatch(old)):
        return f"{found[1]} #{_digest(new, salt)}"
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {key: _alike(old.get(key), value, salt) for key, value in new.items()}
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [_alike(a, b, salt) for a, b in zip(old, new, strict=True)]
    return new


def _digest(value: Any, salt: str) -> str:
    return hashlib.sha256(f"{salt} {json.dumps(value, sort_keys=True)}".encode()).hexdigest()[:16]


def _is_open(key: str, value: Any) -> bool:
    """Whether a key of a private source may be shown: a count, a language, or what nobody wrote there."""
    if key in OPEN or value == DEFAULTS[key]:
        return True
    if key == "language":
        return bool(LANGUAGE.fullmatch(value))
    if key == "rules":
        return all(map(LANGUAGE.fullmatch, value))
    return key == "format" and bool(SHIPPED_FORMAT.fullmatch(value)) and not Path(value).exists()


def _paths(source: Source) -> Iterator[str]:
    """The paths that a source names: of its rows, and of how they are read."""
    yield source.path
    for value in (source.tools_file, source.format, *getattr(source, "reads", ())):
        if value is not None and not SHIPPED_FORMAT.fullmatch(value):
            yield reader_file(value)


def _identities(text: str) -> Iterator[object]:
    """What a path means, so that two that mean the same are equal: files, and the id of a data set of the hub."""
    if not is_local(text):
        yield text
        return
    root = local_path(text)
    if not root.is_dir():
        yield _identity(root)
    try:
        yield from map(_identity, expand(text))
    except DataError:  # not there, or no data: its own name is all that there is
        return


def _identity(path: Path) -> object:
    """A file on its disk, whatever leads to it; its whole path where it is not there."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return str(path.absolute())
    return found.st_dev, found.st_ino


def _holds(source: Source, file: str) -> bool:
    """Whether a file, or a data set of the hub, is the source's, or could be by its pattern."""
    path, here = local_path(source.path), Path(file)
    pattern = str(path).replace("**/", "*")
    return file == source.path or here == path or path in here.parents or fnmatchcase(file, pattern)


def _parts(value: Any) -> Iterator[str]:
    """The texts in a value, and the names in them."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from (*_parts(key), *_parts(item))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, str):
        yield value
        for name in re.split(r"[/\\:]", value):
            yield from {name, name.partition(".")[0]}
