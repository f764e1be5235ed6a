"""What makes two rows the same: 64-bit hashes of what is said in them."""

from __future__ import annotations

import hashlib
import json
import zipfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nesso_tune.chat.encoding import IGNORED, Encoded, EncodedPair
from nesso_tune.conversation import Completion, Conversation, Message, Tokenized
from nesso_tune.data.convert import Example

NOTHING = 0


class Identity(NamedTuple):
    """Hashes of an item.

    Attributes:
        whole: of all turns and tools.
        prompt: of the turns before the last answer; of all where there is no answer.
        chosen, rejected: of the answers of a pair, with its prompt; else 0.
    """

    whole: int
    prompt: int
    chosen: int = NOTHING
    rejected: int = NOTHING


def identity_of(item: Example) -> Identity:
    """The hashes of an item. Neither its language nor its source counts."""
    if isinstance(item, Tokenized):
        key = _hash(",".join(map(str, item.input_ids)))
        return Identity(key, key)
    if isinstance(item, Completion):
        key = _hash(item.text)
        return Identity(key, key)
    tools = json.dumps(item.tools, ensure_ascii=False) if item.tools else ""
    if isinstance(item, Conversation):
        said = _said(item.messages)
        answered = next((i for i in reversed(range(len(said))) if item.messages[i].role == "assistant"), len(said))
        return Identity(_hash(tools, *said), _hash(*said[:answered]))
    prompt = _said(item.prompt)
    chosen, rejected = _said([item.chosen, item.rejected])
    return Identity(
        _hash(tools, *prompt, chosen, rejected), _hash(*prompt), _hash(*prompt, chosen), _hash(*prompt, rejected)
    )


def _said(messages: Iterable[Message]) -> list[str]:
    return [f"{m.role}\x1f{m.content}\x1f{json.dumps(m.tool_calls) if m.tool_calls else ''}" for m in messages]


def _hash(*texts: str) -> int:
    digest = hashlib.blake2b("\x1e".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


Ints = npt.NDArray[Any]
ID, LEARNED = np.dtype("<i4"), np.dtype("u1")
IDS, TRAINED, ENTRIES = "ids.bin", "trained.bin", "entries.npz"


@dataclass
class Chunk:
    """Encoded entries that were made of one block.

    Attributes:
        prefix: what stands before a row's number in its place.
        ids, trained: of all their documents, laid end to end.
        lengths: of each document.
        learned: supervised tokens of each entry.
        languages: code of each entry.
        numbers: number of each entry's row in its file.
        identities: hashes of each entry, four in a row; see `Identity`.
        mismatched: 1 for a pair with an answer in another language than its prompt.
    """

    prefix: str
    ids: array[int] = field(default_factory=lambda: array("i"))
    trained: bytearray = field(default_factory=bytearray)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    learned: array[int] = field(default_factory=lambda: array("q"))
    languages: list[str] = field(default_factory=list)
    numbers: array[int] = field(default_factory=lambda: array("q"))
    identities: array[int] = field(default_factory=lambda: array("Q"))
    mismatched: bytearray = field(default_factory=bytearray)

    def add(
        self, entry: Encoded | EncodedPair, language: str, number: int, identity: Identity, mismatched: bool = False
    ) -> None:
        """Appends one conversation, text or pair."""
        if isinstance(entry, Encoded):
            trained = bytes(entry.trained)
            self.ids.extend(entry.ids)
            self.lengths.append(len(entry.ids))
        else:
            parts = (entry.prompt, entry.chosen, entry.rejected)
            for part in parts:
                self.ids.extend(part)
            self.lengths.extend(map(len, parts))
            trained = bytes(len(entry.prompt)) + b"\1" * (len(entry.chosen) + len(entry.rejected))
        self.trained += trained
        self.learned.append(trained.count(1))
        self.languages.append(language)
        self.numbers.append(number)
        self.identities.extend(identity)
        self.mismatched.append(mismatched)


@dataclass(frozen=True)
class Documents:
    """Documents of one kind, by position.

    Attributes:
        ids: all token ids, int32.
        trained: 1 where a token is learned; for pairs 1 in the answers.
        offsets: where each document begins in `ids`, and the end: one more than there are documents.
        learned: supervised tokens, per conversation or pair.
        languages: index into `language_names`, per conversation or pair.
        sources: index of the source it comes from, per conversation or pair.
        files: index into `prefixes`, per conversation or pair.
        numbers: number of its row in that file, per conversation or pair.
        identities: see `Identity`, per conversation or pair.
        mismatched: 1 for a pair with an answer in another language than its prompt.
        kept: entries that are used; the others are duplicates that the recipe asked to drop.
        language_names: codes of the languages that occur.
        prefixes: what stands before a row's number in its place, by file.
        parts: documents per entry: 1 (conversations) or 3 (pairs).
        source_names: what the sources are called in figures.
        private_sources, private_files: indices of those that are not named in what others may read; see `privacy.py`.
    """

    ids: Ints
    trained: Ints
    offsets: Ints
    learned: Ints
    languages: Ints
    sources: Ints
    files: Ints
    numbers: Ints
    identities: Ints
    mismatched: Ints
    kept: Ints
    language_names: tuple[str, ...]
    prefixes: tuple[str, ...]
    parts: int
    source_names: tuple[str, ...] = ()
    private_sources: frozenset[int] = frozenset()
    private_files: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.languages)

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of each entry, all its parts together."""
        return np.diff(self.offsets[:: self.parts])

    @cached_property
    def spans(self) -> Ints:
        """Tokens that must fit into a sequence: of a conversation all, of a pair its prompt and longer answer."""
        if self.parts == 1:
            return self.lengths
        sizes = np.diff(self.offsets).reshape(-1, self.parts)
        longest: Ints = sizes[:, 0] + sizes[:, 1:].max(axis=1, initial=0)
        return longest

    def part(self, entry: int, part: int = 0) -> slice:
        """Where one part of an entry stands in `ids`."""
        position = entry * self.parts + part
        return slice(int(self.offsets[position]), int(self.offsets[position + 1]))

    def input_ids(self, entry: int, part: int = 0) -> Ints:
        """Token ids of one part of an entry."""
        return self.ids[self.part(entry, part)]

    def labels(self, entry: int) -> Ints:
        """Labels of a conversation: ids where learned, -100 elsewhere."""
        here = self.part(entry)
        return np.where(self.trained[here], self.ids[here], IGNORED)

    def language(self, entry: int) -> str:
        """Language code of an entry."""
        return self.language_names[int(self.languages[entry])]

    def source(self, entry: int) -> str:
        """What the source of an entry is called."""
        return self.source_names[int(self.sources[entry])] if self.source_names else ""

    def place(self, entry: int) -> str:
        """Where an entry's row stands: `file:line`, or `file row N`."""
        return f"{self.prefixes[int(self.files[entry])]}{self.numbers[entry]}"

    def are_private(self, entries: Ints) -> npt.NDArray[np.bool_]:
        """Which entries are of a private source or file: nothing of these is shown."""
        of_source = np.isin(self.sources[entries], list(self.private_sources))
        return of_source | np.isin(self.files[entries], list(self.private_files))

    def is_private(self, entry: int) -> bool:
        """Whether one entry is."""
        return bool(self.are_private(np.array([entry]))[0])

    def shown_place(self, entry: int) -> str:
        """Where an entry's row stands, as others may read it: of a private one its source's number."""
        return f"{self.source(entry)}, row {self.numbers[entry]}" if self.is_private(entry) else self.place(entry)

    def counts(self, entries: Ints) -> dict[str, int]:
        """Rows, tokens and supervised tokens of some entries."""
        tokens, learned = (int(of[entries].sum()) for of in (self.lengths, self.learned))
        return {"rows": len(entries), "tokens": tokens, "supervised_tokens": learned}


class DocumentWriter:
    """Writes documents into a folder, chunk by chunk; of each entry only a few numbers are held in memory."""

    def __init__(self, folder: Path, parts: int) -> None:
        self._folder, self.parts = folder, parts
        self._ids, self._trained = (folder / IDS).open("wb"), (folder / TRAINED).open("wb")
        self._lengths, self._learned, self._numbers, self._identities = array("q"), array("q"), array("q"), array("Q")
        self._languages, self._sources, self._files = array("i"), array("i"), array("i")
        self._mismatched = bytearray()
        self._names: dict[str, int] = {}
        self._prefixes: dict[str, int] = {}

    def write(self, chunk: Chunk, source: int) -> None:
        """Appends the entries of a chunk that come from the `source`-th source."""
        self._ids.write(np.frombuffer(chunk.ids, np.intc).astype(ID, copy=False).tobytes())
        self._trained.write(chunk.trained)
        self._lengths.extend(chunk.lengths)
        self._learned.extend(chunk.learned)
        self._numbers.extend(chunk.numbers)
        self._identities.extend(chunk.identities)
        self._mismatched += chunk.mismatched
        entries = len(chunk.languages)
        self._languages.extend(self._names.setdefault(code, len(self._names)) for code in chunk.languages)
        self._sources.extend([source] * entries)
        self._files.extend([self._prefixes.setdefault(chunk.prefix, len(self._prefixes))] * entries)

    def close(self) -> dict[str, Any]:
        """Finishes the files; returns what `open_documents` needs besides them."""
        self._ids.close()
        self._trained.close()
        offsets = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]).astype(np.int64)
        entries = len(self._languages)
        self._entries = {
            "offsets": offsets,
            "learned": np.array(self._learned, np.int64),
            "languages": np.array(self._languages, np.int32),
            "sources": np.array(self._sources, np.int32),
            "files": np.array(self._files, np.int32),
            "numbers": np.array(self._numbers, np.int64),
            "identities": np.array(self._identities, np.uint64).reshape(entries, len(Identity._fields)),
            "mismatched": np.frombuffer(self._mismatched, np.uint8),
        }
        self.keep(np.arange(entries))
        return {"languages": list(self._names), "prefixes": list(self._prefixes), "parts": self.parts}

    def keep(self, entries: Ints) -> None:
        """Notes which entries are used; all of them if it is never called."""
        with (self._folder / ENTRIES).open("wb") as stream:
            columns: dict[str, Any] = {"kept": entries.astype(np.int64), **self._entries}
            np.savez(stream, **columns)


def open_documents(folder: Path, languages: Sequence[str], prefixes: Sequence[str], parts: int) -> Documents:
    """Maps documents that a `DocumentWriter` wrote.

    Raises:
        ValueError, OSError, EOFError, KeyError: if a file is missing, damaged, or does not fit the others.
    """
    try:
        with np.load(folder / ENTRIES) as stored:
            columns = {name: stored[name] for name in stored.files}
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from None
    offsets, entries = columns["offsets"], len(columns["languages"])
    total = int(offsets[-1])
    if len(offsets) != entries * parts + 1 or any(
        len(columns[name]) != entries for name in ("learned", "sources", "files", "numbers", "identities", "mismatched")
    ):
        raise ValueError("entries of different number")
    if [(folder / name).stat().st_size for name in (IDS, TRAINED)] != [total * ID.itemsize, total * LEARNED.itemsize]:
        raise ValueError("files of different length")
    ids, trained = (
        np.memmap(folder / name, dtype=kind, mode="r", shape=(total,)) if total else np.zeros(0, kind)
        for name, kind in ((IDS, ID), (TRAINED, LEARNED))
    )
    return Documents(ids, trained, **columns, language_names=tuple(languages), prefixes=tuple(prefixes), parts=parts)
