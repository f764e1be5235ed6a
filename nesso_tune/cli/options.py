"""Arguments and options shared by several verbs, and the checks of all recipes of a command before the first starts."""

from __future__ import annotations

import os
from glob import escape
from pathlib import Path
from typing import Annotated, Literal

import typer

from nesso_tune.chat.base_template import check_base_template
from nesso_tune.chat.template import load_template
from nesso_tune.data.files import is_local
from nesso_tune.data.record_reader import make_record_reader
from nesso_tune.data.sources import check_output, check_sources
from nesso_tune.errors import ModelError, Problem, RecipeError, RunEnvironmentError, closest
from nesso_tune.hub import check_local_base
from nesso_tune.planning.plan import World
from nesso_tune.planning.planner import make_plan
from nesso_tune.recipes import load_recipe
from nesso_tune.recipes.builtin import flag_path, is_run_output, local_path
from nesso_tune.recipes.error_messages import key_paths
from nesso_tune.recipes.load import parse_overrides
from nesso_tune.recipes.schema import Recipe
from nesso_tune.runs.layout import OVERWRITTEN

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a bundled recipe.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. train.learning_rate=5e-4.")
]
ChangesOption = Annotated[
    list[str],
    typer.Option("--allow-changes", metavar="KEY,...", help="Recipe keys that may differ from the resumed run."),
]
VerifyOption = Annotated[
    Literal["sample", "all", "none"],
    typer.Option(help="Validation rows whose loss must be that of final/ in transformers."),
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
    stems = [_stem(name) for name in names]
    shared = [s for s in settings if not _is_named(s)]
    named = [s for s in settings if _is_named(s)]
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


def settings_of(names: list[str], settings: list[str]) -> list[str]:
    """The overrides that apply to some of the recipes of a command."""
    stems = {_stem(name) for name in names}
    return [s for s in settings if not _is_named(s) or s.partition(":")[0] in stems]


def _is_named(setting: str) -> bool:
    """Whether an override names the recipe that it applies to."""
    return ":" in setting.partition("=")[0]


def _stem(name: str) -> str:
    return name.rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml")


def check_folders(names: list[str], recipes: list[Recipe]) -> None:
    """Raises RecipeError if two recipes have the same run directory."""
    folders: dict[Path, str] = {}
    for name, recipe in zip(names, recipes, strict=True):
        folder = Path(recipe.output_dir).resolve()
        if folder in folders:
            raise RecipeError(name, f"has the same output_dir as {folders[folder]}", "set a separate folder for each")
        folders[folder] = name


def is_checkpoint_of(resume: str, recipe: Recipe) -> bool:
    """Whether the checkpoint of `--resume` is in the run directory of a recipe."""
    return Path(resume).resolve().parent == Path(recipe.output_dir).resolve()


def check_flags(recipes: list[Recipe], resume: str, allow_changes: str) -> None:
    """Raises RecipeError for a checkpoint that belongs to no recipe, and for a key that no recipe has."""
    if resume not in ("auto", "never"):
        # a killed --overwrite leaves it there; opening the run restores it, see `runs/layout.py`
        moved = Path(resume).parent.glob(f"{OVERWRITTEN}*/{escape(Path(resume).name)}")
        if not Path(resume).exists() and not any(moved):
            raise RecipeError(
                "--resume", f"checkpoint {resume} does not exist", "use auto, never, or the path of a checkpoint"
            )
        if not any(is_checkpoint_of(resume, recipe) for recipe in recipes):
            raise RecipeError(
                "--resume",
                f"{resume} is not in the output_dir of any of these recipes",
                "name one of their checkpoints",
            )
    known = set(keys_of(recipes, allow_changes))
    for key in filter(None, (key.strip() for key in allow_changes.split(","))):
        if key not in known:
            near = closest(_plain_key(key), sorted(_keys(recipes)))
            raise RecipeError(
                "--allow-changes", f"unknown key `{key}`", f"did you mean `{near}`?" if near else "correct it"
            )


def keys_of(recipes: list[Recipe], allow_changes: str) -> list[str]:
    """The keys of `--allow-changes` that some of the recipes have."""
    keys = _keys(recipes)
    return [key for key in (key.strip() for key in allow_changes.split(",")) if key and _plain_key(key) in keys]


def _keys(recipes: list[Recipe]) -> set[str]:
    """Dotted names of all keys that the recipes can have."""
    return {".".join(names) for recipe in recipes for names in key_paths(type(recipe))}


def _plain_key(key: str) -> str:
    """A dotted key without the indices of list items."""
    return ".".join(part for part in key.split(".") if not part.isdigit())


def check_before_start(recipes: list[Recipe], processes: int) -> None:
    """Checks batch sizes, output folders, chat templates, gates, and the format of local data files of every recipe.

    Raises:
        RecipeError, DataError: naming the key or the file.
    """
    for recipe in recipes:
        make_plan(recipe, World(processes))
        check_output(recipe)
        if recipe.chat.template is not None:
            load_template(recipe.chat.template)
        if recipe.evaluation is not None and recipe.evaluation.gate is not None:
            from nesso_tune.evaluation.gate import load_gate  # imports numpy, which others do not need

            load_gate(recipe.evaluation.gate)
        check_sources(recipe)
        for source in (*recipe.data.sources, *recipe.data.validation_sources):
            if is_local(source.path):
                make_record_reader(source, recipe.method)


def check_bases(recipes: list[Recipe]) -> None:
    """Checks the base model of every recipe, unless an earlier recipe of the command creates it.

    Raises:
        ModelError: naming the missing folder.
        RecipeError: if the default would replace the chat template of a base without notice.
    """
    outputs: list[Path] = []
    for recipe in recipes:
        base = recipe.model.base
        if Path(base).resolve() not in outputs:
            check_local_base(recipe.model)
            if is_run_output(base) and not local_path(base).exists():
                raise ModelError(
                    f"model.base {base}", "no such folder",
                    "run the recipe that creates it first, in the same command or before",
                )  # fmt: skip
            check_base_template(recipe.model, recipe.chat)
        outputs.append((Path(recipe.output_dir) / "final").resolve())
