"""Shipped recipes and data templates, and paths in recipes, flags and environment variables.

`~` is expanded here only: libraries expand it too, and a path that is not yet expanded could refer to two folders.
Texts that may be no paths are looked up by `os.path`: `Path.exists` fails for a name that is too long.
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
SOURCE_SEPARATOR = "/source/"  # in metric names: METRIC/source/NAME
LICENSE = r"^[a-z0-9][a-z0-9.+-]*$"  # names of licences on the hub
PATH_ERROR = "path"  # pydantic error type of `FilePath`


def expand_home(text: str) -> str:
    """Expands a leading `~` or `~user`; other text, such as a hub id, is returned unchanged.

    Raises:
        ValueError: if the user does not exist. `~draft.jsonl` is a valid file name.
    """
    path = os.path.expanduser(text)
    if path == text and text.startswith("~") and "/" in text:
        raise ValueError(f"there is no user `{text[1:].partition('/')[0]}`")
    return path


def reader_file(name: str) -> str:
    """The file of a user-defined reader (`FILE.py:FUNCTION`); other text is returned unchanged."""
    file, colon, _ = name.rpartition(":")
    return file if colon and file.endswith(".py") else name


def flag_path(name: str | Path) -> str:
    """Expands a path or name from the command line or an API call: the shell does not expand `--flag=~/x`.

    Raises:
        RecipeError: if it is empty, or the user in `~user/` does not exist.
    """
    text = str(name)
    if not text.strip():  # as a path it would be the working directory
        raise RecipeError('""', "is an empty name", "write a path or a name")
    try:
        return expand_home(text)
    except ValueError as error:
        raise RecipeError(text, str(error), "write the full path") from None


def environment_path(name: str) -> str | None:
    """The path in an environment variable; None if the variable is unset or empty.

    Raises:
        RunEnvironmentError: if the value contains an unexpanded variable, or its user does not exist.
    """
    text = os.environ.get(name)
    if not text:
        return None
    if found := VARIABLE.search(text):
        what = f"contains the unexpanded variable {found[0]}: {text}"
        raise RunEnvironmentError(name, what, f'export {name}="{text}" in a shell, or write the path itself')
    try:
        return expand_home(text)
    except ValueError as error:
        raise RunEnvironmentError(name, str(error), "write the full path") from None


def _expanded_path(text: str) -> str:
    if found := VARIABLE.search(text):
        raise PydanticCustomError(
            PATH_ERROR, "{what}; {remedy}",
            {"what": f"contains {found[0]}, but variables are not expanded in recipes",
             "remedy": "write the path itself, or let the shell expand it:"},
        )  # fmt: skip
    try:
        return expand_home(text)
    except ValueError as error:
        raise PydanticCustomError(
            PATH_ERROR, "{what}; {remedy}", {"what": f"is {text}, and {error}", "remedy": "write the full path"}
        ) from None


def _expanded_metric(metric: str) -> str:
    whole, of_source, name = metric.partition(SOURCE_SEPARATOR)
    return f"{whole}{of_source}{os.path.expanduser(name)}"


_PATH = AfterValidator(_expanded_path)
FilePath = Annotated[str, Field(pattern=r"\S"), _PATH]  # path, hub id or name
PathName = Annotated[str, Field(pattern=r"\S"), AfterValidator(os.path.expanduser)]  # name; the default is a path
MetricName = Annotated[str, Field(pattern=r"\S"), AfterValidator(_expanded_metric)]  # optionally with /source/NAME


@cache
def path_keys(model: type[BaseModel]) -> frozenset[tuple[str, ...]]:
    """Paths of all keys of `model` with a file path or a list of file paths as value."""
    found: set[tuple[str, ...]] = set()
    for name, field in model.model_fields.items():
        parts = [*field.metadata, *_type_arguments(field.annotation)]
        if _PATH in parts:
            found.add((name,))
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= {(name, *below) for below in path_keys(part)}
    return frozenset(found)


def _type_arguments(annotation: Any) -> list[Any]:
    """An annotation and its type arguments, recursively."""
    return [annotation, *(part for inside in get_args(annotation) for part in _type_arguments(inside))]


PACKAGE = Path(__file__).resolve().parent.parent
BUNDLED_TOKENS_RATIO = 2  # tokens per text of the bundled tokenizer, relative to one with a large vocabulary


def shipped_folder(kind: str) -> Path:
    """Folder of the shipped `recipes` or `data_templates`: in the package if installed, in the repository otherwise."""
    inside = PACKAGE / "shipped" / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


@cache
def template_names(kind: str) -> tuple[str, ...]:
    """Names of the shipped files in data_templates/KIND/."""
    return tuple(sorted(file.stem for file in (shipped_folder("data_templates") / kind).glob("*.yaml")))


def bundled_base() -> str:
    """Base model of the quickstart. Its small tokenizer replaces one that is not available (`BUNDLED_TOKENS_RATIO`)."""
    return str(shipped_folder("recipes") / "quickstart" / "base")


def local_path(text: str) -> Path:
    """Resolves a path relative to the working directory; `recipes/…` falls back to the shipped files.

    The quickstart therefore runs from any folder.
    """
    path = Path(text)
    inside = shipped_folder("recipes") / path.relative_to("recipes") if path.parts[:1] == ("recipes",) else None
    return inside if inside is not None and not os.path.exists(path) and inside.exists() else path


def is_run_output(base: str) -> bool:
    """Whether a base is the final model of a run, `OUTPUT_DIR/final`. It need not exist yet."""
    return base.rstrip("/").endswith("/final")


def find_recipe(name: str | Path) -> Path:
    """Path of a recipe, given by a path or by the name of a shipped recipe (`quickstart/sft`)."""
    path = Path(flag_path(name))
    if os.path.isfile(path) or path.suffix in (".yaml", ".yml"):
        return local_path(str(path))
    return next((p for p in (shipped_folder("recipes") / f"{name}.yaml",) if os.path.isfile(p)), path)


@dataclass(frozen=True)
class RecipeSummary:
    """Header of a shipped recipe: title, command, hardware and cost."""

    name: str
    title: str
    command: str
    hardware: str
    cost: str


def recipe_summaries() -> list[RecipeSummary]:
    """Summaries of all shipped recipes, from their header comments."""
    summaries = []
    for name in shipped_recipes():
        text = (shipped_folder("recipes") / f"{name}.yaml").read_text(encoding="utf-8")
        header = [line[1:].rstrip() for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
        lines = [line.strip() for line in header if not line.strip().startswith("yaml-language-server")]
        command = next(line.strip() for line in header if line.startswith("   "))
        facts = dict(line.split(": ", 1) for line in lines if line.startswith(("Hardware: ", "Cost: ")))
        summaries.append(RecipeSummary(name, lines[0].rstrip("."), command, facts["Hardware"], facts["Cost"]))
    return summaries


def shipped_recipes() -> list[str]:
    """Names of all shipped recipes."""
    root = shipped_folder("recipes")
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))
