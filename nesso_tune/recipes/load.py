"""Loads and validates recipes (`load_recipe`), and chat templates and data formats (`find_spec`, `read_spec`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from nesso_tune.errors import Problem, RecipeError, closest, shortened
from nesso_tune.recipes.builtin import (
    find_recipe,
    local_path,
    reader_file,
    shipped_folder,
    shipped_recipes,
    template_names,
)
from nesso_tune.recipes.error_messages import EQUIVALENT_KEYS, limit_problems, recipe_problems
from nesso_tune.recipes.rules import EXCLUSIVE
from nesso_tune.recipes.schema import RECIPES, DPORecipe, Recipe, SFTRecipe
from nesso_tune.recipes.secrets import masked
from nesso_tune.recipes.sections import Section
from nesso_tune.recipes.yaml_source import MAX_DEPTH, OVERRIDE, Document, KeyPath, parse_document, read_document

Spec = TypeVar("Spec", bound=Section)


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads and validates a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe (`quickstart/sft`).
        overrides: values by dotted key, e.g. `{"train.learning_rate": 5e-4}`; list items by index. If two keys are
            mutually exclusive (`train.max_steps`, `train.num_epochs`), the overridden one replaces the file's.

    Raises:
        RecipeError: with all problems of the file, each with file, line and remedy.
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
    _remove_excluded(document, overrides or {})
    recipe = validate(document)
    _check_files(recipe, document)
    return recipe


def parse_overrides(settings: list[str]) -> dict[str, Any]:
    """Parses `["train.learning_rate=5e-4"]` into values by key. Each value is parsed as YAML.

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
    """Validates a document as a recipe.

    Raises:
        RecipeError: with all problems of the document.
    """
    raw = document.value
    if not isinstance(raw, Mapping):
        kinds = {"NoneType": "nothing", "list": "a list", "str": "text"}
        found = kinds.get(type(raw).__name__, "a single value")
        raise RecipeError(
            f"{document.name}:1", f"a recipe must be a section of keys, not {found}", "start with method: sft"
        )
    model, problems = _recipe_model(document, raw)
    try:
        recipe = model.model_validate({**raw, "method": model.model_fields["method"].default})
    except ValidationError as error:
        problems += recipe_problems(error, document, model)
    if problems or document.problems:
        mistakes = limit_problems(_in_order([*document.problems, *problems]), document)
        raise RecipeError(Problem(masked(one.where), masked(one.what), masked(one.remedy)) for one in mistakes)
    return recipe


def find_spec(kind: str, name: str, key: str, also: tuple[str, ...] = ()) -> Path:
    """The YAML file of a chat template or data format: a path, or a shipped file of data_templates/KIND/.

    Args:
        kind: folder under data_templates/.
        name: value in the recipe.
        key: key of the recipe, for the error.
        also: valid names that are not files.

    Raises:
        RecipeError: if there is no such file; lists the valid names.
    """
    folder = shipped_folder("data_templates") / kind
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        names = [*also, *template_names(kind)]
        guess = closest(name, names)
        remedy = f"did you mean `{guess}`?" if guess else f"use {', '.join(names)}, or the path of a YAML file"
        raise RecipeError(key, f"there is no {key.rsplit('.', 1)[-1]} `{shortened(name, 300)}`", remedy)
    return path


def read_spec(path: Path, kind: type[Spec]) -> tuple[Spec, Document]:
    """Reads and validates a YAML file; returns the model and the document with the line of every key.

    Raises:
        RecipeError: with all problems of the file.
    """
    document = read_document(path)
    if not isinstance(document.value, Mapping):
        raise RecipeError(f"{path}:1", "is not a section of keys", "start from a shipped file under data_templates/")
    problems = list(document.problems)
    try:
        spec = kind.model_validate(document.value)
    except ValidationError as error:
        problems += recipe_problems(error, document, kind)
    if problems:
        raise RecipeError(limit_problems(problems, document))
    return spec, document


def _recipe_model(
    document: Document, raw: Mapping[str, Any]
) -> tuple[type[SFTRecipe] | type[DPORecipe], list[Problem]]:
    """Selects the recipe model by `method`; also returns the problems of that key.

    If `method` is missing or invalid, a `dpo` section decides, so the rest of the recipe is still validated.
    """
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
    alias = next((key for key in raw if EQUIVALENT_KEYS.get(str(key)) == "method"), None)
    remedy = "write method: sft or method: dpo" + (f" instead of `{alias}`" if alias else "")
    return model, [Problem(f"{document.name}:1", "the key `method` is missing", remedy)]


def _check_files(recipe: Recipe, document: Document) -> None:
    """Raises RecipeError if a template, format, reader or tools file is missing."""
    named: dict[KeyPath, str | None] = {("chat", "template"): recipe.chat.template}
    for section in ("sources", "validation_sources"):
        for i, source in enumerate(getattr(recipe.data, section)):
            named[("data", section, i, "format")] = reader_file(source.format)
            named[("data", section, i, "tools_file")] = source.tools_file
    missing = [
        Problem(document.where(path), f"`{'.'.join(map(str, path))}` names a file that does not exist: {name}",
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


def _override(document: Document, key: str, value: Any) -> None:
    """Sets one value in the document; creates missing sections."""
    if not isinstance(document.value, dict):
        document.value = {}
    node: Any = document.value
    path: KeyPath = ()
    parts = key.split(".")
    if len(parts) > MAX_DEPTH:
        raise RecipeError(OVERRIDE, f"`{shortened(key)}` is nested too deeply", "write --set key.path=value")
    for depth, name in enumerate(parts, start=1):
        part: Any = _list_index(node, name, key) if isinstance(node, list) else name
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


def _list_index(items: list[Any], name: str, key: str) -> int:
    """The list index given by one part of an override's key."""
    if name.isascii() and name.isdigit() and int(name) < len(items):
        return int(name)
    remedy = f"use 0 to {len(items) - 1}" if items else "set the whole list"
    raise RecipeError(OVERRIDE, f"`{shortened(key)}`: there is no item `{shortened(name)}` in this list", remedy)


def _remove_excluded(document: Document, overrides: Mapping[str, Any]) -> None:
    """Removes keys of the file that are mutually exclusive with an override."""
    for rule in EXCLUSIVE:
        names = {key: ".".join(map(str, (*rule.section, key))) for key in rule.keys}
        for key, other in (rule.keys, rule.keys[::-1]):
            section: Any = document.value
            for part in rule.section:
                section = section.get(part) if isinstance(section, dict) else None
            if overrides.get(names[key]) is not None and names[other] not in overrides and isinstance(section, dict):
                section.pop(other, None)
