"""Arguments and options shared by several verbs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from nesso_tune.errors import Problem, RecipeError, RunEnvironmentError
from nesso_tune.recipes import Recipe, load_recipe
from nesso_tune.recipes.builtin import flag_path
from nesso_tune.recipes.load import parse_overrides

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a bundled recipe.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. train.learning_rate=5e-4.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print plain JSON.")]


def file_path(text: str) -> Path:
    """Parser of path options for typer; see `flag_path`."""
    return Path(flag_path(str(text)))


def world_size_from_environment() -> int:
    """Number of processes that the launcher started, from `WORLD_SIZE`.

    Raises:
        RunEnvironmentError: if the launcher's variables are not valid numbers.
    """
    problems: list[Problem] = []
    minimum = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    numbers = dict(minimum)
    remedy = "unset it, or start with `nesso-tune launch`, torchrun or `accelerate launch`"
    for name, least in minimum.items():
        text = os.environ.get(name) or str(least)
        if not text.isdecimal() or int(text) < least:
            problems.append(Problem(name, f"is {text!r}, not a number of processes", remedy))
        else:
            numbers[name] = int(text)
    if not problems and numbers["RANK"] >= numbers["WORLD_SIZE"]:
        problems.append(Problem("RANK", f"is {numbers['RANK']}, but WORLD_SIZE is {numbers['WORLD_SIZE']}", remedy))
    if problems:
        raise RunEnvironmentError(problems)
    return numbers["WORLD_SIZE"]


def load_all(names: list[str], settings: list[str]) -> list[Recipe]:
    """Loads all recipes with their overrides; `sft:key=value` applies to the recipe with the file stem `sft`.

    Raises:
        RecipeError: with the problems of all recipes.
    """
    stems = [name.rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml") for name in names]
    shared = [s for s in settings if ":" not in s.partition("=")[0]]
    named = [s for s in settings if ":" in s.partition("=")[0]]
    for setting in named:
        stem = setting.partition(":")[0]
        if stem not in stems:
            raise RecipeError(
                "--set", f"`{setting}` does not name a recipe of this command", f"use one of {', '.join(stems)}"
            )
    recipes: list[Recipe] = []
    problems: list[Problem] = []
    for name, stem in zip(names, stems, strict=True):
        own = [s.partition(":")[2] for s in named if s.partition(":")[0] == stem]
        try:
            recipes.append(load_recipe(name, parse_overrides([*shared, *own])))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(dict.fromkeys(problems))  # report a shared --set once
    return recipes
