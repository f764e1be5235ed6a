"""Encodes conversations as token ids and labels. Masks follow from the segments; no text is searched for markers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from nesso_tune.chat.render import (
    BOS,
    Segment,
    TrainOnEos,
    TurnsToTrain,
    answer_segments,
    prompt_segments,
    segments,
    text_segments,
    with_system_and_tools,
)
from nesso_tune.chat.template import ChatTemplate, DefaultSystem
from nesso_tune.conversation import Conversation, Message, PreferencePair

Tools = Sequence[Mapping[str, Any]]
IGNORE_INDEX = -100  # label of a token that is not supervised


@dataclass
class Encoded:
    """An encoded document: token ids, supervision mask and turn ends.

    Attributes:
        ids: token ids.
        trained: for each token, whether it is supervised.
        turn_ends: for each turn, the position after its end token.
    """

    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)

    @property
    def labels(self) -> list[int]:
        """Token ids where supervised, -100 elsewhere; unshifted."""
        return [token if yes else IGNORE_INDEX for token, yes in zip(self.ids, self.trained, strict=True)]

    def cut_to(self, length: int, learn_end: bool = False) -> Encoded | None:
        """The document truncated after the last supervised turn that ends within `length`; None if there is none.

        Args:
            length: maximum number of tokens.
            learn_end: supervise the new last token, an end token, even if it was not supervised before.
        """
        starts = [0, *self.turn_ends]
        for start, end in reversed(list(zip(starts, self.turn_ends, strict=False))):
            if end <= length and any(self.trained[start : end - 1]):  # more than an end token
                trained = [*self.trained[: end - 1], self.trained[end - 1] or learn_end]
                return Encoded(self.ids[:end], trained, [e for e in self.turn_ends if e <= end])
        return None


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a preference pair; both answers end with the end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a token that is in the vocabulary."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


class ChatEncoder:
    """Encodes batches of conversations, texts and preference pairs with one tokenizer and one template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        bos_id: int | None = None,
        default_system: DefaultSystem = None,
    ) -> None:
        """`tokenizer` must contain all control tokens; its `encode_special_tokens` is set to True in place."""
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        self._template = template
        self._default_system = default_system
        self._control: dict[str, int] = {token: token_id(tokenizer, token) for token in template.control_tokens}
        if bos_id is not None:
            self._control[BOS] = bos_id
        self._fixed: dict[str, list[int]] = {}
        special = {i: str(token) for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._special = frozenset(special)
        self._special_texts = re.compile("|".join(re.escape(text) for text in special.values()) or "(?!)")

    def conversations(
        self,
        conversations: Iterable[Conversation],
        roles_to_train: Collection[str] = ("assistant",),
        train_on_eos: TrainOnEos = "turn",
        turns_to_train: TurnsToTrain = "all",
    ) -> list[Encoded]:
        """Encodes conversations; see `render.segments` for the supervised tokens."""
        complete = (with_system_and_tools(c, self._template, self._default_system) for c in conversations)
        return self._encode(
            [segments(c, self._template, roles_to_train, train_on_eos, turns_to_train) for c in complete]
        )

    def texts(self, texts: Sequence[str], learn_end: bool = True) -> list[Encoded]:
        """Encodes plain texts (format `completion`), fully supervised, each followed by the end token."""
        start = [Segment(BOS, "control")] if self._template.bos else []
        return self._encode([[*start, *text_segments(text, self._template, learn_end)] for text in texts])

    def pairs(self, pairs: Sequence[PreferencePair]) -> list[EncodedPair]:
        """Encodes pairs as prompt (including the assistant's header), chosen and rejected answer (with end token)."""
        prompts = [self._prompt_segments(pair.prompt, pair.language, pair.tools) for pair in pairs]
        answers = [
            answer_segments(pair.prompt, message, self._template)
            for pair in pairs
            for message in (pair.chosen, pair.rejected)
        ]
        encoded = self._encode([*prompts, *answers])
        prompt, answer = encoded[: len(pairs)], encoded[len(pairs) :]
        return [EncodedPair(prompt[i].ids, answer[2 * i].ids, answer[2 * i + 1].ids) for i in range(len(pairs))]

    def prompt(self, messages: Sequence[Message], language: str, tools: Tools = ()) -> list[int]:
        """Token ids of a prompt for generation: the messages and the assistant's header."""
        return self._encode([self._prompt_segments(messages, language, tools)])[0].ids

    @property
    def template(self) -> ChatTemplate:
        """The chat template."""
        return self._template

    def _prompt_segments(self, messages: Sequence[Message], language: str, tools: Tools) -> list[Segment]:
        conversation = Conversation(tuple(messages), tuple(tools), language=language)
        return prompt_segments(
            with_system_and_tools(conversation, self._template, self._default_system), self._template
        )

    def _encode(self, documents: list[list[Segment]]) -> list[Encoded]:
        """Encodes documents; texts that repeat, such as a system message, are tokenized once."""
        texts = list(dict.fromkeys(s.text for document in documents for s in document if s.kind == "content"))
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        contents = {text: self._plain(text, encoding.ids) for text, encoding in zip(texts, encodings, strict=True)}
        out = []
        for document in documents:
            ids: list[int] = []
            trained: list[bool] = []
            turn_ends: list[int] = []
            for text, kind, learned, ends_turn in document:
                if kind == "content":
                    piece = contents[text]
                elif kind == "control":
                    piece = [self._control[text]]
                else:
                    piece = self._fixed_ids(text)
                ids += piece
                trained += [learned] * len(piece)
                if ends_turn:
                    turn_ends.append(len(ids))
            out.append(Encoded(ids, trained, turn_ends))
        return out

    def _plain(self, text: str, ids: list[int]) -> list[int]:
        """Token ids of a text from the data, without special tokens."""
        return ids if self._special.isdisjoint(ids) else self._split_special(text)

    def _split_special(self, text: str) -> list[int]:
        """Token ids of a text with special tokens that are also words of the vocabulary: split within each of them."""
        cuts = [match.start() + 1 for match in self._special_texts.finditer(text)]
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [i for e in self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False) for i in e.ids]

    def _fixed_ids(self, text: str) -> list[int]:
        if text not in self._fixed:
            self._fixed[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._fixed[text]
