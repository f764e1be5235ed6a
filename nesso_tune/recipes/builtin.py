"""Paths as a recipe, a flag or the environment names them: `~` is expanded once, here, and nowhere later.

Libraries expand `~` too, each in its own place; a path that still held one would mean two folders.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import PydanticCustomError

from nesso_tune.errors import RecipeError, RunEnvironmentError

VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[^}]*\})")
SOURCE_SEPARATOR = "/source/"  # in the name of a metric: what follows names a source
PATH_ERROR = "path"  # type of the error that `FilePath` raises


def expand_home(text: str) -> str:
    """A path with a leading `~` or `~user` expanded; anything else, a hub id or a name included, stays as it is.

    Raises:
        ValueError: for a folder of a user that does not exist here. A file may be called `~draft.jsonl`.
    """
    path = os.path.expanduser(text)
    if path == text and text.startswith("~") and "/" in text:
        raise ValueError(f"there is no user `{text[1:].partition('/')[0]}` here")
    return path


def reader_file(name: str) -> str:
    """The file of a reader of the user's, `FILE.py:FUNCTION`; any other text as it is."""
    file, colon, _ = name.rpartition(":")
    return file if colon and file.endswith(".py") else name


def flag_path(text: str) -> str:
    """A path that a command line or a caller gives. The shell has expanded variables, but not `--flag=~/x`.

    Raises:
        RecipeError: for a folder of a user that does not exist here.
    """
    try:
        return expand_home(text)
    except ValueError as error:
        raise RecipeError(text, str(error), "write the whole path") from None


def environment_path(name: str) -> str | None:
    """The path in an environment variable; None if it is unset or empty.

    Raises:
        RunEnvironmentError: if it holds a variable that no shell expanded.
    """
    text = os.environ.get(name)
    if not text:
        return None
    if found := VARIABLE.search(text):
        what = f"is {text}, and nothing expands {found[0]} in it"
        raise RunEnvironmentError(name, what, f'export {name}="{text}" in a shell, or write the path itself')
    try:
        return expand_home(text)
    except ValueError as error:
        raise RunEnvironmentError(name, str(error), "write the whole path") from None


def _expanded(text: str) -> str:
    if found := VARIABLE.search(text):
        raise PydanticCustomError(
            PATH_ERROR, "{what}; {remedy}",
            {"what": f"holds {found[0]}, which is not expanded in a recipe",
             "remedy": "write the path itself, or let the shell expand it:"},
        )  # fmt: skip
    try:
        return expand_home(text)
    except ValueError as error:
        raise PydanticCustomError(
            PATH_ERROR, "{what}; {remedy}", {"what": f"is {text}, and {error}", "remedy": "write the whole path"}
        ) from None


def _of_expanded(metric: str) -> str:
    whole, of_source, name = metric.partition(SOURCE_SEPARATOR)
    return f"{whole}{of_source}{os.path.expanduser(name)}"


_PATH = AfterValidator(_expanded)
FilePath = Annotated[str, Field(pattern=r"\S"), _PATH]  # of a file or folder; also what may be a hub id or a name
PathName = Annotated[str, Field(pattern=r"\S"), AfterValidator(os.path.expanduser)]  # a name, by default a path
MetricName = Annotated[str, Field(pattern=r"\S"), AfterValidator(_of_expanded)]  # may end with the name of a source


@cache
def path_keys(model: type[BaseModel]) -> frozenset[tuple[str, ...]]:
    """Every key of `model`, with the sections that lead to it, whose value is a path or a list of paths."""
    found: set[tuple[str, ...]] = set()
    for name, field in model.model_fields.items():
        parts = [*field.metadata, *_parts(field.annotation)]
        if _PATH in parts:
            found.add((name,))
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= {(name, *below) for below in path_keys(part)}
    return frozenset(found)


def _parts(annotation: Any) -> list[Any]:
    """An annotation and all that is inside Optional, tuple, dict and Annotated."""
    return [annotation, *(part for inside in get_args(annotation) for part in _parts(inside))]


PACKAGE = Path(__file__).resolve().parent.parent
BUNDLED_TOKENS_RATIO = 2


def shipped_folder(kind: str) -> Path:
    """The folder of shipped `recipes` or `data_templates`: inside an installed package, beside it in a checkout."""
    inside = PACKAGE / "shipped" / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


@cache
def template_names(kind: str) -> tuple[str, ...]:
    """The names of the shipped files of data_templates/KIND/."""
    return tuple(sorted(file.stem for file in (shipped_folder("data_templates") / kind).glob("*.yaml")))


def bundled_base() -> str:
    """The quickstart's base, whose small tokenizer stands in for one that is not at hand.

    It makes about twice as many tokens of a text as one with a large vocabulary: `BUNDLED_TOKENS_RATIO`.
    """
    return str(shipped_folder("recipes") / "quickstart" / "base")


def local_path(text: str) -> Path:
    """The path that a recipe means: relative to the working directory, or, for `recipes/…`, a file that is shipped.

    So the quickstart runs from any folder, installed or not.
    """
    path = Path(text)
    inside = shipped_folder("recipes") / path.relative_to("recipes") if path.parts[:1] == ("recipes",) else None
    return inside if inside is not None and not path.exists() and inside.exists() else path


def is_run_output(base: str) -> bool:
    """Whether a base is named as what a run makes: `OUTPUT_DIR/final`, which may not exist yet."""
    return base.rstrip("/").endswith("/final")


def find_recipe(name: str | Path) -> Path:
    """The file a recipe name means: a path as it is, or a shipped recipe by its name (`quickstart/sft`)."""
    path = Path(flag_path(str(name)))
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return local_path(str(path))
    return next((p for p in (shipped_folder("recipes") / f"{name}.yaml",) if p.is_file()), path)


@dataclass(frozen=True)
class RecipeSummary:
    """What the head of a shipped recipe says: its title, the command that runs it, the hardware, and what it costs."""

    name: str
    title: str
    command: str
    hardware: str
    cost: str


def recipe_summaries() -> list[RecipeSummary]:
    """All shipped recipes, by what their first comment says."""
    entries = []
    for name in shipped_recipes():
        text = (shipped_folder("recipes") / f"{name}.yaml").read_text(encoding="utf-8")
        head = [line[1:].rstrip() for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
        said = [line.strip() for line in head if not line.strip().startswith("yaml-language-server")]
        command = next(line.strip() for line in head if line.startswith("   "))
        facts = dict(line.split(": ", 1) for line in said if line.startswith(("Hardware: ", "Cost: ")))
        entries.append(RecipeSummary(name, said[0].rstrip("."), command, facts["Hardware"], facts["Cost"]))
    return entries


def shipped_recipes() -> list[str]:
    """The names of all shipped recipes."""
    root = shipped_folder("recipes")
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))
