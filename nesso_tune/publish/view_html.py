"""Rows as a page that opens offline: what is learned, control tokens, and every token's border and id on hover."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from nesso_tune.publish.markup import shown
from nesso_tune.publish.view import Part, Piece, ViewRow
from nesso_tune.publish.view_text import visible

STYLE = """
:root { --paper: #fff; --ink: #1d1d1f; --quiet: #6b6b70; --learned: #c9f0d0; --learned-ink: #0b3d17; --control: #7d2fb0;
  --line: #d8d8dc; --note: #fff3cd }
@media (prefers-color-scheme: dark) { :root { --paper: #161618; --ink: #ececef; --quiet: #9a9aa2; --learned: #17492a;
  --learned-ink: #d5f5dc; --control: #d59bff; --line: #3a3a40; --note: #4a3c0c } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; padding: 1rem;
  max-width: 62rem }
h1 { font-size: 1.25rem; overflow-wrap: anywhere } h2 { font-size: 1rem; margin: 2rem 0 .5rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 }
dt { color: var(--quiet) } dd { margin: 0; overflow-wrap: anywhere }
.note { background: var(--note); padding: .5rem .75rem; border-radius: .4rem }
.legend { display: flex; flex-wrap: wrap; gap: .5rem 1rem; margin: 1rem 0; font: 13px/1.6 ui-monospace, monospace }
article { border: 1px solid var(--line); border-radius: .4rem; margin: 0 0 .6rem; overflow: hidden }
header { font-size: .8rem; color: var(--quiet); padding: .25rem .75rem; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere }
.text { font: 13px/1.65 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  padding: .5rem .75rem }
.t { color: var(--quiet); border-radius: .15rem }
.t.learned { color: var(--learned-ink); background: var(--learned) }
.t.control { color: var(--control); font-weight: 600 }
.text:hover .t, .text:focus-within .t { box-shadow: inset -1px 0 0 var(--line) }
.t:hover { outline: 1px solid var(--control) }
"""


def page(title: str, rows: Sequence[ViewRow], facts: Mapping[str, str], notes: Iterable[str]) -> str:
    """The whole page. It asks no server for anything."""
    body = [
        f"<h1>{shown(title)}</h1>",
        *(f'<p class="note">{shown(note)}</p>' for note in notes),
        "<dl>", *(f"<dt>{shown(name)}</dt><dd>{shown(value)}</dd>" for name, value in facts.items()), "</dl>",
        '<p class="legend"><span class="t learned">learned</span><span class="t">not learned</span>'
        '<span class="t control">control token</span><span class="t learned control">control token, learned</span>'
        "<span>hover: borders and ids of tokens</span></p>",
        *(line for row in rows for line in _row(row)),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>preview: {shown(title)}</title>\n<style>{STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def _row(row: ViewRow) -> Iterator[str]:
    yield f'<section data-row="{row.number}">'
    yield f"<h2>Row {row.number + 1}: {row.tokens:,} tokens, {row.learned:,} learned</h2>"
    for i, part in enumerate(row.parts, 1):
        yield _part(part, f"{i} of {len(row.parts)}" if part.name == "conversation" else part.name)
    yield "</section>"


def _part(part: Part, name: str) -> str:
    """A document as one card: its border in the pack."""
    head = f"{name} · {part.language} · {part.source} · {part.tokens:,} tokens, {part.learned:,} learned"
    spans = "".join(map(_span, part.pieces))
    return (
        f'<article data-part="{part.name}" data-language="{shown(part.language)}">'
        f'<header>{shown(head)}</header><div class="text">{spans}</div></article>'
    )


def _span(piece: Piece) -> str:
    kinds = ["t", *(["learned"] if piece.learned else []), *(["control"] if piece.control else [])]
    ids = " ".join(map(str, piece.ids))
    said = f"token {piece.position}, id {ids}: {'learned' if piece.learned else 'not learned'}"
    return f'<span class="{" ".join(kinds)}" data-ids="{ids}" title="{said}">{shown(visible(piece))}</span>'
