"""Arguments and options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

from nesso_tune.errors import Problem, RecipeError
from nesso_tune.recipes import Recipe, load_recipe
from nesso_tune.recipes.load import parse_overrides

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. train.learning_rate=5e-4.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print plain JSON.")]


def load_all(names: list[str], settings: list[str]) -> list[Recipe]:
    """Loads every recipe with its overrides; `sft:key=value` goes to the recipe whose file stem is `sft`.

    Raises:
        RecipeError: with the mistakes of all recipes.
    """
    stems = [name.rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml") for name in names]
    shared = [s for s in settings if ":" not in s.partition("=")[0]]
    named = [s for s in settings if ":" in s.partition("=")[0]]
    for setting in named:
        stem = setting.partition(":")[0]
        if stem not in stems:
            raise RecipeError("--set", f"`{setting}` names no recipe of this command", f"use one of {', '.join(stems)}")
    recipes: list[Recipe] = []
    problems: list[Problem] = []
    for name, stem in zip(names, stems, strict=True):
        own = [s.partition(":")[2] for s in named if s.partition(":")[0] == stem]
        try:
            recipes.append(load_recipe(name, parse_overrides([*shared, *own])))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(dict.fromkeys(problems))  # a shared --set is wrong once, not once a recipe
    return recipes
