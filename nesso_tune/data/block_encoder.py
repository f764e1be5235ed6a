"""Encodes blocks of rows, in the worker processes. Loads no numpy."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

from nesso_tune.chat.encoding import Encoded, EncodedPair
from nesso_tune.chat.tokenizer import ChatTokenizer
from nesso_tune.conversation import Completion, Conversation, Message, PreferencePair, Tokenized
from nesso_tune.data.anomalies import find_anomalies
from nesso_tune.data.blocks import Block
from nesso_tune.data.columns import Row, UnreadCounts, Unusable
from nesso_tune.data.convert import Example
from nesso_tune.data.languages import has_language_mismatch
from nesso_tune.data.personal_data import PersonalDataSearch, mask_personal_data
from nesso_tune.data.reasoning import apply_reasoning
from nesso_tune.data.record_reader import Drop, DropCounter, RecordReader
from nesso_tune.data.remedies import remedy_of
from nesso_tune.data.report import Anomaly, PersonalData
from nesso_tune.errors import DataError
from nesso_tune.recipes.sections import DPOData, SFTData, Source

_NO_HASH = 0  # for the answers of a record that is not a pair


@dataclass
class Chunk:
    """Encoded records of one block of a file.

    Attributes:
        prefix: location of a row without its number, e.g. `FILE:`.
        ids, supervised: token ids and loss mask of all documents, concatenated.
        lengths: tokens of each document.
        supervised_counts: supervised tokens of each record.
        languages: language code of each record.
        numbers: row number of each record in its file.
        identities: four content hashes per record, concatenated; see `Identity`.
        mismatched: 1 for a pair with an answer in another language than its prompt.
    """

    prefix: str
    ids: array[int] = field(default_factory=lambda: array("i"))
    supervised: bytearray = field(default_factory=bytearray)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    supervised_counts: array[int] = field(default_factory=lambda: array("q"))
    languages: list[str] = field(default_factory=list)
    numbers: array[int] = field(default_factory=lambda: array("q"))
    identities: array[int] = field(default_factory=lambda: array("Q"))
    mismatched: bytearray = field(default_factory=bytearray)

    def add(
        self, record: Encoded | EncodedPair, language: str, number: int, identity: Identity, mismatched: bool = False
    ) -> None:
        """Appends one conversation, text or pair."""
        if isinstance(record, Encoded):
            mask = bytes(record.trained)
            self.ids.extend(record.ids)
            self.lengths.append(len(record.ids))
        else:
            parts = (record.prompt, record.chosen, record.rejected)
            for part in parts:
                self.ids.extend(part)
            self.lengths.extend(map(len, parts))
            mask = bytes(len(record.prompt)) + b"\1" * (len(record.chosen) + len(record.rejected))
        self.supervised += mask
        self.supervised_counts.append(mask.count(1))
        self.languages.append(language)
        self.numbers.append(number)
        self.identities.extend(identity)
        self.mismatched.append(mismatched)

    def sizes(self) -> Iterator[tuple[int, int, int]]:
        """The hash, the tokens of all documents, and the supervised tokens of each record."""
        records = len(self.languages)
        documents = len(self.lengths) // max(1, records)
        for i in range(records):
            length = sum(self.lengths[i * documents : (i + 1) * documents])
            yield self.identities[i * len(Identity._fields)], length, self.supervised_counts[i]


class Identity(NamedTuple):
    """64-bit content hashes of a record: equal for records with the same text.

    Attributes:
        whole: hash of all turns and tools.
        prompt: hash of the turns before the last answer, or of all turns if there is no answer.
        chosen, rejected: hashes of a pair's answers, each with the prompt; 0 for other records.
    """

    whole: int
    prompt: int
    chosen: int = _NO_HASH
    rejected: int = _NO_HASH


def identity_of(item: Example) -> Identity:
    """The content hashes of a record; its language and its source do not count."""
    if isinstance(item, Tokenized):
        key = _hash(",".join(map(str, item.input_ids)))
        return Identity(key, key)
    if isinstance(item, Completion):
        key = _hash(item.text)
        return Identity(key, key)
    tools = json.dumps(item.tools, ensure_ascii=False) if item.tools else ""
    if isinstance(item, Conversation):
        turns = _turn_texts(item.messages)
        last = next((i for i in reversed(range(len(turns))) if item.messages[i].role == "assistant"), len(turns))
        return Identity(_hash(tools, *turns), _hash(*turns[:last]))
    prompt = _turn_texts(item.prompt)
    chosen, rejected = _turn_texts([item.chosen, item.rejected])
    return Identity(
        _hash(tools, *prompt, chosen, rejected), _hash(*prompt), _hash(*prompt, chosen), _hash(*prompt, rejected)
    )


def _turn_texts(messages: Iterable[Message]) -> list[str]:
    """Role, content, tool calls and reasoning of each message, separated by control characters."""
    return [
        f"{m.role}\x1f{m.content}\x1f{json.dumps(m.tool_calls) if m.tool_calls else ''}"
        + (f"\x1f{m.reasoning}" if m.reasoning else "")
        for m in messages
    ]


def _hash(*texts: str) -> int:
    digest = hashlib.blake2b("\x1e".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


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
        unread: columns and message keys that were not read.
        signatures: MinHash of each record, concatenated, if near duplicates are to be found.
        personal_data: what was found of each kind of personal data.
        lengths: number of rows of each length in tokens, with those that are too long.
    """

    source: int
    rows: int
    size: int
    chunk: Chunk
    dropped: list[Drop] = field(default_factory=list)
    anomalies: Counter[str] = field(default_factory=Counter)
    anomaly_examples: dict[str, str] = field(default_factory=dict)
    unread: UnreadCounts = field(default_factory=UnreadCounts)
    signatures: bytearray = field(default_factory=bytearray)
    personal_data: dict[str, PersonalData] = field(default_factory=dict)
    lengths: Counter[int] = field(default_factory=Counter)

    def drop(self, where: str, why: Unusable, mask: bool) -> None:
        """Adds a dropped row; the detail may quote the row, so that personal data in it can be masked."""
        self.dropped.append(Drop(where, str(why), mask_personal_data(why.detail) if mask else why.detail))

    def count_anomalies(self, names: Iterable[str], where: str) -> None:
        """Counts the anomalies of the record at `where`."""
        for name in names:
            self.anomalies[name] += 1
            self.anomaly_examples.setdefault(name, where)


@dataclass(frozen=True)
class BlockEncoder:
    """Converts and encodes blocks of rows; called in the worker processes.

    Attributes:
        readings: how to read each source.
        data: the recipe's `data` section.
        chat: the tokenizer.
        contamination: finds where the evaluation text is that an example contains; None if it contains none.
        signature: computes the MinHash of an example, if near duplicates are to be found.
    """

    readings: Sequence[RecordReader]
    data: SFTData | DPOData
    chat: ChatTokenizer
    contamination: Callable[[Example], str | None] | None = None
    signature: Callable[[Example], bytes] | None = None

    def __call__(self, task: tuple[int, Block]) -> EncodedBlock:
        """Encodes a block, given as (index of the source, block).

        Raises:
            DataError: for a row that cannot be read, and for an unusable one if the recipe does not allow dropping it.
        """
        source, block = task
        result = EncodedBlock(source, 0, block.size, Chunk(block.prefix))
        items: list[tuple[Example, int, set[str]]] = []
        for record, number in block.numbered_records():
            result.rows += 1
            where, row = f"{block.prefix}{number}", Row(record)
            try:
                example = self.readings[source].read(row, where)
                result.unread.add(row)
                example = apply_reasoning(example, self.data, self.chat.template, where)
                item = self._search_personal_data(example, where, result)
                if isinstance(item, Tokenized) and not 0 <= min(item.input_ids) <= max(item.input_ids) < self.chat.size:
                    raise Unusable("id_outside_vocabulary", f"the tokenizer has {self.chat.size:,} ids")
                if self.contamination is not None and (of := self.contamination(item)) is not None:
                    raise Unusable("contains_evaluation_text", of)
                items.append((item, number, row.anomalies))
            except Unusable as why:
                result.drop(where, why, self.data.clean.personal_data is not None)
        encodings = self._encode([item for item, _, _ in items])
        for (item, number, anomalies), encoded in zip(items, encodings, strict=True):
            where = f"{block.prefix}{number}"
            try:
                self._add(item, self._fit(encoded, where, result.lengths), number, where, result)
                result.count_anomalies(anomalies, where)
            except Unusable as why:
                result.drop(where, why, self.data.clean.personal_data is not None)
        return result

    def _search_personal_data(self, item: Example, where: str, result: EncodedBlock) -> Example:
        """The item, masked if the recipe says so. Raises Unusable if it is to be dropped."""
        action = self.data.clean.personal_data
        if action is None:
            return item
        if isinstance(item, Tokenized):
            what = "has token ids, in which data.clean.personal_data cannot search"
            raise DataError(where, what, "give the texts, or remove personal_data")
        search = PersonalDataSearch(mask=action == "mask")
        item = search.example(item)
        is_private = self.readings[result.source].source.private
        for kind, values in search.values.items():
            found = PersonalData(1, values, where, "" if is_private else search.contexts[kind])
            result.personal_data[kind] = result.personal_data[kind] + found if kind in result.personal_data else found
        if action == "drop" and search.values:
            raise Unusable("personal_data", ", ".join(f"{values} {kind}" for kind, values in search.values.items()))
        return item

    def _add(
        self, item: Example, encoded: Encoded | EncodedPair, number: int, where: str, result: EncodedBlock
    ) -> None:
        mismatched = isinstance(item, PreferencePair) and has_language_mismatch(item)
        result.chunk.add(encoded, item.language, number, identity_of(item), mismatched)
        result.count_anomalies(find_anomalies(item, self.chat.template.control_tokens), where)
        if self.signature is not None:
            result.signatures += self.signature(item)

    def _encode(self, items: list[Example]) -> list[Encoded | EncodedPair]:
        """Encodes all items, those of one type as a batch; returns them in order."""
        encoder, data = self.chat.encoder, self.data
        if not isinstance(data, SFTData):
            return list(encoder.pairs([item for item in items if isinstance(item, PreferencePair)]))
        conversations = [item for item in items if isinstance(item, Conversation)]
        texts = [item.text for item in items if isinstance(item, Completion)]
        encoded = {
            Conversation: iter(
                encoder.conversations(conversations, data.roles_to_train, data.train_on_eos, data.turns_to_train)
            ),
            Completion: iter(encoder.texts(texts, learn_end=data.train_on_eos != "none")),
        }
        return [
            Encoded(list(item.input_ids), [label >= 0 for label in item.labels])
            if isinstance(item, Tokenized) else next(encoded[type(item)])
            for item in items
        ]  # fmt: skip

    def _fit(self, encoded: Encoded | EncodedPair, where: str, lengths: Counter[int]) -> Encoded | EncodedPair:
        """The encoded record, truncated if the recipe says so; counts its length.

        Raises:
            Unusable: if it cannot be trained on.
        """
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
        lengths[length] += 1
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


class BlockCounters:
    """Totals over all blocks."""

    def __init__(self, sources: int) -> None:
        self.rows = [0] * sources
        self.dropped = [DropCounter() for _ in range(sources)]
        self.anomalies: dict[str, Anomaly] = {}
        self.personal_data: dict[str, PersonalData] = {}
        self.unread = [UnreadCounts() for _ in range(sources)]
        self.lengths: Counter[int] = Counter()

    def add(self, block: EncodedBlock) -> None:
        self.rows[block.source] += block.rows
        self.unread[block.source].merge(block.unread)
        self.lengths.update(block.lengths)
        for drop in block.dropped:
            self.drop(block.source, drop)
        for name, rows in block.anomalies.items():
            seen = self.anomalies.get(name, Anomaly(0, block.anomaly_examples[name]))
            self.anomalies[name] = replace(seen, rows=seen.rows + rows)
        for kind, found in block.personal_data.items():
            self.personal_data[kind] = self.personal_data[kind] + found if kind in self.personal_data else found

    def drop(self, source: int, drop: Drop) -> None:
        self.dropped[source].add(drop)

    @property
    def all_dropped(self) -> DropCounter:
        total = DropCounter()
        for drops in self.dropped:
            total.merge(drops)
        return total


def no_usable_rows(sources: Sequence[Source], counters: BlockCounters) -> DataError:
    """The error for sources of which every row was dropped, with the reasons."""
    dropped = counters.all_dropped
    why = "; ".join(f"{reason}: {n}, e.g. {dropped.examples[reason]}" for reason, n in dropped.most_common())
    main = dropped.most_common(1)[0][0] if dropped else ""
    return DataError(
        ", ".join(source.path for source in sources),
        f"none of {sum(counters.rows):,} rows can be used ({why or 'there are no rows'})",
        remedy_of(main),
    )
