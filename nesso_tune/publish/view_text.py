"""Rows in a terminal: what is learned stands out, control tokens are seen, documents have borders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO

from rich.console import Console
from rich.text import Text

from nesso_tune.publish.markup import made_visible
from nesso_tune.publish.view import Part, Piece, ViewRow

LEARNED, MASKED, CONTROL, BORDER = "green", "bright_black", "bold magenta", "cyan"
OPEN, CLOSE = "⟦", "⟧"  # around what is learned, where there are no colours
PARTS = 4  # documents of a row that are shown
HEAD, TAIL = 300, 60  # tokens of a document that are shown, if it has more


def lines(
    rows: Sequence[ViewRow], facts: Mapping[str, str], notes: Iterable[str], width: int, colour: bool
) -> Iterator[str]:
    """Rows as lines of at most `width` cells, with ANSI colours or, without, with marks."""
    for note in notes:
        yield from _printed([Text(f"note: {made_visible(note)}", style="yellow")], width, colour)
    yield from _printed(
        [_legend(colour), *(Text(made_visible(f"{name:<9} {value}")) for name, value in facts.items())], width, colour
    )
    for row in rows:
        shown = row.parts if len(row.parts) <= PARTS + 1 else row.parts[:PARTS]
        blocks = [Text(""), _border(f"row {row.number + 1}: {row.tokens} tokens, {row.learned} learned", width, "═")]
        for i, part in enumerate(shown, 1):
            blocks += [_border(_title(part, i, len(row.parts)), width, "─"), _text(part, colour)]
        if len(shown) < len(row.parts):
            blocks.append(_border(f"{len(row.parts) - len(shown)} more documents in this row: see --html", width, "─"))
        yield from _printed(blocks, width, colour)


def _title(part: Part, i: int, count: int) -> str:
    name = f"{i} of {count}" if part.name == "conversation" else part.name
    title = f"{name} · {part.language} · {part.source} · {part.tokens} tokens, {part.learned} learned"
    return made_visible(title).replace("\n", " ")


def _border(title: str, width: int, line: str) -> Text:
    text = Text(f"{line}{line} {title} ", style=BORDER, no_wrap=True)
    text.truncate(width, overflow="ellipsis")
    text.append(line * max(0, width - text.cell_len))
    return text


def _legend(colour: bool) -> Text:
    if not colour:
        return Text(f"{OPEN}learned{CLOSE}, not learned, <|control|> tokens by their names, ↵ line break")
    return Text.assemble(
        ("learned", LEARNED), ("  not learned  ", MASKED), ("control token", CONTROL), "  ↵ line break"
    )  # fmt: skip


def _text(part: Part, colour: bool) -> Text:
    """The pieces of a document; a long one is cut in the middle, so that its end is seen."""
    start, end = _left_out(part.pieces)
    out, open_now = Text(), False
    for i, piece in enumerate(part.pieces):
        if start <= i < end:
            if i == start:
                cut = part.pieces[start:end]
                tokens, learned = (sum(len(one.ids) for one in some) for some in (cut, [p for p in cut if p.learned]))
                inside = f", {learned} of them learned" if learned else ""
                out.append(f"{CLOSE if open_now else ''} … {tokens} more tokens{inside}: see --html … ", style=BORDER)
                open_now = False
            continue
        if not colour and piece.learned != open_now:
            out.append(OPEN if piece.learned else CLOSE)
            open_now = piece.learned
        out.append(visible(piece), style=_style(piece) if colour else "")
    if open_now:
        out.append(CLOSE)
    out.rstrip()
    return out


def _left_out(pieces: Sequence[Piece]) -> tuple[int, int]:
    """Bounds of what is not shown of a long document: best the middle of what is not learned."""
    if len(pieces) <= HEAD + TAIL:
        return 0, 0
    longest, begin = (0, 0), 0
    for i in range(len(pieces) + 1):
        if i == len(pieces) or pieces[i].learned:
            longest = max(longest, (begin, i), key=lambda run: run[1] - run[0])
            begin = i + 1
    start, end = longest[0] + TAIL, longest[1] - TAIL
    if len(pieces) - (end - start) <= 2 * HEAD and end > start:
        return start, end
    return HEAD, max(HEAD, len(pieces) - TAIL)


def _style(piece: Piece) -> str:
    if piece.control:
        return f"{CONTROL} underline" if piece.learned else CONTROL
    return LEARNED if piece.learned else MASKED


def visible(piece: Piece) -> str:
    """The text of a piece with what cannot be seen made visible, line breaks too."""
    return made_visible(piece.text).replace("\n", "↵\n")


def _printed(blocks: Iterable[Text], width: int, colour: bool) -> Iterator[str]:
    out = StringIO()
    console = Console(
        file=out, width=width, force_terminal=colour, color_system="standard" if colour else None, highlight=False,
        markup=False, emoji=False, legacy_windows=False,
    )  # fmt: skip
    for block in blocks:
        console.print(block, overflow="fold", soft_wrap=False)
    yield from out.getvalue().splitlines()
