"""From a file and overrides to a validated recipe, or to all that is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nesso_tune.errors import Problem, RecipeError, closest, shortened
from nesso_tune.recipes.complaints import complaints, first_of
from nesso_tune.recipes.document import MAX_DEPTH, OVERRIDE, Document, KeyPath, parse_document, read_document
from nesso_tune.recipes.lint import EXCLUSIVE
from nesso_tune.recipes.other_tools import FOREIGN
from nesso_tune.recipes.paths import reader_file
from nesso_tune.recipes.schema import RECIPES, DPORecipe, Recipe, SFTRecipe
from nesso_tune.recipes.secrets import masked
from nesso_tune.recipes.shipped import find_recipe, local_path, shipped_recipes


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads and validates a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe (`quickstart/sft`).
        overrides: values by dotted key, e.g. `{"train.learning_rate": 5e-4}`; list items by position. Of two keys that
            exclude each other (`train.max_steps`, `train.num_epochs`) the overridden one displaces the file's.

    Raises:
        RecipeError: with every mistake of the file at once, each with file, line and remedy.
    """
    file = find_recipe(path)
    if not file.exists() and file.with_name(f"{file.name}.yaml").is_file():
        file = file.with_name(f"{file.name}.yaml")
    if not file.exists() and file.suffix not in (".yaml", ".yml"):
        guess = closest(str(path), shipped_recipes())
        remedy = f"did you mean `{guess}`?" if guess else f"shipped recipes are {', '.join(shipped_recipes())}"
        raise RecipeError(str(path), "no such file and no shipped recipe of this name", remedy)
    document = read_document(file)
    for key, value in (overrides or {}).items():
        _override(document, key, value)
    _displace(document, overrides or {})
    recipe = validate(document)
    _check_files(recipe, document)
    return recipe


def parse_overrides(settings: list[str]) -> dict[str, Any]:
    """`["train.learning_rate=5e-4"]` as values by key, each read as YAML.

    Raises:
        RecipeError: for a setting without `=`, or whose value is not YAML.
    """
    out: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise RecipeError(OVERRIDE, f"`{shortened(setting)}` has no value", "write --set key.path=value")
        parsed = parse_document(text, f"{OVERRIDE} {shortened(key)}")
        if parsed.problems:
            raise RecipeError(parsed.problems)
        out[re.sub(r"\[(\d+)\]", r".\1", key.strip())] = parsed.value  # sources[0].path is sources.0.path
    return out


def validate(document: Document) -> Recipe:
    """The recipe a document holds.

    Raises:
        RecipeError: with all its mistakes.
    """
    raw = document.value
    if not isinstance(raw, Mapping):
        kinds = {"NoneType": "nothing", "list": "a list", "str": "text"}
        found = kinds.get(type(raw).__name__, "a single value")
        raise RecipeError(
            f"{document.name}:1", f"a recipe is a section of keys, this is {found}", "start with method: sft"
        )
    model, problems = _method(document, raw)
    try:
        recipe = model.model_validate({**raw, "method": model.model_fields["method"].default})
    except ValidationError as error:
        problems += complaints(error, document, model)
    if problems or document.problems:
        mistakes = first_of(_in_order([*document.problems, *problems]), document)
        raise RecipeError(Problem(masked(one.where), masked(one.what), masked(one.remedy)) for one in mistakes)
    return recipe


def _check_files(recipe: Recipe, document: Document) -> None:
    """Raises RecipeError for files that say how data is read and are not there."""
    named: dict[KeyPath, str | None] = {("chat", "template"): recipe.chat.template}
    for section in ("sources", "validation_sources"):
        for i, source in enumerate(getattr(recipe.data, section)):
            named[("data", section, i, "format")] = reader_file(source.format)
            named[("data", section, i, "tools_file")] = source.tools_file
    missing = [
        Problem(document.where(path), f"`{'.'.join(map(str, path))}` names a file that is not there: {name}",
                "correct the path") for path, name in named.items()
        if name is not None and name.endswith((".yaml", ".yml", ".py", ".json")) and not local_path(name).is_file()
    ]  # fmt: skip
    if missing:
        raise RecipeError(missing)


def _in_order(problems: list[Problem]) -> list[Problem]:
    def line(problem: Problem) -> int:
        tail = problem.where.rsplit(":", 1)[-1]
        return int(tail) if tail.isdigit() else 0

    return sorted(dict.fromkeys(problems), key=line)


def _method(document: Document, raw: Mapping[str, Any]) -> tuple[type[SFTRecipe] | type[DPORecipe], list[Problem]]:
    """The model to validate with. Without a usable `method`, a `dpo` section decides, so that the rest is checked."""
    method = raw.get("method")
    if isinstance(method, str) and method in RECIPES:
        return RECIPES[method], []
    model = DPORecipe if "dpo" in raw else SFTRecipe
    if method is not None:
        guess = closest(str(method), RECIPES)
        remedy = f"did you mean `{guess}`?" if guess else "write method: sft or method: dpo"
        return model, [
            Problem(document.where(("method",)), f"`method` must be sft or dpo, not {shortened(repr(method))}", remedy)
        ]
    said = next((key for key in raw if FOREIGN.get(str(key)) == "method"), None)
    remedy = "write method: sft or method: dpo" + (f" instead of `{said}`" if said else "")
    return model, [Problem(f"{document.name}:1", "the key `method` is missing", remedy)]


def _displace(document: Document, overrides: Mapping[str, Any]) -> None:
    """An override of one of two exclusive keys displaces the other one, where only the file has it."""
    for rule in EXCLUSIVE:
        names = {key: ".".join(map(str, (*rule.section, key))) for key in rule.keys}
        for key, other in (rule.keys, rule.keys[::-1]):
            section: Any = document.value
            for part in rule.section:
                section = section.get(part) if isinstance(section, dict) else None
            if overrides.get(names[key]) is not None and names[other] not in overrides and isinstance(section, dict):
                section.pop(other, None)


def _override(document: Document, key: str, value: Any) -> None:
    """Sets one value in the document, making sections on the way."""
    if not isinstance(document.value, dict):
        document.value = {}
    node: Any = document.value
    path: KeyPath = ()
    parts = key.split(".")
    if len(parts) > MAX_DEPTH:
        raise RecipeError(OVERRIDE, f"`{shortened(key)}` is nested too deeply", "write --set key.path=value")
    for depth, name in enumerate(parts, start=1):
        part: Any = _position(node, name, key) if isinstance(node, list) else name
        path = (*path, part)
        inner = node[part] if isinstance(node, list) or part in node else None
        if depth < len(parts) and isinstance(inner, (dict, list)):
            node = inner
            continue
        for old in [old for old in document.lines if old[: len(path)] == path]:
            del document.lines[old]
        document.lines[path] = 0
        node[part] = deepcopy(value) if depth == len(parts) else {}
        node = node[part]


def _position(items: list[Any], name: str, key: str) -> int:
    """The position in a list that one part of an override's key names."""
    if name.isascii() and name.isdigit() and int(name) < len(items):
        return int(name)
    remedy = f"use 0 to {len(items) - 1}" if items else "set the whole list"
    raise RecipeError(OVERRIDE, f"`{shortened(key)}`: there is no item `{shortened(name)}` in this list", remedy)
