"""`data_report.html` and `data_report.json`: rows read, dropped and kept, for inspection before training."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nesso_tune.data.personal_data import mask_personal_data
from nesso_tune.data.prepare import PreparedData
from nesso_tune.data.privacy import Privacy
from nesso_tune.data.statistics import PREFERENCE_WARNINGS
from nesso_tune.files import atomic_write
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import DPOData, Limit, SFTData
from nesso_tune.reports.html import percent, render, words
from nesso_tune.reports.plots import length_histograms

Report = Mapping[str, Any]
JSON_NAME, HTML_NAME = "data_report.json", "data_report.html"
EXAMPLES_PER_GROUP, MAX_EXAMPLES, MAX_EXAMPLE_CHARACTERS = 3, 24, 600  # a group: a language of a source
TEXT_NAMES = {1: ("text",), 3: ("prompt", "chosen", "rejected")}  # by the number of parts of a document
EXPLANATIONS = {  # of reasons to drop a row, and of anomalies, whose name is not enough
    "too_long": "longer than data.sequence_len",
    "nothing_to_learn": "no supervised tokens: see data.roles_to_train",
    "below_min_score": "score below min_score",
    "not_selected": "does not match the source's `where`",
    "language_not_kept": "language not kept by the source's rules",
    "left_out_by_reader": "skipped by the source's own reader",
    "duplicate": "same turns and tools as an earlier row",
    "near_duplicate": "nearly the same text as an earlier row",
    "contains_evaluation_text": "overlaps with the evaluation texts of data.clean.decontaminate",
    "roles_out_of_order": "data.clean.role_order can merge consecutive turns of one role",
    "unknown_role": "map it with the source's `roles`",
    "missing_field": "a column that the format requires is missing",
    "empty_answer": "answer without text",
    "empty_turn": "user or system turn without text",
    "no_assistant_turn": "conversation without an answer",
    "chosen_equals_rejected": "both answers are the same",
    "no_preferred_answer": "a tie, or a label that the recipe does not name",
    "no_common_prompt": "the two conversations start differently",
    "invalid_unicode": "text that cannot be encoded as UTF-8",
    "id_outside_vocabulary": "token id outside the tokenizer's vocabulary",
    "labels_do_not_fit": "labels do not match the tokens",
    "train_not_true_or_false": "`train` of a message is neither true nor false",
    "weight_not_0_or_1": "a turn is supervised (1) or not (0); other weights are not supported",
    "supervision_contradictory": "two keys of a message (train, weight, masked, …) contradict each other",
    "answer_not_supervised": "an answer of the pair is marked as not supervised",
    "history_not_readable": "not a list of pairs of a question and its answer",
    "answers_not_readable": "not a list of answers with scores",
    "number_as_text": "a number, true or false as an answer, read as text",
    "null_property_removed": "null in tools or in the arguments of a call, as tables write for a missing key",
    "mojibake": "UTF-8 decoded with another encoding (Ã¨ for è)",
    "template_placeholder": "never filled in ({{…}})",
    "html_entity": "such as &amp; for &",
    "control_token_as_text": "the text spells a control token of the template",
    "stand_in_turn": "the whole turn is a placeholder (__LIKE_THIS__)",
    "personal_data": "data.clean.personal_data found some",
}


def write_data_report(folder: Path, recipe: Recipe, data: PreparedData) -> Path:
    """Writes the report on prepared data into a folder, as HTML and as JSON, and returns the path of the HTML.

    The JSON is the report of `prepare_data` plus `examples`: the first training rows of each language of each source.
    Names and rows of private sources are left out of both files.
    """
    report = {**_redact(data.report, Privacy(recipe.data)), "examples": _examples(data)}
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / JSON_NAME, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _replace(folder / HTML_NAME, _page(recipe, report))
    return folder / HTML_NAME


def _replace(file: Path, text: str) -> None:
    staging = file.with_name(f".{file.name}.{os.getpid()}.partial")  # `prepare` and `train` may write at once
    atomic_write(file, text, errors="backslashreplace", durable=False, staging=staging)  # file names may be undecodable


def _redact(report: Report, privacy: Privacy) -> dict[str, Any]:
    """A copy of the report in which private sources are numbered and places in their files are removed."""
    out, hidden, names = {**report}, privacy.hidden_sources(), privacy.source_names()
    out["sources"] = [
        _without(source, "path", "alias", "unread", "unread_texts") | {"path": names[i]} if i in hidden
        else _without(source, "unread", "unread_texts") if privacy.hides_columns(privacy.data.sources[i])
        else source
        for i, source in enumerate(report["sources"])
    ]  # fmt: skip
    places = report["examples_of_dropped"]
    out["examples_of_dropped"] = {reason: place for reason, place in places.items() if privacy.shows_location(place)}
    private_places = [
        anomaly["example"] for anomaly in report["oddities"].values() if not privacy.shows_location(anomaly["example"])
    ]
    out["oddities"] = {
        name: {"rows": anomaly["rows"]} if anomaly["example"] in private_places else anomaly
        for name, anomaly in report["oddities"].items()
    }
    if "personal_data" in report:
        out["personal_data"] = {
            kind: found if privacy.shows_location(found["example"]) else {key: found[key] for key in ("rows", "values")}
            for kind, found in report["personal_data"].items()
        }
    if "preferences" in report:
        out["preferences"] = {
            key: list(filter(privacy.shows_location, value)) if isinstance(value, list) else value
            for key, value in report["preferences"].items()
        }
    groups = privacy.group_names(report["languages"])
    out["mixture"] = [{**group, "name": groups.get(group["name"], group["name"])} for group in report["mixture"]]
    for place in private_places:  # a warning may contain the example of an anomaly
        out["warnings"] = [warning.replace(place, "a private source") for warning in out["warnings"]]
    return out


def _without(source: Report, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key not in keys}


def _examples(data: PreparedData) -> list[dict[str, Any]]:
    """The first rows of the first epoch in each language of each source, with personal data masked.

    Private sources have none. Of many sources and languages, each has at least one.
    """
    documents, entries = data.train.documents, data.train.records
    entries = entries[~documents.are_private(entries)]
    _, first = np.unique(entries, return_index=True)  # a row may occur several times in an epoch
    entries = entries[np.sort(first)]
    pairs = np.unique(np.stack([documents.sources[entries], documents.languages[entries]], 1), axis=0).tolist()
    groups = sorted((source, documents.language_names[language], language) for source, language in pairs)
    count = max(1, min(EXAMPLES_PER_GROUP, MAX_EXAMPLES // max(1, len(groups))))
    chosen = [
        entries[(documents.sources[entries] == source) & (documents.languages[entries] == language)][:count]
        for source, _, language in groups
    ]
    return [_example(data, int(entry)) for own in chosen for entry in own]


def _example(data: PreparedData, entry: int) -> dict[str, Any]:
    documents = data.train.documents
    texts = {}
    for i, name in enumerate(TEXT_NAMES[documents.documents_per_record]):
        text = data.chat.backend.decode(documents.input_ids(entry, i).tolist(), skip_special_tokens=False)
        if data.summary.personal_data is not None:
            text = mask_personal_data(text)
        texts[name] = text if len(text) <= MAX_EXAMPLE_CHARACTERS else f"{text[:MAX_EXAMPLE_CHARACTERS]}…"
    return {
        "place": documents.location(entry),
        "language": documents.language(entry),
        "source": documents.source(entry),
        **texts,
        "tokens": int(documents.lengths[entry]),
    }


@dataclass(frozen=True)
class Count:
    """A number of rows with its share of `total`, an explanation, and the place of one such row."""

    label: str
    rows: int
    total: int
    detail: str = ""
    example: str = ""
    dropped: bool = False

    @property
    def share(self) -> float:
        """Fraction of `total`."""
        return self.rows / max(1, self.total)


@dataclass(frozen=True)
class PreferenceChecks:
    """Checks of preference pairs: table rows (check, result, limit), which exceed their limit, and example rows."""

    rows: list[tuple[str, str, str]]
    exceeded: list[bool]
    examples: list[str]


def _page(recipe: Recipe, report: Report) -> str:
    data = recipe.data
    packed = isinstance(data, SFTData) and data.packing
    return render(
        "data_report.html.j2",
        title=Path(recipe.output_dir).name,
        report=report,
        is_dpo=isinstance(data, DPOData),
        packed=packed,
        packing=_packing(data, report),
        kept_and_dropped=list(_kept_and_dropped(report)),
        languages=[(code, *_sizes(stats, report)) for code, stats in report["languages"].items()],
        sources=[(_source_name(source), source["rows_read"], *_sizes(source, report)) for source in report["sources"]],
        histograms=length_histograms(report["lengths"], data.sequence_len),
        whole_rows=_whole_rows(data.sequence_len, report),
        mixture=[
            tuple(group[key] for key in ("name", "rows_there", "rows", "tokens", "share_of_tokens"))
            for group in report["mixture"]
        ],
        repeated=_repeated(data, report),
        anomalies=list(_anomalies(report)),
        personal_data=[
            (words(kind), found["rows"], found["values"], found.get("context", ""), found.get("example", ""))
            for kind, found in report.get("personal_data", {}).items()
        ],
        personal_data_action=recipe.data.clean.personal_data,
        unread=list(_unread(report)),
        preferences=_preference_checks(data, report["preferences"]) if isinstance(data, DPOData) else None,
        has_private_source=any(source.private for source in data.sources),
    )


def _packing(data: SFTData | DPOData, report: Report) -> str:
    rows, fill = report["packing"]["rows"], report["packing"]["fill"]
    if isinstance(data, SFTData) and data.packing:
        return f"packed into {rows:,} rows of {data.sequence_len:,} tokens, {percent(fill)} full"
    return f"not packed: {rows:,} rows of one {'conversation' if isinstance(data, SFTData) else 'pair'} each"


def _kept_and_dropped(report: Report) -> Iterator[Count]:
    total, places = report["rows_read"], report["examples_of_dropped"]
    yield Count("kept", report["rows_kept"], total, "" if report["dropped"] else "No row was dropped.")
    for reason, rows in report["dropped"].items():
        detail, place = EXPLANATIONS.get(reason, ""), places.get(reason, "")
        yield Count(words(reason), rows, total, detail, place, dropped=True)


def _sizes(stats: Report, report: Report) -> tuple[int, int, int, float, float]:
    tokens, supervised = stats["tokens"], stats["supervised_tokens"]
    return stats["rows"], tokens, supervised, supervised / max(1, tokens), tokens / max(1, report["tokens"])


def _whole_rows(sequence_len: int, report: Report) -> list[tuple[str, int, float, float]]:
    """Sequence length; rows that fit into it, their share, and the share of the tokens."""
    whole = report["whole_rows"]
    rows, tokens = (max(of[key] for of in whole.values()) for key in ("rows", "tokens"))
    return [
        (f"{int(limit):,}{' (of the recipe)' if int(limit) == sequence_len else ''}", of["rows"], of["rows"] / rows,
         of["tokens"] / max(1, tokens))
        for limit, of in whole.items()
    ]  # fmt: skip


def _source_name(source: Report) -> str:
    path: str = source["path"]
    return f"{source['alias']} ({path})" if "alias" in source else path


def _repeated(data: SFTData | DPOData, report: Report) -> list[Count]:
    kept = report["rows_kept"]
    usage = "dropped" if data.clean.validation_overlap == "drop" else "kept in training"
    return [
        Count("duplicates", report["duplicates"], kept, "Kept rows with the same turns and tools as an earlier row."),
        Count(
            "validation overlap", report["validation_overlap"], kept,
            f"Training rows that share a prompt with a validation row: {usage}.",
        ),
    ]  # fmt: skip


def _anomalies(report: Report) -> Iterator[tuple[str, int, str]]:
    for name, anomaly in report["oddities"].items():
        label = f"{words(name)}: {EXPLANATIONS[name]}" if name in EXPLANATIONS else words(name)
        yield label, anomaly["rows"], anomaly.get("example", "")


def _unread(report: Report) -> Iterator[tuple[str, str, int, int]]:
    """Source, column or message key, rows that have it, rows in which it holds text; those with text first."""
    for source, keys in report["unread"].items():
        texts = report["unread_texts"].get(source, {})
        for key in sorted(keys, key=lambda key: -texts.get(key, 0)):
            yield source, key, keys[key], texts.get(key, 0)


def _preference_checks(data: DPOData, figures: Report) -> PreferenceChecks:
    """Results in the words of the warnings."""
    longer = figures["chosen_longer"] + figures["equal_length"] / 2 >= 0.5
    rows, exceeded = [], []
    for name, (template, _) in PREFERENCE_WARNINGS.items():
        limit: Limit = getattr(data.preferences, name)
        exceeded.append(limit.warn is not None and figures[name] >= limit.warn)
        result = template.format(value=figures[name], side=f"the {'longer' if longer else 'shorter'} is chosen")
        rows.append((words(name), result, f"⚠ {_limits(limit)}" if exceeded[-1] else _limits(limit)))
    examples = [
        f"{words(name)}: {place}"
        for name in ("conflicting", "language_mismatch")
        for place in figures.get(f"{name}_examples", ())
    ]
    return PreferenceChecks(rows, exceeded, examples)


def _limits(limit: Limit) -> str:
    thresholds = {"warns from": limit.warn, "fails from": limit.fail}
    return ", ".join(f"{verb} {value:g}" for verb, value in thresholds.items() if value is not None) or "no limit"
