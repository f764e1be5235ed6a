"""Pydantic's errors in the words of a recipe: where, what is wrong, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from nesso_tune.errors import Problem
from nesso_tune.recipes.document import Document
from nesso_tune.recipes.keys import Path, section_at, suggest_key
from nesso_tune.recipes.lint import lint
from nesso_tune.recipes.names import closest

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
}
BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def complaints(error: ValidationError, document: Document, model: type[BaseModel]) -> list[Problem]:
    """All problems of a recipe, inert and contradictory knobs included, in the order of the file."""
    by_path: dict[Path, list[Mapping[str, Any]]] = {}
    for item in error.errors(include_url=False):
        if item["loc"]:  # the root's own error repeats what lint says
            by_path.setdefault(_real_path(item["loc"], document.value), []).append(item)
    for path in list(by_path):  # a list counts as empty when its items are wrong: they speak for themselves
        if by_path[path][0]["type"] == "too_short" and any(p[: len(path)] == path != p for p in by_path):
            del by_path[path]
    found = [(path, _problem(path, items, document, model)) for path, items in by_path.items()]
    found += lint_problems(document)
    found.sort(key=lambda pair: _line(document, pair[0]))
    return [problem for _, problem in found]


def lint_problems(document: Document) -> list[tuple[Path, Problem]]:
    """Inert and contradictory knobs of a document."""
    findings = lint(document.value if isinstance(document.value, Mapping) else {})
    return [
        (f.path, Problem(document.where(f.path), f"`{_dotted(f.path)}` {f.what}", f.remedy)) for f in findings
    ]


def _line(document: Document, path: Path) -> int:
    where = document.where(path).rsplit(":", 1)[-1]
    return int(where) if where.isdigit() else 0


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _real_path(loc: tuple[str | int, ...], value: Any) -> Path:
    """The part of pydantic's location that exists in the file: the branches of a union are not keys of it."""
    path: list[str | int] = []
    for i, part in enumerate(loc):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif isinstance(value, Mapping) and isinstance(part, str) and i == len(loc) - 1 and part != "[key]":
            return (*path, part)  # a missing key
        else:
            break
        path.append(part)
    return tuple(path)


def _problem(path: Path, items: list[Mapping[str, Any]], document: Document, model: type[BaseModel]) -> Problem:
    where, key, item = document.where(path), f"`{_dotted(path)}`", items[0]
    kind, value = item["type"], item["input"]
    if kind == "extra_forbidden":
        return Problem(where, f"unknown key {key}", suggest_key(model, path))
    if kind == "missing":
        what = f"{key} is missing" if len(path) > 1 else f"the key {key} is missing"
        return Problem(where, what, f"add it: {_description(model, path)}")
    if value is None:
        return Problem(where, f"{key} is not set", f"give it a value: {_description(model, path)}")
    if kind == "value_error":
        return Problem(where, f"{key} {item['ctx']['error']}", "correct it")
    wanted = list(dict.fromkeys(_wanted(one) for one in items))
    choices = [c for one in items if one["type"] == "literal_error" for c in _choices(one)]
    guess = closest(str(value), choices) if choices else None
    remedy = f"did you mean `{guess}`?" if guess else f"write {' or '.join(wanted)}"
    return Problem(where, f"{key} must be {' or '.join(wanted)}, not {_shown(value)}", remedy)


def _choices(item: Mapping[str, Any]) -> list[str]:
    return [word.strip("'") for word in item["ctx"]["expected"].replace(" or ", ", ").split(", ")]


def _wanted(item: Mapping[str, Any]) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        choices = _choices(item)
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if kind in BOUNDS:
        bound, words = BOUNDS[kind]
        return f"{words} {context[bound]:g}"
    if kind in ("string_too_short", "too_short"):
        return "not empty"
    return EXPECTED.get(kind, item["msg"].lower())


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _description(model: type[BaseModel], path: Path) -> str:
    """What a key is for, from its own documentation."""
    section = section_at(model, path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    text = (field.description if field else None) or "see the schema"
    return text[0].lower() + text[1:].rstrip(".")
