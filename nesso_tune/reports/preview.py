"""Rows as a person sees them: pieces of text with the tokens behind them, what is learned, and what is a control."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from nesso_tune.chat.encoding import IGNORE_INDEX
from nesso_tune.data.prepare import PreparedData, prepare_data
from nesso_tune.errors import RunEnvironmentError
from nesso_tune.hub import base_folder, check_local_base
from nesso_tune.planning.plan import row_name
from nesso_tune.recipes.builtin import BUNDLED_TOKENS, bundled_base, is_result, local_path
from nesso_tune.recipes.schema import Recipe
from nesso_tune.reports.html import made_visible, shown
from nesso_tune.training.dataset import ConversationCollator, PairCollator
from nesso_tune.training.grouped_metrics import Groups

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


@dataclass(frozen=True)
class Preview:
    """Rows to look at.

    Attributes:
        title: what they belong to.
        rows: the first rows of epoch 0.
        facts: about all rows, as `name: value`.
        notes: what a reader must know, e.g. that another tokenizer stands in.
    """

    title: str
    rows: tuple[ViewRow, ...]
    facts: dict[str, str]
    notes: tuple[str, ...] = ()

    def to_html(self) -> str:
        """One page that opens offline."""
        return page(self.title, self.rows, self.facts, self.notes)

    def to_text(self, width: int = 80, colour: bool = False) -> str:
        """Lines of at most `width` cells; without colours, what is learned stands between ⟦ and ⟧."""
        return "\n".join(lines(self.rows, self.facts, self.notes, width, colour))

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        return self.to_html()


def preview(recipe: Recipe, count: int = 2) -> Preview:
    """The first `count` rows of a recipe (packed rows in SFT, pairs in DPO), as they are trained in epoch 0.

    Raises:
        NessoError: as `prepare_data`.
    """
    recipe, notes = _with_tokenizer(recipe)
    data = prepare_data(recipe)
    shown = range(min(count, len(data.train)))
    row_of = _packed if recipe.method == "sft" else _pair
    report = data.report
    facts = {
        "rows": f"{len(shown)} of {len(data.train):,} {row_name(recipe)} an epoch",
        "tokens": f"{report['train']['tokens']:,} an epoch, {report['train']['supervised_tokens']:,} of them learned",
        "fill": f"{report['packing']['fill']:.1%} of each row" if recipe.method == "sft" else "one pair a row",
        "dropped": ", ".join(f"{n:,} {reason}" for reason, n in report["dropped"].items()) or "none",
        "template": f"ends turns with {data.chat.template.eos_token}",
    }
    return Preview(recipe.output_dir, tuple(row_of(recipe, data, i) for i in shown), facts, notes)


def _with_tokenizer(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe, with the bundled tokenizer where its own is not at hand: the same masks over other tokens."""
    base = recipe.model.base
    check_local_base(recipe.model.model_copy(update={"random_init": True}))  # weights are not needed yet
    if local_path(base).exists():
        return recipe, ()
    with suppress(RunEnvironmentError):
        if not is_result(base):
            base_folder(base, recipe.model.revision)
            return recipe, ()
    model = recipe.model.model_copy(update={"base": bundled_base(), "revision": None})
    note = (
        f"the tokenizer of {base} is not at hand: a small bundled one stands in. What is learned is the same; tokens, "
        "their number and the packing are not, and rows may be twice as long"
    )
    length = BUNDLED_TOKENS * recipe.data.sequence_len
    data = recipe.data.model_copy(update={"sequence_len": length, "too_long": "drop"})
    chat = recipe.chat.model_copy(update={"pad_token": None})
    return recipe.model_copy(update={"model": model, "data": data, "chat": chat}), (note,)


def _packed(recipe: Recipe, data: PreparedData, number: int) -> ViewRow:
    """A packed row, with the labels that the collator gives to the trainer."""
    row, documents = data.train[number], data.train.documents
    batch = ConversationCollator(data.chat.pad_id, Groups.of(documents))([row])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    parts, start = [], 0
    for entry, language, length in zip(data.train.members(number), row["languages"], row["seq_lengths"], strict=True):
        end = start + length
        source = recipe.data.sources[int(documents.sources[entry])].path
        learned = [label != IGNORE_INDEX for label in labels[start:end]]
        parts.append(Part("conversation", language, source, pieces_of(ids[start:end], learned, data.chat.backend)))
        start = end
    return ViewRow(number, tuple(parts))


def _pair(recipe: Recipe, data: PreparedData, number: int) -> ViewRow:
    """A pair as prompt, chosen and rejected answer, with the mask that the collator gives to the trainer."""
    row, documents = data.train[number], data.train.documents
    (entry,) = data.train.members(number)
    batch = PairCollator(data.chat.pad_id, Groups.of(documents))([row])
    source = recipe.data.sources[int(documents.sources[entry])].path
    parts = [
        Part(name, row["languages"][0], source, pieces_of(ids, learned, data.chat.backend))
        for name, ids, learned in _sides(batch)
    ]
    return ViewRow(number, tuple(parts))


def _sides(batch: dict[str, Any]) -> Iterator[tuple[str, list[int], list[bool]]]:
    """Prompt, chosen and rejected answer of a collated pair, each with what is learned of it."""
    sides = zip(
        ("chosen", "rejected"), batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    )
    for name, ids, real, completion in sides:
        answer = [bool(c) for c, r in zip(completion.tolist(), real.tolist(), strict=True) if r]
        tokens = [token for token, r in zip(ids.tolist(), real.tolist(), strict=True) if r]
        start = answer.index(True)
        if name == "chosen":
            yield "prompt", tokens[:start], answer[:start]
        yield name, tokens[start:], answer[start:]
