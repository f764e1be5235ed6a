"""Lint rules of the `data` section: keys without effect and contradictory keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os.path import expanduser
from typing import Any

from nesso_tune.conversation import LANGUAGE_NAMES, OTHER_LANGUAGES, language_code
from nesso_tune.errors import RecipeError, closest, shortened
from nesso_tune.recipes.builtin import template_names
from nesso_tune.recipes.yaml_source import KeyPath

Raw = Mapping[str, Any]
MESSAGE_FIELDS = ("messages_field", "role_field", "content_field", "roles")
INSTRUCTION_FIELDS = ("input_field", "response_field")
PREFERENCE_FIELDS = ("chosen_field", "rejected_field")
PREFERENCE_KEYS = (*PREFERENCE_FIELDS, "prompt_field", "input_field", "role_field", "content_field", "roles",
                   "system_field", "tools_field", "tools_file")  # fmt: skip
CHOICE_FIELDS = ("choice_fields", "label_fields", "labels")
FORMAT_KEYS: dict[str, tuple[str, ...]] = {  # keys that each shipped format reads
    "messages": (*MESSAGE_FIELDS, "system_field", "tools_field", "tools_file"),
    "sharegpt": (*MESSAGE_FIELDS, "system_field", "tools_field", "tools_file"),
    "exchanges": ("messages_field", "system_field", "tools_field", "tools_file"),
    "alpaca": (*INSTRUCTION_FIELDS, "prompt_field", "system_field", "tools_field", "tools_file"),
    "prompt_completion": (*INSTRUCTION_FIELDS, "prompt_field", "role_field", "content_field", "roles", "system_field",
                          "tools_field", "tools_file"),
    "preference": (*PREFERENCE_KEYS, "messages_field"),
    "ms_swift": PREFERENCE_KEYS,
    "openai_preference": PREFERENCE_KEYS,
    "hh_rlhf": (*PREFERENCE_FIELDS, "prompt_field", "input_field", "system_field", "tools_field", "tools_file"),
    "ultrafeedback": (*INSTRUCTION_FIELDS, "prompt_field", "system_field", "tools_field", "tools_file"),
    "choice": (*CHOICE_FIELDS, "prompt_field", "input_field", "system_field", "tools_field", "tools_file"),
    "completion": ("text_field",),
    "pretokenized": (),
}  # fmt: skip
ALL_FORMAT_KEYS = sorted({key for keys in FORMAT_KEYS.values() for key in keys})


@dataclass(frozen=True)
class Finding:
    """A key that has no effect or contradicts another: its path, what is wrong, and what to do."""

    path: KeyPath
    what: str
    remedy: str


def get(raw: Any, *path: str | int) -> Any:
    """The value at a path of nested data, or None."""
    for part in path:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _sources(raw: Raw) -> Iterator[Finding]:
    for section in ("sources", "validation_sources"):
        sources = get(raw, "data", section)
        for i in range(len(sources) if isinstance(sources, (list, tuple)) else 0):
            yield from _source(sources[i], ("data", section, i))
            if section == "validation_sources" and get(sources[i], "weight") not in (None, 1):
                yield Finding(
                    ("data", section, i, "weight"), "has no effect: evaluation sees every row once", "remove it"
                )
            for code, rule in _rules(sources[i]) if section == "validation_sources" else ():
                if get(rule, "weight") is not None:
                    here = ("data", section, i, "rules", code, "weight")
                    yield Finding(here, "has no effect: evaluation sees every row once", "remove it")


def _source(source: Any, here: KeyPath) -> Iterator[Finding]:
    style = get(source, "format")
    yield from unknown_template((*here, "format"), style, "formats")
    yield from _language((*here, "language"), get(source, "language"))
    for code, _ in _rules(source):
        yield from invalid_language_code((*here, "rules", code), code)
    used = FORMAT_KEYS.get(style) if isinstance(style, str) else None
    own = isinstance(style, str) and ".py:" in style
    if own:
        used, style = ("tools_file",), "a user-defined reader"
    for key in ALL_FORMAT_KEYS if used is not None else ():
        if key not in (used or ()) and get(source, key) is not None:
            yield Finding((*here, key), f"has no effect under format: {style}", "remove it, or name another format")
    if get(source, "reads") and not own:
        yield Finding((*here, "reads"), "has no effect without a user-defined reader", "set format: FILE.py:FUNCTION")
    scored: list[KeyPath] = [("min_score",)] if get(source, "min_score") is not None else []
    scored += [("rules", code, "min_score") for code, rule in _rules(source) if get(rule, "min_score") is not None]
    for path in scored if get(source, "score_field") is None else ():
        yield Finding((*here, *path), "needs score_field", "name the column that holds the score")
    if get(source, "score_field") is not None and not scored:
        yield Finding((*here, "score_field"), "has no effect without min_score", "set min_score, or remove it")
    language = get(source, "language")
    if language not in (None, "auto") and get(source, "language_field") is not None:
        yield Finding((*here, "language_field"), "has no effect beside language", "keep one of the two")
    for code, rule in _rules(source):
        for key in ("min_score", "weight"):
            if get(rule, "keep") is False and get(rule, key) is not None:
                yield Finding(
                    (*here, "rules", code, key), "has no effect together with keep: false", "keep one of the two"
                )


def _language(here: KeyPath, language: Any) -> Iterator[Finding]:
    """Reports an unknown language of a source; a code or a name such as `italian` is valid."""
    if isinstance(language, str) and language.strip() and language != "auto" and language_code(language) is None:
        guess = closest(language, ["auto", *LANGUAGE_NAMES])
        remedy = f"did you mean `{LANGUAGE_NAMES.get(guess, guess)}`?" if guess else "write a code such as it, or auto"
        yield Finding(here, f"`{shortened(language)}` is not a language code", remedy)


def _mixture(raw: Raw) -> Iterator[Finding]:
    shares, here = get(raw, "data", "mixture", "shares"), ("data", "mixture", "shares")
    if not isinstance(shares, Mapping):
        return
    for code in shares if get(raw, "data", "mixture", "by") == "language" else ():
        yield from invalid_language_code((*here, code), code)
    numbers = [share for share in shares.values() if isinstance(share, (int, float))]
    if len(numbers) == len(shares) and abs(sum(numbers) - 1) > 1e-6:
        yield Finding(here, f"sum to {sum(numbers):g}", "make them sum to 1, e.g. {it: 0.6, en: 0.4}")
    sources = get(raw, "data", "sources")
    sources = sources if isinstance(sources, (list, tuple)) else ()
    for i, source in enumerate(sources):
        weighted: list[KeyPath] = [("weight",)] if get(source, "weight") not in (None, 1) else []
        weighted += [("rules", code, "weight") for code, rule in _rules(source) if get(rule, "weight") is not None]
        for path in weighted:
            yield Finding(
                ("data", "sources", i, *path), "contradicts data.mixture: the shares set the weights", "keep one"
            )
    if get(raw, "data", "mixture", "by") == "source":
        names = source_names(sources)
        for name in shares:
            if expanduser(str(name)) not in (*names, "other"):
                guess = closest(str(name), names)
                remedy = f"did you mean `{guess}`?" if guess else "name a source by its alias or path"
                yield Finding((*here, str(name)), "is not a source of this recipe", remedy)


def _clean(raw: Raw) -> Iterator[Finding]:
    overlap = get(raw, "data", "clean", "validation_overlap") == "drop"
    if overlap and get(raw, "data", "validation_size") == 0 and not get(raw, "data", "validation_sources"):
        yield Finding(
            ("data", "clean", "validation_overlap"), "has no effect: there are no validation rows", "remove it"
        )
    search = get(raw, "data", "clean", "personal_data")
    for section in ("sources", "validation_sources") if search is not None else ():
        sources = get(raw, "data", section)
        for i, source in enumerate(sources if isinstance(sources, (list, tuple)) else ()):
            if get(source, "format") == "pretokenized":
                yield Finding(
                    ("data", section, i, "format"), "token ids cannot be searched by data.clean.personal_data",
                    "give the texts, or remove personal_data",
                )  # fmt: skip


def _turns(raw: Raw) -> Iterator[Finding]:
    sources = get(raw, "data", "sources")
    formats = {str(get(source, "format")) for source in (sources if isinstance(sources, (list, tuple)) else ())}
    if formats and formats <= {"completion", "pretokenized"}:
        for key, default in (("turns_to_train", "all"), ("reasoning", "error")):
            if get(raw, "data", key) not in (None, default):
                yield Finding(("data", key), f"has no effect under format: {sorted(formats)[0]}", "remove it")


def _limits(raw: Raw) -> Iterator[Finding]:
    limits = get(raw, "data", "preferences")
    for name in limits if isinstance(limits, Mapping) else ():
        warn, fail = get(limits, name, "warn"), get(limits, name, "fail")
        if isinstance(warn, (int, float)) and isinstance(fail, (int, float)) and warn > fail:
            yield Finding(("data", "preferences", str(name), "warn"), f"never warns: fail is {fail:g}", "lower it")


def _rules(source: Any) -> list[tuple[str, Any]]:
    rules = get(source, "rules")
    return [(str(code), rule) for code, rule in rules.items()] if isinstance(rules, Mapping) else []


def unknown_template(here: KeyPath, name: Any, kind: str) -> Iterator[Finding]:
    """Reports a name that is neither a shipped file of data_templates/KIND/ nor the path of a user's file."""
    names = [*(["auto"] if kind == "formats" else []), *template_names(kind)]
    own = isinstance(name, str) and (name.endswith((".yaml", ".yml")) or ".py:" in name)
    if isinstance(name, str) and name.strip() and not own and name not in names:
        files = "FILE.yaml or FILE.py:FUNCTION" if kind == "formats" else "FILE.yaml"
        guess = closest(name, names)
        remedy = f"did you mean `{guess}`?" if guess else f"use {', '.join(names)}, or {files}"
        yield Finding(here, f"`{shortened(name)}` is not known", remedy)


def invalid_language_code(here: KeyPath, code: Any) -> Iterator[Finding]:
    """Reports a language that is not a code such as `it`: the languages of rows are normalized to codes."""
    if not isinstance(code, str) or not code.strip() or code in OTHER_LANGUAGES or language_code(code) == code:
        return
    name = language_code(code) or LANGUAGE_NAMES.get(closest(code, LANGUAGE_NAMES) or "")
    yield Finding(here, f"`{shortened(code)}` is not a language code", f"write {name or 'a code such as it or en'}")


def unknown_source(raw: Raw, name: str, on_validation: bool) -> tuple[str, str] | None:
    """Why there is no metric for a source of this name, and the remedy; None if there can be one.

    Args:
        raw: the recipe.
        name: alias or path of the source, or the label of a private one.
        on_validation: whether the metric is measured on `validation_sources`, if any.
    """
    on_validation = on_validation and bool(get(raw, "data", "validation_sources"))
    sources = get(raw, "data", "validation_sources" if on_validation else "sources")
    if not isinstance(sources, (list, tuple)) or not sources:
        return None
    names, private = source_names(sources), any(get(source, "private") for source in sources)
    if len(sources) == 1 or (len(set(names)) == 1 and not private):  # private sources are numbered
        return "is only measured with several sources", "use the overall metric"
    kind = "private validation source" if on_validation else "private source"
    labels = [*names, *(f"{kind} {i}" for i in range(1, len(sources) + 1) if private)]
    if expanduser(name) in labels:
        return None
    guess = closest(name, names)
    section = "data.validation_sources" if on_validation else "data.sources"
    return f"is not measured: {section} has no source of this name", (
        f"did you mean `{guess}`?" if guess else "name a source by its alias or path"
    )


def source_names(sources: Any) -> list[str]:
    """Aliases or paths of sources, with `~` expanded: the rules run on the raw recipe."""
    return [expanduser(str(get(source, "alias") or get(source, "path"))) for source in sources]


DATA_RULES: tuple[Callable[[Raw], Iterator[Finding]], ...] = (_sources, _mixture, _clean, _turns, _limits)


def check_validation_size(size: int | float, total: int) -> None:
    """Raises RecipeError if holding out `size` of `total` rows would leave no training row."""
    if isinstance(size, int) and size and size >= total:
        raise RecipeError(
            "data.validation_size", f"{size:,} of {total:,} usable rows leave nothing to train on",
            f"hold out fewer, e.g. {max(1, total // 20)}, or a share like 0.05",
        )  # fmt: skip
