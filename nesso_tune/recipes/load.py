"""Loads and validates recipes (`load_recipe`), and chat templates and data formats (`find_spec`, `read_spec`)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from nesso_tune.errors import Problem, RecipeError, closest, shortened
from nesso_tune.recipes.builtin import find_recipe, shipped_folder, shipped_recipes, template_names
from nesso_tune.recipes.error_messages import EQUIVALENT_KEYS, limit_problems, recipe_problems, validated
from nesso_tune.recipes.rules import remove_excluded
from nesso_tune.recipes.schema import RECIPES, DPORecipe, Recipe, SFTRecipe, check_files
from nesso_tune.recipes.sections import Section
from nesso_tune.recipes.yaml_source import OVERRIDE, Document, parse_document, plain_data, read_document, set_values

Spec = TypeVar("Spec", bound=Section)
RecipeSource = Recipe | str | Path | Mapping[str, Any]  # what `load_recipe` takes


class SetOptions(dict[str, Any]):
    """Overrides that were given with `--set`, which is their location in errors."""


def load_recipe(source: RecipeSource, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads and validates a recipe.

    Args:
        source: a YAML file, the name of a shipped recipe (`quickstart/sft`), the keys of a recipe, YAML text, or a
            recipe that is loaded already.
        overrides: values by dotted key, e.g. `{"train.learning_rate": 5e-4}`; list items by index. If two keys are
            mutually exclusive (`train.max_steps`, `train.num_epochs`), the overridden one replaces the file's.

    Raises:
        RecipeError: with all problems of the recipe, each with file, line and remedy.
    """
    if isinstance(source, SFTRecipe | DPORecipe):
        return source.replace({} if overrides is None else overrides)
    document = _document(source)
    if isinstance(overrides, SetOptions):
        document.override = OVERRIDE
    if overrides is not None:
        set_values(document, overrides, "overrides")
        remove_excluded(document.value, overrides)
    recipe = validate(document)
    check_files(recipe, document)
    return recipe


def as_recipe(source: RecipeSource) -> Recipe:
    """The recipe of an argument that takes what `load_recipe` takes; a recipe is returned as it is."""
    return source if isinstance(source, SFTRecipe | DPORecipe) else load_recipe(source)


def _document(source: str | Path | Mapping[str, Any]) -> Document:
    """The keys of a recipe, with their locations."""
    if isinstance(source, Mapping):
        return Document("recipe", plain_data(source), is_text=False)
    if not isinstance(source, str | os.PathLike):
        what = f"must be a recipe, a name, a path, a mapping of keys or YAML text, not {type(source).__name__}"
        raise RecipeError("recipe", what, 'name a YAML file, or a shipped recipe: "quickstart/sft"')
    if isinstance(source, str) and "\n" in source:
        return parse_document(source, "recipe")
    file = find_recipe(source)
    if not os.path.exists(file) and os.path.isfile(named := file.with_name(f"{file.name}.yaml")):
        file = named
    if not os.path.exists(file) and (document := _one_line(str(source))) is not None:
        return document
    if not os.path.exists(file) and file.suffix not in (".yaml", ".yml"):
        guess = closest(str(source), shipped_recipes())
        remedy = f"did you mean `{guess}`?" if guess else f"shipped recipes are {', '.join(shipped_recipes())}"
        raise RecipeError(shortened(str(source), 300), "no such file and no shipped recipe of this name", remedy)
    return read_document(file)


def _one_line(text: str) -> Document | None:
    """The keys of YAML text in one line, such as `{method: sft}`; None if it is the name of a file."""
    try:
        document = parse_document(text, "recipe")
    except RecipeError:
        return None
    return document if isinstance(document.value, Mapping) else None


def parse_overrides(settings: list[str]) -> SetOptions:
    """Parses `["train.learning_rate=5e-4"]` into values by key. Each value is parsed as YAML.

    Raises:
        RecipeError: for a setting without `=`, or whose value is not YAML.
    """
    out = SetOptions()
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
    return validated(document, model, {**raw, "method": model.model_fields["method"].default}, problems)


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
    if not os.path.isfile(path):
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
