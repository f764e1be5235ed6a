"""Rows as a person sees them: pieces of text with the tokens behind them, what is learned, and what is a control."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

LONGEST_CHARACTER = 16  # tokens, for emoji that are made of several
BROKEN = "\ufffd"  # what a character decodes to whose bytes are not all there


@dataclass(frozen=True)
class Piece:
    """One token, or the few that make up one character.

    Attributes:
        text: what they stand for.
        ids: their ids.
        position: of the first one in its document.
        learned: whether the model learns to write them.
        control: whether it is a control token.
    """

    text: str
    ids: tuple[int, ...]
    position: int
    learned: bool
    control: bool


@dataclass(frozen=True)
class Part:
    """A document of a packed row, or one side of a preference pair.

    Attributes:
        name: `conversation`, or `prompt`, `chosen`, `rejected`.
        language: code.
        source: the path that it comes from.
        pieces: its tokens in order.
    """

    name: str
    language: str
    source: str
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def learned(self) -> int:
        """Number of tokens that are learned."""
        return sum(len(piece.ids) for piece in self.pieces if piece.learned)


@dataclass(frozen=True)
class ViewRow:
    """One row of training: documents laid end to end, or one preference pair."""

    number: int
    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(part.tokens for part in self.parts)

    @property
    def learned(self) -> int:
        """Number of tokens that are learned."""
        return sum(part.learned for part in self.parts)


def pieces_of(ids: Sequence[int], learned: Sequence[bool], tokenizer: Tokenizer) -> tuple[Piece, ...]:
    """Token ids as pieces of text. Every id is in exactly one piece; a control token is always one of its own."""
    special = {i: str(token) for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    pieces: list[Piece] = []
    start = 0
    for i in range(len(ids) + 1):  # runs of plain tokens that are all learned, or all not
        if i == len(ids) or ids[i] in special or learned[i] != learned[start]:
            pieces += _run(ids, start, i, learned[start] if start < i else False, tokenizer)
            start = i
        if i < len(ids) and ids[i] in special:
            pieces.append(Piece(special[ids[i]], (ids[i],), i, learned[i], control=True))
            start = i + 1
        if start == len(ids):
            break
    return tuple(pieces)


def _run(ids: Sequence[int], start: int, end: int, learned: bool, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Plain tokens as pieces, each as short as whole characters allow.

    A token is decoded together with those before it, since some tokenizers write a space only between two.
    """
    context = start
    for i in range(start, end):
        before = tokenizer.decode(list(ids[context:start]), skip_special_tokens=False)
        text = tokenizer.decode(list(ids[context : i + 1]), skip_special_tokens=False)[len(before) :]
        whole = text and not text.endswith(BROKEN)
        if whole or i + 1 == end or i + 1 - start >= LONGEST_CHARACTER:
            yield Piece(text, tuple(ids[start : i + 1]), start, learned, control=False)
            context, start = start, i + 1
