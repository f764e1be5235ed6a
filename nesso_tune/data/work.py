"""What is done with a block of rows in one process: read, cleaned, encoded, fitted, and looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from nesso_tune.chat.encoding import Encoded, EncodedPair
from nesso_tune.chat.tokenizer import ChatTokenizer
from nesso_tune.conversation import Completion, Conversation, PreferencePair, Tokenized
from nesso_tune.data.blocks import Block
from nesso_tune.data.contamination import Contamination
from nesso_tune.data.convert import Item
from nesso_tune.data.documents import Chunk
from nesso_tune.data.identity import identity_of
from nesso_tune.data.languages import answers_in_another
from nesso_tune.data.marks import marks_of
from nesso_tune.data.near import signature_of
from nesso_tune.data.read import Drop, Reading
from nesso_tune.data.tools import Unusable
from nesso_tune.errors import DataError
from nesso_tune.recipes.data import DPOData, SFTData


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

    readings: Sequence[Reading]
    data: SFTData | DPOData
    chat: ChatTokenizer
    contamination: Contamination | None = None

    def __call__(self, task: tuple[int, Block]) -> Worked:
        """The entries of a block of the source with this index.

        Raises:
            DataError: for a row that is none, and where the recipe does not let rows be dropped.
        """
        source, block = task
        done = Worked(source, 0, block.size, Chunk(block.prefix))
        items: list[tuple[Item, int]] = []
        for row, number in block.numbered():
            done.rows += 1
            where = f"{block.prefix}{number}"
            try:
                item = self.readings[source].item(row, where)
                if isinstance(item, Tokenized) and not 0 <= min(item.input_ids) <= max(item.input_ids) < self.chat.size:
                    raise Unusable("id_outside_vocabulary", f"the tokenizer has {self.chat.size:,} ids")
                if self.contamination is not None and (of := self.contamination.found_in(item)) is not None:
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

    def _add(self, item: Item, entry: Encoded | EncodedPair, number: int, where: str, done: Worked) -> None:
        mismatched = isinstance(item, PreferencePair) and answers_in_another(item)
        done.chunk.add(entry, item.language, number, identity_of(item), mismatched)
        for mark in marks_of(item, self.chat.template.control_tokens):
            done.marks[mark] += 1
            done.marked.setdefault(mark, where)
        if self.data.clean.near_duplicates is not None:
            done.signatures += signature_of(item).tobytes()

    def _encoded(self, items: list[Item]) -> list[Encoded | EncodedPair]:
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
