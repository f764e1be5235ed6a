"""Preview of training rows: each token with its text, whether it is supervised, and whether it is a control token.

View model first, then the terminal view; the HTML view is `templates/preview.html.j2`. `preview` builds the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from nesso_tune.chat.encoding import IGNORE_INDEX
from nesso_tune.data.prepare import PreparedData, prepare_data
from nesso_tune.data.privacy import source_name
from nesso_tune.data.report import listed_keys, unread_warnings
from nesso_tune.errors import RunEnvironmentError, check_whole, cut_in_the_middle
from nesso_tune.hub import base_folder, check_local_base
from nesso_tune.planning.plan import row_name
from nesso_tune.recipes.builtin import BUNDLED_TOKENS_RATIO, bundled_base, is_run_output, local_path
from nesso_tune.recipes.load import RecipeSource, as_recipe
from nesso_tune.recipes.schema import Recipe
from nesso_tune.reports.html import escape_invisible, render
from nesso_tune.training.dataset import ConversationCollator, PairCollator
from nesso_tune.training.grouped_metrics import Groups

# View model


@dataclass(frozen=True)
class Piece:
    """One token, or the few tokens that encode one character.

    Attributes:
        text: decoded text.
        ids: token ids.
        position: index of the first token in its document.
        supervised: whether the tokens have labels.
        control: whether it is a control token.
    """

    text: str
    ids: tuple[int, ...]
    position: int
    supervised: bool
    control: bool

    @property
    def visible_text(self) -> str:
        """The text with invisible characters escaped and `↵` at line breaks."""
        return escape_invisible(self.text).replace("\n", "↵\n")


@dataclass(frozen=True)
class Part:
    """One document of a packed row, or one part of a preference pair.

    Attributes:
        name: `conversation`, or `prompt`, `chosen`, `rejected`.
        language: language code.
        source: alias or path of the data source.
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
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(len(piece.ids) for piece in self.pieces if piece.supervised)


@dataclass(frozen=True)
class PreviewRow:
    """One training row: a packed row of documents, or one preference pair."""

    number: int
    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(part.tokens for part in self.parts)

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(part.supervised for part in self.parts)


@dataclass(frozen=True)
class Preview:
    """Training rows for display.

    Attributes:
        title: the run's output directory.
        rows: first rows of epoch 0.
        facts: figures of the whole data set, as `name: value`.
        notes: caveats, e.g. that the bundled tokenizer is used instead of the base's own.
    """

    title: str
    rows: tuple[PreviewRow, ...]
    facts: dict[str, str]
    notes: tuple[str, ...] = ()

    def to_html(self) -> str:
        """A self-contained HTML page; it loads nothing from the network."""
        return render("preview.html.j2", title=self.title, rows=self.rows, facts=self.facts, notes=self.notes)

    def to_text(self, width: int = 80, colour: bool = False) -> str:
        """Lines of at most `width` cells. Without colours, supervised text is enclosed in ⟦ and ⟧."""
        return "\n".join(terminal_lines(self.rows, self.facts, self.notes, width, colour))

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        """The page in a frame, so that its styles do not reach the notebook."""
        frame = 'sandbox="allow-scripts" style="width: 100%; height: 32em; border: 0"'
        return f'<iframe {frame} srcdoc="{escape(self.to_html())}"></iframe>'


# Terminal view

SUPERVISED, MASKED, CONTROL, BORDER = "green", "bright_black", "bold magenta", "cyan"
OPEN, CLOSE = "⟦", "⟧"  # around supervised text where there are no colours
MAX_PARTS = 4  # documents shown of a packed row
HEAD, TAIL = 300, 60  # pieces shown at the start and the end of a long document


def terminal_lines(
    rows: Sequence[PreviewRow], facts: Mapping[str, str], notes: Iterable[str], width: int, colour: bool
) -> Iterator[str]:
    """Rows as lines of at most `width` cells, with ANSI colours or with marks around supervised text."""
    for note in notes:
        yield from _wrap([Text(f"note: {escape_invisible(note)}", style="yellow")], width, colour)
    yield from _wrap(
        [_legend(colour), *(Text(escape_invisible(f"{name:<9} {value}")) for name, value in facts.items())],
        width, colour,
    )  # fmt: skip
    for row in rows:
        parts = row.parts if len(row.parts) <= MAX_PARTS + 1 else row.parts[:MAX_PARTS]
        title = f"row {row.number + 1}: {row.tokens} tokens, {row.supervised} supervised"
        blocks = [Text(""), _border(title, width, "═")]
        for i, part in enumerate(parts, 1):
            blocks += [_border(_title(part, i, len(row.parts)), width, "─"), _part_text(part, colour)]
        if len(parts) < len(row.parts):
            blocks.append(_border(f"{len(row.parts) - len(parts)} more documents in this row: see --html", width, "─"))
        yield from _wrap(blocks, width, colour)


def _legend(colour: bool) -> Text:
    if not colour:
        return Text(f"{OPEN}supervised{CLOSE}, not supervised, <|control|> tokens by name, ↵ line break")
    return Text.assemble(
        ("supervised", SUPERVISED), ("  not supervised  ", MASKED), ("control token", CONTROL), "  ↵ line break"
    )  # fmt: skip


def _border(title: str, width: int, line: str) -> Text:
    text = Text(f"{line}{line} {title} ", style=BORDER, no_wrap=True)
    text.truncate(width, overflow="ellipsis")
    text.append(line * max(0, width - text.cell_len))
    return text


def _title(part: Part, i: int, count: int) -> str:
    name = f"{i} of {count}" if part.name == "conversation" else part.name
    source, size = cut_in_the_middle(part.source, 40), f"{part.tokens} tokens, {part.supervised} supervised"
    title = f"{name} · {part.language} · {source} · {size}"
    return escape_invisible(title).replace("\n", " ")


def _part_text(part: Part, colour: bool) -> Text:
    """The pieces of a document; a long one is cut in the middle, so its end stays visible."""
    start, end = _cut(part.pieces)
    out, is_open = Text(), False
    for i, piece in enumerate(part.pieces):
        if start <= i < end:
            if i == start:
                cut = part.pieces[start:end]
                tokens = sum(len(piece.ids) for piece in cut)
                supervised = sum(len(piece.ids) for piece in cut if piece.supervised)
                detail = f", {supervised} of them supervised" if supervised else ""
                out.append(f"{CLOSE if is_open else ''} … {tokens} more tokens{detail}: see --html … ", style=BORDER)
                is_open = False
            continue
        if not colour and piece.supervised != is_open:
            out.append(OPEN if piece.supervised else CLOSE)
            is_open = piece.supervised
        out.append(piece.visible_text, style=_style(piece) if colour else "")
    if is_open:
        out.append(CLOSE)
    out.rstrip()
    return out


def _cut(pieces: Sequence[Piece]) -> tuple[int, int]:
    """Bounds of the pieces to leave out: preferably the middle of the longest unsupervised stretch."""
    if len(pieces) <= HEAD + TAIL:
        return 0, 0
    longest, begin = (0, 0), 0
    for i in range(len(pieces) + 1):
        if i == len(pieces) or pieces[i].supervised:
            longest = max(longest, (begin, i), key=lambda bounds: bounds[1] - bounds[0])
            begin = i + 1
    start, end = longest[0] + TAIL, longest[1] - TAIL
    if len(pieces) - (end - start) <= 2 * HEAD and end > start:
        return start, end
    return HEAD, max(HEAD, len(pieces) - TAIL)


def _style(piece: Piece) -> str:
    if piece.control:
        return f"{CONTROL} underline" if piece.supervised else CONTROL
    return SUPERVISED if piece.supervised else MASKED


def _wrap(blocks: Iterable[Text], width: int, colour: bool) -> Iterator[str]:
    out = StringIO()
    console = Console(
        file=out, width=width, force_terminal=colour, color_system="standard" if colour else None, highlight=False,
        markup=False, emoji=False, legacy_windows=False,
    )  # fmt: skip
    for block in blocks:
        console.print(block, overflow="fold", soft_wrap=False)
    yield from out.getvalue().splitlines()


# From a recipe to rows


def preview(recipe: RecipeSource, count: int = 2) -> Preview:
    """The first `count` training rows of epoch 0: packed rows in SFT, pairs in DPO, as the collator emits them.

    Args:
        recipe: a recipe, or what `load_recipe` takes.
        count: number of rows.

    Raises:
        NessoError: as `prepare_data`.
    """
    check_whole("count", count, 1)
    recipe, notes = _with_tokenizer(as_recipe(recipe))
    data = prepare_data(recipe)
    numbers = range(min(count, len(data.train)))
    row_of = _packed_row if recipe.method == "sft" else _pair
    report = data.summary
    facts = {
        "rows": f"{len(numbers)} of {len(data.train):,} {row_name(recipe)} per epoch",
        "tokens": f"{report.train.tokens:,} per epoch, {report.train.supervised_tokens:,} of them supervised",
        "fill": f"{report.packing.fill:.1%} of each row" if recipe.method == "sft" else "one pair per row",
        "dropped": ", ".join(f"{n:,} {reason}" for reason, n in report.dropped.items()) or "none",
        "not read": "; ".join(f"{name}: {listed_keys(keys)}" for name, keys in report.unread.items()) or "none",
        "template": f"ends turns with {data.chat.template.eos_token}",
    }
    notes = (*notes, *unread_warnings(report.unread_texts))
    return Preview(recipe.output_dir, tuple(row_of(recipe, data, i) for i in numbers), facts, notes)


def _with_tokenizer(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe, with the bundled tokenizer if its own is not available locally, and a note about that.

    Which text is supervised does not depend on the tokenizer.
    """
    base = recipe.model.base
    check_local_base(recipe.model.model_copy(update={"random_init": True}))  # weights are not needed yet
    if local_path(base).exists():
        return recipe, ()
    with suppress(RunEnvironmentError):
        if not is_run_output(base):
            base_folder(base, recipe.model.revision)
            return recipe, ()
    model = recipe.model.model_copy(update={"base": bundled_base(), "revision": None})
    note = (
        f"the tokenizer of {base} is not available locally; using a small bundled tokenizer. The same text is "
        "supervised, but token counts and packing differ, and rows may be twice as long"
    )
    length = BUNDLED_TOKENS_RATIO * recipe.data.sequence_len
    data = recipe.data.model_copy(update={"sequence_len": length, "too_long": "drop"})
    chat = recipe.chat.model_copy(update={"pad_token": None})
    return recipe.model_copy(update={"model": model, "data": data, "chat": chat}), (note,)


def _packed_row(recipe: Recipe, data: PreparedData, number: int) -> PreviewRow:
    """A packed row with the labels that the collator gives the trainer."""
    row, documents = data.train[number], data.train.documents
    batch = ConversationCollator(data.chat.pad_id, Groups.of(documents))([row])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    parts, start = [], 0
    for entry, language, length in zip(data.train.members(number), row["languages"], row["seq_lengths"], strict=True):
        end = start + length
        source = source_name(recipe.data.sources[int(documents.sources[entry])])
        supervised = [label != IGNORE_INDEX for label in labels[start:end]]
        parts.append(Part("conversation", language, source, pieces_of(ids[start:end], supervised, data.chat.backend)))
        start = end
    return PreviewRow(number, tuple(parts))


def _pair(recipe: Recipe, data: PreparedData, number: int) -> PreviewRow:
    """A pair as prompt, chosen and rejected answer, with the mask that the collator gives the trainer."""
    row, documents = data.train[number], data.train.documents
    (entry,) = data.train.members(number)
    batch = PairCollator(data.chat.pad_id, Groups.of(documents))([row])
    source = source_name(recipe.data.sources[int(documents.sources[entry])])
    parts = [
        Part(name, row["languages"][0], source, pieces_of(ids, supervised, data.chat.backend))
        for name, ids, supervised in _pair_parts(batch)
    ]
    return PreviewRow(number, tuple(parts))


def _pair_parts(batch: dict[str, Any]) -> Iterator[tuple[str, list[int], list[bool]]]:
    """(name, token ids, supervision mask) of the prompt, chosen and rejected answer of a collated pair."""
    answers = zip(
        ("chosen", "rejected"), batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    )
    for name, ids, attention_mask, completion_mask in answers:
        real = attention_mask.bool()
        tokens, supervised = ids[real].tolist(), completion_mask[real].bool().tolist()
        start = supervised.index(True)
        if name == "chosen":
            yield "prompt", tokens[:start], supervised[:start]
        yield name, tokens[start:], supervised[start:]


MAX_TOKENS_PER_CHARACTER = 16  # emoji sequences take several
REPLACEMENT_CHARACTER = "\ufffd"  # decoded from incomplete UTF-8


def pieces_of(ids: Sequence[int], supervised: Sequence[bool], tokenizer: Tokenizer) -> tuple[Piece, ...]:
    """Splits token ids into pieces of text. Each id is in exactly one piece; a control token is a piece of its own."""
    special = {i: str(token) for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    pieces: list[Piece] = []
    start = 0
    for i, token in enumerate(ids):  # plain tokens are decoded in stretches with the same supervision
        if token in special or supervised[i] != supervised[start]:
            pieces += _text_pieces(ids, start, i, supervised, tokenizer)
            start = i
        if token in special:
            pieces.append(Piece(special[token], (token,), i, supervised[i], control=True))
            start = i + 1
    pieces += _text_pieces(ids, start, len(ids), supervised, tokenizer)
    return tuple(pieces)


def _text_pieces(
    ids: Sequence[int], start: int, end: int, supervised: Sequence[bool], tokenizer: Tokenizer
) -> Iterator[Piece]:
    """Plain tokens as pieces, each as short as whole characters allow.

    Each token is decoded after the previous piece, because some tokenizers write spaces only between tokens.
    """
    context = start
    for i in range(start, end):
        before = tokenizer.decode(list(ids[context:start]), skip_special_tokens=False)
        text = tokenizer.decode(list(ids[context : i + 1]), skip_special_tokens=False)[len(before) :]
        complete = text and not text.endswith(REPLACEMENT_CHARACTER)
        if complete or i + 1 == end or i + 1 - start >= MAX_TOKENS_PER_CHARACTER:
            yield Piece(text, tuple(ids[start : i + 1]), start, supervised[start], control=False)
            context, start = start, i + 1
