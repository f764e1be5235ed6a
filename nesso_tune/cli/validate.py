"""What can be known of all recipes of a command before the first one starts, here or in a job."""

from __future__ import annotations

from glob import escape
from pathlib import Path

from nesso_tune.chat.base_template import check_own_template
from nesso_tune.chat.template import load_template
from nesso_tune.data.files import is_local
from nesso_tune.data.record_reader import reading_of
from nesso_tune.data.sources import check_output
from nesso_tune.errors import ModelError, RecipeError, closest
from nesso_tune.hub import check_at_hand
from nesso_tune.planning.plan import World
from nesso_tune.planning.planner import make_plan
from nesso_tune.recipes.builtin import is_result, local_path
from nesso_tune.recipes.error_messages import key_paths
from nesso_tune.recipes.schema import Recipe
from nesso_tune.runs.layout import OVERWRITTEN


def check_folders(names: list[str], recipes: list[Recipe]) -> None:
    """Raises RecipeError if two recipes have one run directory."""
    folders: dict[Path, str] = {}
    for name, recipe in zip(names, recipes, strict=True):
        folder = Path(recipe.output_dir).resolve()
        if folder in folders:
            raise RecipeError(name, f"has the same output_dir as {folders[folder]}", "give each a folder of its own")
        folders[folder] = name


def is_of(resume: str, recipe: Recipe) -> bool:
    """Whether a checkpoint that `--resume` names lies in a recipe's run directory."""
    return Path(resume).resolve().parent == Path(recipe.output_dir).resolve()


def check_flags(recipes: list[Recipe], resume: str, allow_changes: str) -> None:
    """Raises RecipeError for a checkpoint that is of none of the recipes, and for a key that none of them has."""
    if resume not in ("auto", "never"):
        # it may be in an earlier run that a killed --overwrite moved aside: opening the run restores it
        aside = Path(resume).parent.glob(f"{OVERWRITTEN}*/{escape(Path(resume).name)}")
        if not Path(resume).exists() and not any(aside):
            raise RecipeError("--resume", f"there is no checkpoint {resume}", "use auto, never, or the path of one")
        if not any(is_of(resume, recipe) for recipe in recipes):
            raise RecipeError(
                "--resume", f"{resume} is in no output_dir of these recipes", "name one of their checkpoints"
            )
    known = {".".join(names) for recipe in recipes for names in key_paths(type(recipe))}
    for key in filter(None, (key.strip() for key in allow_changes.split(","))):
        plain = ".".join(part for part in key.split(".") if not part.isdigit())
        if plain not in known:
            near = closest(plain, sorted(known))
            raise RecipeError(
                "--allow-changes", f"unknown key `{key}`", f"did you mean `{near}`?" if near else "correct it"
            )


def check_beforehand(recipes: list[Recipe], processes: int) -> None:
    """What can be known of every recipe before the first one starts: batch sizes, files and what is in them, templates.

    Raises:
        RecipeError, DataError: naming the key or the file.
    """
    for recipe in recipes:
        make_plan(recipe, World(processes))
        check_output(recipe)
        if recipe.chat.template is not None:
            load_template(recipe.chat.template)
        for source in (*recipe.data.sources, *recipe.data.validation_sources):
            if is_local(source.path):
                reading_of(source, recipe.method)


def check_bases(recipes: list[Recipe]) -> None:
    """A base that an earlier recipe of the command makes need not exist yet; another local one must.

    Raises:
        ModelError: naming the folder that is missing.
        RecipeError: if a base has a chat template of its own that would be replaced unsaid.
    """
    made: list[Path] = []
    for recipe in recipes:
        base = recipe.model.base
        if Path(base).resolve() not in made:
            check_at_hand(recipe.model)
            if is_result(base) and not local_path(base).exists():
                raise ModelError(
                    f"model.base {base}", "no such folder",
                    "run the recipe that makes it first, in the same command or before",
                )  # fmt: skip
            check_own_template(recipe.model, recipe.chat)
        made.append((Path(recipe.output_dir) / "final").resolve())
