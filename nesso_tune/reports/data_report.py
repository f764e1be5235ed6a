"""`data_report.html` and `data_report.json`: what was read, dropped and kept, to look at before training on it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nesso_tune.data.anomalies import SAYS
from nesso_tune.data.prepare import PreparedData
from nesso_tune.data.privacy import Privacy
from nesso_tune.files import atomic_write
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import DPOData, Limit, SFTData
from nesso_tune.reports import data_page as draw

Data = SFTData | DPOData
Report = Mapping[str, Any]
JSON, HTML = "data_report.json", "data_report.html"
EXAMPLES, CHARACTERS = 3, 600  # shown of each language, and of each text
PARTS = {1: ("text",), 3: ("prompt", "chosen", "rejected")}
COUNTS = ("rows", "tokens", "supervised tokens", "share of tokens")


def write_data_report(folder: Path, recipe: Recipe, data: PreparedData) -> Path:
    """Writes the report on prepared data into a folder, as a page and as JSON; private sources leave no trace.

    The JSON is the report of `prepare_data` and `examples`: of each language the first rows that are trained on.
    Returns the page.
    """
    report = {**_shown(data.report, Privacy(recipe.data)), "examples": _examples(data)}
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / JSON, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _replace(folder / HTML, _page(recipe, report))
    return folder / HTML


def _replace(file: Path, text: str) -> None:
    staging = file.with_name(f".{file.name}.{os.getpid()}.partial")  # `prepare` and `train` may write at once
    atomic_write(file, text, errors="backslashreplace", durable=False, staging=staging)  # file names may be undecodable


def _shown(report: Report, privacy: Privacy) -> dict[str, Any]:
    """A copy of the report in which private sources have numbers, and places in them are left out."""
    out, hidden, names = {**report}, privacy.hidden_sources(), privacy.names()
    out["sources"] = [
        {"path": names[i], **{key: value for key, value in source.items() if key not in ("path", "alias")}}
        if i in hidden else source
        for i, source in enumerate(report["sources"])
    ]  # fmt: skip
    places = report["examples_of_dropped"]
    out["examples_of_dropped"] = {why: place for why, place in places.items() if privacy.shows_place(place)}
    left_out = [odd["example"] for odd in report["oddities"].values() if not privacy.shows_place(odd["example"])]
    out["oddities"] = {
        name: {"rows": odd["rows"]} if odd["example"] in left_out else odd for name, odd in report["oddities"].items()
    }
    if "preferences" in report:
        out["preferences"] = {
            key: list(filter(privacy.shows_place, value)) if isinstance(value, list) else value
            for key, value in report["preferences"].items()
        }
    groups = privacy.groups(report["languages"])
    out["mixture"] = [{**group, "name": groups.get(group["name"], group["name"])} for group in report["mixture"]]
    for place in left_out:  # a warning may give an oddity's example
        out["warnings"] = [warning.replace(place, "a private source") for warning in out["warnings"]]
    return out


def _examples(data: PreparedData) -> list[dict[str, Any]]:
    """Of each language the first rows of the first epoch that are of no private source."""
    documents, entries = data.train.documents, data.train.entries
    hidden = documents.are_private(entries)
    out = []
    for _, code in sorted((name, code) for code, name in enumerate(documents.language_names)):
        own = entries[~hidden & (documents.languages[entries] == code)]
        _, first = np.unique(own, return_index=True)  # a row may be seen several times in an epoch
        out += [_example(data, int(entry)) for entry in own[np.sort(first)[:EXAMPLES]]]
    return out


def _example(data: PreparedData, entry: int) -> dict[str, Any]:
    documents = data.train.documents
    texts = {}
    for i, name in enumerate(PARTS[documents.parts]):
        text = data.chat.backend.decode(documents.input_ids(entry, i).tolist(), skip_special_tokens=False)
        texts[name] = text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…"
    return {
        "place": documents.place(entry),
        "language": documents.language(entry),
        "source": documents.source(entry),
        **texts,
        "tokens": int(documents.lengths[entry]),
    }


def _page(recipe: Recipe, report: Report) -> str:
    data, title = recipe.data, Path(recipe.output_dir).name
    return draw.document(
        title,
        draw.paragraph(_summary(data, report), "lead"),
        *(draw.paragraph(warning, "note") for warning in report["warnings"]),
        draw.tiles(_figures(report)),
        draw.section("Kept and dropped", _dropped(report)),
        draw.section("Languages and sources", *_counted(report)),
        draw.section("Lengths", draw.histograms(report["lengths"], data.sequence_len), _of_lengths(data)),
        draw.section("The first epoch", *_epoch(data, report)),
        draw.section("Seen twice", _repeated(data, report)),
        draw.section("Oddities of rows that can be used", _oddities(report)),
        draw.section("Preferences", *_preferences(data, report)),
        draw.section("Examples", *_cards(data, report)),
    )


def _summary(data: Data, report: Report) -> str:
    return (
        f"{report['rows_kept']:,} of {report['rows_read']:,} rows kept, with {report['tokens']:,} tokens, "
        f"{report['supervised_tokens']:,} of them learned; {_packed(data, report)}; "
        f"{report['validation']['rows']:,} rows are held out."
    )


def _packed(data: Data, report: Report) -> str:
    rows, fill = report["packing"]["rows"], report["packing"]["fill"]
    if isinstance(data, SFTData) and data.packing:
        return f"packed into {rows:,} rows of {data.sequence_len:,} tokens, {draw.percent(fill)} full"
    return f"not packed: each of {rows:,} rows is one {'conversation' if isinstance(data, SFTData) else 'pair'}"


def _figures(report: Report) -> dict[str, tuple[str, str]]:
    kept, tokens, learned = report["rows_kept"], report["tokens"], report["supervised_tokens"]
    train, held, packing = report["train"], report["validation"], report["packing"]
    return {
        "Rows kept": (f"{kept:,}", f"{draw.percent(kept / report['rows_read'])} of {report['rows_read']:,} read"),
        "Tokens": (f"{tokens:,}", f"{tokens / kept:,.0f} a row"),
        "Supervised tokens": (f"{learned:,}", f"{draw.percent(learned / max(1, tokens))} of all"),
        "Rows of an epoch": (f"{packing['rows']:,}", f"{train['tokens']:,} tokens of {train['rows']:,} rows of data"),
        "Rows held out": (f"{held['rows']:,}", f"{held['tokens']:,} tokens"),
    }


def _dropped(report: Report) -> str:
    read, places = report["rows_read"], report["examples_of_dropped"]
    items = [draw.counted("kept", report["rows_kept"], read, "" if report["dropped"] else "Nothing was dropped.")]
    for reason, rows in report["dropped"].items():
        place = f"e.g. {places[reason]}" if reason in places else ""
        items.append(draw.counted(draw.words(reason), rows, read, draw.MEANS.get(reason, ""), place, lost=True))
    return draw.listed(*items)


def _counted(report: Report) -> Iterator[str]:
    """Tables of what was kept."""
    whole = max(1, report["tokens"])

    def counts(of: Report) -> tuple[int, int, int, float]:
        return of["rows"], of["tokens"], of["supervised_tokens"], of["tokens"] / whole

    yield draw.table(("language", *COUNTS), [(code, *counts(of)) for code, of in report["languages"].items()])
    rows = [
        (f"{of['alias']} ({of['path']})" if "alias" in of else of["path"], of["rows_read"], *counts(of))
        for of in report["sources"]
    ]
    yield draw.table(("source", "rows read", *COUNTS), rows)


def _of_lengths(data: Data) -> str:
    said = "Rows by their tokens, before they are packed; held-out rows are counted too."
    if isinstance(data, DPOData):
        said = "Pairs by the tokens of prompt and longer answer; held-out pairs are counted too."
    return draw.paragraph(said, "quiet")


def _epoch(data: Data, report: Report) -> Iterator[str]:
    keys = ("name", "rows_there", "rows", "tokens", "share_of_tokens")
    rows = [[of[key] for key in keys] for of in report["mixture"]]
    yield draw.table(("group", "rows there", "rows drawn", "tokens", "share of tokens"), rows)
    yield draw.paragraph(f"{_packed(data, report).capitalize()}.")
    if isinstance(data, SFTData) and data.packing:
        yield draw.bar(report["packing"]["fill"])


def _repeated(data: Data, report: Report) -> str:
    kept, left_out = report["rows_kept"], data.clean.validation_overlap == "drop"
    same = "Kept rows with the same turns and tools as an earlier one."
    asked = f"Rows that ask what a held-out row asks: {'left out' if left_out else 'trained on all the same'}."
    return draw.listed(
        draw.counted("duplicates", report["duplicates"], kept, same),
        draw.counted("validation overlap", report["validation_overlap"], kept, asked),
    )


def _oddities(report: Report) -> str:
    rows = [
        (
            draw.words(name) + (f": {draw.MEANS[name]}" if name in draw.MEANS else ""),
            odd["rows"],
            odd.get("example", ""),
        )
        for name, odd in report["oddities"].items()
    ]
    return draw.table(("what", "rows", "first"), rows) or draw.paragraph("None were found.")


def _preferences(data: Data, report: Report) -> Iterator[str]:
    """The figures of pairs, in the words of the warnings."""
    figures = report.get("preferences")
    if figures is None or not isinstance(data, DPOData):
        return
    longer, equal = figures["chosen_longer"], figures["equal_length"]
    yield draw.paragraph(
        f"{figures['pairs']:,} pairs. Chosen answers have {figures['chosen_tokens']:,} tokens on average, rejected "
        f"ones {figures['rejected_tokens']:,}. The chosen one is longer in {draw.percent(longer)} of the pairs, "
        f"and of the same length in {draw.percent(equal)}."
    )
    side = f"the {'longer' if longer + equal / 2 >= 0.5 else 'shorter'} is chosen"
    rows, over = [], []
    for name, (what, _) in SAYS.items():
        limit: Limit = getattr(data.preferences, name)
        over.append(limit.warn is not None and figures[name] >= limit.warn)
        limits = {"warns from": limit.warn, "fails from": limit.fail}
        said = ", ".join(f"{verb} {value:g}" for verb, value in limits.items() if value is not None) or "no limit"
        what = what.format(value=figures[name], side=side)
        rows.append((draw.words(name), what, f"⚠ {said}" if over[-1] else said))
    yield draw.table(("figure", "here", "limit"), rows, over)
    for name in ("conflicting", "language_mismatch"):
        for place in figures.get(f"{name}_examples", ()):
            yield draw.paragraph(f"{draw.words(name)}: {place}", "where")


def _cards(data: Data, report: Report) -> Iterator[str]:
    if any(source.private for source in data.sources):
        yield draw.paragraph("Rows of private sources are not shown.", "quiet")
    for example in report["examples"]:
        head = f"{example['language']} · source {example['source']} · {example['place']} · {example['tokens']:,} tokens"
        texts = {name: example[name] for name in (*PARTS[1], *PARTS[3]) if name in example}
        yield draw.card(head, {"": texts["text"]} if "text" in texts else texts, example["language"])
