"""What the data report is drawn with: one page that opens offline, tiles, bars, tables, histograms and cards.

Every function takes plain texts and numbers and gives back markup: nothing is escaped anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, floor, log2
from typing import Any

from nesso_tune.reports.html import shown

Cell = str | int | float  # a text, a count, or a share of 1, which is drawn too
STYLE = """
:root { --paper: #fff; --ink: #1d1d1f; --quiet: #63636a; --line: #dedee3; --track: #ececf0; --card: #f8f8fa;
  --bar: #2f6fb0; --lost: #b3541e; --limit: #b3261e; --note: #fff3cd; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --paper: #161618; --ink: #ececef; --quiet: #a0a0a8; --line: #3a3a40;
  --track: #2a2a2f; --card: #1e1e21; --bar: #6aa5e0; --lost: #e2935c; --limit: #ff8a80; --note: #4a3c0c } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem }
h3 { font-size: .95rem; margin: 1.5rem 0 .5rem }
p { margin: .3rem 0; overflow-wrap: anywhere } .lead { font-size: 1.05rem; margin: .5rem 0 1rem }
.quiet { color: var(--quiet); font-size: .85rem } .where { font: 12px/1.5 ui-monospace, monospace; color: var(--quiet) }
.note { background: var(--note); padding: .5rem .75rem; border-radius: .4rem; margin: .5rem 0 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1.25rem 0 0 }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem }
.tiles dt { color: var(--quiet); font-size: .85rem }
.tiles dd { margin: 0; font-size: .8rem; color: var(--quiet); overflow-wrap: anywhere }
.tiles dd:first-of-type { font-size: 1.35rem; font-weight: 600; color: var(--ink); line-height: 1.3 }
.bar { display: block; height: .6rem; border-radius: .3rem; background: var(--track); overflow: hidden }
.bar i { display: block; height: 100%; min-width: 2px; background: var(--bar) } .lost .bar i { background: var(--lost) }
ul { list-style: none; margin: 0; padding: 0 } li { margin: 0 0 1rem }
li .name { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem }
table { border-collapse: collapse; width: 100% } .scroll { overflow-x: auto; margin: 0 0 1.25rem }
td, .name { font-variant-numeric: tabular-nums }
td, th { border-bottom: 1px solid var(--line); padding: .35rem 1rem .35rem 0; text-align: left; vertical-align: top;
  overflow-wrap: anywhere }
td:last-child, th:last-child { padding-right: 0 }
th { color: var(--quiet); font-size: .85rem; font-weight: 500; vertical-align: bottom; overflow-wrap: normal }
.n { text-align: right; overflow-wrap: normal; white-space: nowrap; width: 7rem } th.n { white-space: normal }
.share { text-align: right; white-space: nowrap; width: 11rem } th.share { white-space: normal }
td.share .bar { display: inline-block; width: 6rem; margin-left: .75rem; text-align: left }
tr.over td { color: var(--limit); font-weight: 600 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.25rem }
figure { margin: 0 } figcaption { font-weight: 600 }
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { font: 11px system-ui, sans-serif; fill: var(--quiet) }
svg text { stroke: var(--paper); stroke-width: 3px; paint-order: stroke } svg .mark { fill: var(--ink) }
svg rect { fill: var(--bar) } svg .axis { stroke: var(--line) }
svg .at { stroke: var(--ink); stroke-dasharray: 3 3 } svg .limit { stroke: var(--limit); stroke-width: 1.5 }
svg .mark.far { fill: var(--limit) }
article { border: 1px solid var(--line); border-radius: .5rem; margin: 0 0 .75rem; overflow: hidden }
header { font-size: .8rem; color: var(--quiet); background: var(--card); padding: .35rem .8rem;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere }
article h4 { font-size: .8rem; color: var(--quiet); margin: .5rem .8rem 0; font-weight: 600 }
.text { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  padding: .4rem .8rem .6rem }
@media (max-width: 34rem) { table { font-size: .8rem } td, th { padding-right: .5rem } .n, .share { width: auto }
  .tiles dd:first-of-type { font-size: 1.1rem }
  td.share .bar { display: none } svg text { font-size: 13px } .wide { min-width: 5rem } }
"""
MEANS = {  # what is said of a reason to drop a row, or of an oddity, where its name says too little
    "too_long": "longer than data.sequence_len",
    "nothing_to_learn": "no token of it would be learned: see data.roles_to_train",
    "below_min_score": "its score is below min_score",
    "not_selected": "not what the source's `where` asks for",
    "language_not_kept": "the source's rules do not keep its language",
    "left_out_by_reader": "the source's own reader left it out",
    "duplicate": "the same turns and tools as an earlier row",
    "near_duplicate": "nearly the same words as an earlier row",
    "contains_evaluation_text": "what it is evaluated with must not be learned",
    "roles_out_of_order": "a role speaks out of turn: data.clean.role_order can merge such turns",
    "unknown_role": "a role that is not known: the source's `roles` can name it",
    "missing_field": "a column that the format needs is not there",
    "empty_answer": "an answer without text",
    "empty_turn": "a turn of user or system without text",
    "no_assistant_turn": "nobody answers",
    "chosen_equals_rejected": "both answers are the same",
    "no_preferred_answer": "a tie, or no label that the recipe names",
    "no_common_prompt": "the two dialogues do not begin alike",
    "invalid_unicode": "its text cannot be written as UTF-8",
    "id_outside_vocabulary": "a token id that the tokenizer does not have",
    "labels_do_not_fit": "its labels do not fit its tokens",
    "mojibake": "UTF-8 that was read as another encoding (Ã¨ for è)",
    "template_placeholder": "one that was never filled in ({{…}})",
    "html_entity": "such as &amp; for &",
    "control_token_as_text": "a control token of the template, spelt in the text",
    "stand_in_turn": "a turn that is only a stand-in (__LIKE_THIS__)",
}
WIDTH, TOP, FLOOR, LEFT, RIGHT = 440, 52, 188, 52, 68  # of a histogram: its width, and where the bars stand in it


def document(title: str, *parts: str) -> str:
    """The whole page. It asks no server for anything."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>data: {shown(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<main>\n<h1>{shown(title)}</h1>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def words(name: str) -> str:
    """A reason, an oddity or a figure as it is said."""
    return name.replace("_", " ")


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; nothing for no text."""
    return f"<p{_kind(kind)}>{shown(text)}</p>" if text else ""


def section(heading: str, *parts: str) -> str:
    """Parts under a heading; nothing if there are none."""
    inside = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{shown(heading)}</h2>\n{inside}\n</section>" if inside else ""


def tiles(facts: Mapping[str, tuple[str, str]]) -> str:
    """The large figures of the page: under each name a figure, and what there is to say of it."""
    drawn = (
        f"<div><dt>{shown(name)}</dt><dd>{shown(figure)}</dd><dd>{shown(more)}</dd></div>"
        for name, (figure, more) in facts.items()
    )
    return f'<dl class="tiles">{"".join(drawn)}</dl>'


def bar(share: float) -> str:
    """A share of 1 as a bar; the number stands beside it, so that nobody needs to see the bar."""
    inside = f'<i style="width:{100 * min(1.0, share):.2f}%"></i>' if share > 0 else ""
    return f'<span class="bar" aria-hidden="true">{inside}</span>'


def counted(name: str, count: int, whole: int, said: str = "", place: str = "", lost: bool = False) -> str:
    """An item of a list: how many of the whole, as a bar, with a sentence and an example's place."""
    share = count / max(1, whole)
    return (
        f'<li{_kind("lost" if lost else "")}><div class="name"><span>{shown(name)}</span>'
        f"<span>{count:,} · {percent(share)}</span></div>"
        f"{bar(share)}{paragraph(said, 'quiet')}{paragraph(place, 'where')}</li>"
    )


def listed(*items: str) -> str:
    """Items as a list."""
    return "<ul>\n" + "\n".join(items) + "\n</ul>"


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], over: Sequence[bool] = ()) -> str:
    """Rows under a head; nothing for none. Those that are `over` a limit stand out."""
    if not rows:
        return ""
    first = "".join(
        f'<th scope="col"{_kind(_column(cell))}>{shown(name)}</th>' for name, cell in zip(head, rows[0], strict=True)
    )
    lines = [
        f"<tr{_kind('over' if mark else '')}>{''.join(map(_cell, row))}</tr>"
        for row, mark in zip(rows, over or [False] * len(rows), strict=True)
    ]
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n<thead><tr>{first}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _cell(value: Cell) -> str:
    if isinstance(value, str):
        inside = shown(value)
    else:
        inside = f"{value:,}" if isinstance(value, int) else f"{percent(value)}{bar(value)}"
    return f"<td{_kind(_column(value))}>{inside}</td>"


def _column(cell: Cell) -> str:
    return "wide" if isinstance(cell, str) else "n" if isinstance(cell, int) else "share"


def percent(share: float) -> str:
    """A share of 1 in percent; what is there never reads as nothing, nor what is left as all."""
    if 0 < share < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


def card(head: str, parts: Mapping[str, str], language: str) -> str:
    """A row of data as a card: its texts by name, or one without a name."""
    names = (f"<h4>{shown(name)}</h4>" if name else "" for name in parts)
    texts = (f'<div class="text" lang="{shown(language)}">{shown(text)}</div>' for text in parts.values())
    inside = "".join(f"{name}{text}" for name, text in zip(names, texts, strict=True))
    return f"<article><header>{shown(head)}</header>{inside}</article>"


def histograms(lengths: Mapping[str, Any], limit: int) -> str:
    """The lengths of each language over the same axis, with quantiles and the limit marked."""
    edges, languages = lengths["edges"], lengths["languages"]
    filled = [i for figures in languages.values() for i, n in enumerate(figures["counts"]) if n]
    first = min(*filled, floor(log2(limit)))
    last = max(len(edges) - 1, ceil(log2(limit)))  # edges are powers of two, from 1 on
    drawn = (_histogram(name, figures, limit, range(first, last)) for name, figures in languages.items())
    return f'<div class="plots">{"".join(drawn)}</div>'


def _histogram(name: str, figures: Mapping[str, Any], limit: int, bins: range) -> str:
    counts = {i: figures["counts"][i] if i < len(figures["counts"]) else 0 for i in bins}
    step, top = (WIDTH - LEFT - RIGHT) / len(bins), max(*counts.values(), 1)
    bars, above = [], []
    for i, n in counts.items():
        height, x = n / top * (FLOOR - TOP - 16), LEFT + (i - bins.start) * step
        if n:
            bars.append(
                f'<rect x="{x + 1:.1f}" y="{FLOOR - height:.1f}" width="{step - 2:.1f}" height="{height:.1f}"/>'
            )
            above.append(_text(x + step / 2, FLOOR - height - 4, _short(n), "middle"))
    every = ceil(len(bins) / 10)
    ticks = [_text(LEFT + i * step, FLOOR + 16, _short(2 ** (bins.start + i), 1024), "middle")
             for i in range(0, len(bins) + 1, every)]  # fmt: skip

    def across(tokens: int) -> float:
        return LEFT + (log2(max(1, tokens)) - bins.start) * step

    said = (
        f"half have up to {figures['p50']:,} tokens, 95% up to {figures['p95']:,}, "
        f"the longest {figures['max']:,}; {figures['mean']:,.0f} on average"
    )
    spoken = "; ".join(f"{2**i:,} to {2 ** (i + 1) - 1:,} tokens: {n:,} rows" for i, n in counts.items() if n)
    return (
        f"<figure><figcaption>language {shown(name)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {FLOOR + 22}" role="img" '
        f'aria-label="{shown(f"Lengths of rows in {name}: {said}; sequence_len is {limit:,}. {spoken}")}">'
        f'{"".join(bars)}<path class="axis" d="M{LEFT},{FLOOR} H{WIDTH - RIGHT}"/>{"".join(ticks)}'
        f"{_marks(figures, limit, across)}{''.join(above)}</svg>{paragraph(said, 'quiet')}</figure>"
    )


def _marks(figures: Mapping[str, Any], limit: int, across: Callable[[int], float]) -> str:
    """Lines at the quantiles and the limit. The labels of neighbours stand in different rows, or on different sides."""
    rows = {"p95": (28, "middle", 0), "p50": (42, "end", -4), "max": (42, "start", 4)}
    lines, texts = [], []
    for name, (y, anchor, aside) in rows.items():
        x = across(figures[name])
        lines.append(f'<path class="at" d="M{x:.1f},{y + 4} V{FLOOR}"/>')
        texts.append(_text(x + aside, y, f"{name} {figures[name]:,}", anchor, "mark"))
    x = across(limit)
    lines.append(f'<path class="limit" d="M{x:.1f},18 V{FLOOR}"/>')
    texts.append(_text(min(x, WIDTH - RIGHT + 20), 12, f"sequence_len {limit:,}", "middle", "mark far"))
    return "".join([*lines, *texts])


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{_kind(kind)}>{shown(text)}</text>'


def _short(number: int, thousand: int = 1000) -> str:
    """A number in few letters."""
    for size, letter in ((thousand**2, "M"), (thousand, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def _kind(name: str) -> str:
    return f' class="{name}"' if name else ""
