"""Arguments and options that several verbs share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from nesso_tune.errors import Problem, RecipeError, RunEnvironmentError
from nesso_tune.recipes import Recipe, load_recipe
from nesso_tune.recipes.builtin import flag_path
from nesso_tune.recipes.load import parse_overrides

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. train.learning_rate=5e-4.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print plain JSON.")]


def file_path(text: str) -> Path:
    """What a flag that takes a path means; a parser for typer."""
    return Path(flag_path(str(text)))


def world_size_from_environment() -> int:
    """How many processes a launcher started: `WORLD_SIZE`.

    Raises:
        RunEnvironmentError: if it, or this one's number, is no number that fits.
    """
    wrong: list[Problem] = []
    numbers = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    remedy = "unset it, or start with `nesso-tune launch`, torchrun or `accelerate launch`"
    for name, least in numbers.items():
        said = os.environ.get(name) or str(least)
        if not said.isdecimal() or int(said) < least:
            wrong.append(Problem(name, f"is {said!r}, no number of processes", remedy))
        else:
            numbers[name] = int(said)
    if not wrong and numbers["RANK"] >= numbers["WORLD_SIZE"]:
        wrong.append(Problem("RANK", f"is {numbers['RANK']}, but WORLD_SIZE is {numbers['WORLD_SIZE']}", remedy))
    if wrong:
        raise RunEnvironmentError(wrong)
    return numbers["WORLD_SIZE"]


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
