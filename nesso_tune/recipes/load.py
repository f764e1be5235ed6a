"""From a file and overrides to a validated recipe, or to all that is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nesso_tune.errors import Problem, RecipeError
from nesso_tune.recipes.complaints import complaints
from nesso_tune.recipes.document import OVERRIDE, Document, KeyPath, parse_document, read_document
from nesso_tune.recipes.names import FOREIGN, closest
from nesso_tune.recipes.schema import RECIPES, DPORecipe, Recipe, SFTRecipe
from nesso_tune.recipes.shipped import find_recipe, shipped_recipes


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads and validates a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe (`quickstart/sft`).
        overrides: values by dotted key, e.g. `{"train.learning_rate": 5e-4}`; list items by position.

    Raises:
        RecipeError: with every mistake of the file at once, each with file, line and remedy.
    """
    file = find_recipe(path)
    if not file.exists() and file.suffix not in (".yaml", ".yml"):
        guess = closest(str(path), shipped_recipes())
        remedy = f"did you mean `{guess}`?" if guess else f"shipped recipes are {', '.join(shipped_recipes())}"
        raise RecipeError(str(path), "no such file and no shipped recipe of this name", remedy)
    document = read_document(file)
    for key, value in (overrides or {}).items():
        _override(document, key, value)
    return validate(document)


def parse_overrides(settings: list[str]) -> dict[str, Any]:
    """`["train.learning_rate=5e-4"]` as values by key, each read as YAML.

    Raises:
        RecipeError: for a setting without `=`, or whose value is not YAML.
    """
    out: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise RecipeError(OVERRIDE, f"`{setting}` has no value", "write --set key.path=value")
        parsed = parse_document(text, f"{OVERRIDE} {key}")
        if parsed.problems:
            raise RecipeError(parsed.problems)
        out[key.strip()] = parsed.value
    return out


def validate(document: Document) -> Recipe:
    """The recipe a document holds.

    Raises:
        RecipeError: with all its mistakes.
    """
    raw = document.value
    if not isinstance(raw, Mapping):
        found = "nothing" if raw is None else type(raw).__name__
        raise RecipeError(f"{document.name}:1", f"a recipe is a section of keys, this is {found}", "start with method: sft")
    model, problems = _method(document, raw)
    try:
        recipe = model.model_validate(raw)
    except ValidationError as error:
        problems += complaints(error, document, model)
    if problems or document.problems:
        raise RecipeError(_in_order([*document.problems, *problems]))
    return recipe


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
    if "method" in raw:
        return model, []  # validation itself names the choices
    said = next((key for key in raw if FOREIGN.get(str(key)) == "method"), None)
    remedy = "write method: sft or method: dpo" + (f" instead of `{said}`" if said else "")
    return model, [Problem(f"{document.name}:1", "the key `method` is missing", remedy)]


def _override(document: Document, key: str, value: Any) -> None:
    """Sets one value in the document, making sections on the way."""
    path: KeyPath = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    if not isinstance(document.value, dict):
        document.value = {}
    node: Any = document.value
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, list):
            if not isinstance(part, int) or part >= len(node):
                raise RecipeError(OVERRIDE, f"`{key}`: there is no item {part}", f"use 0 to {len(node) - 1}")
        elif isinstance(node, dict):
            part = str(part)
            if not last and not isinstance(node.get(part), (dict, list)):
                node[part] = {}
        else:
            raise RecipeError(OVERRIDE, f"`{key}` reaches into a value that has no keys", "shorten the key")
        if last:
            node[part] = value
            document.lines[path] = 0
        else:
            node = node[part]
