"""Reading small typed YAML files: chat templates and data formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from nesso_tune.errors import RecipeError, closest, shortened
from nesso_tune.recipes.complaints import complaints, first_of
from nesso_tune.recipes.document import Document, read_document
from nesso_tune.recipes.sections import Section
from nesso_tune.recipes.shipped import shipped, template_names

Spec = TypeVar("Spec", bound=Section)


def find_spec(kind: str, name: str, key: str, also: tuple[str, ...] = ()) -> Path:
    """The file that a name means: a YAML file by its path, or a shipped one of data_templates/KIND/.

    Args:
        kind: the folder.
        name: what the recipe says.
        key: the recipe's key, for the error.
        also: names that the key takes besides files.

    Raises:
        RecipeError: if there is none, with the names that there are.
    """
    folder = shipped("data_templates") / kind
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        names = [*also, *template_names(kind)]
        guess = closest(name, names)
        remedy = f"did you mean `{guess}`?" if guess else f"use {', '.join(names)}, or the path of a YAML file"
        raise RecipeError(key, f"there is no {key.rsplit('.', 1)[-1]} `{shortened(name, 300)}`", remedy)
    return path


def read_spec(path: Path, kind: type[Spec]) -> tuple[Spec, Document]:
    """What a file says, and the document with the line of every key.

    Raises:
        RecipeError: with all that is wrong with it.
    """
    document = read_document(path)
    if not isinstance(document.value, Mapping):
        raise RecipeError(f"{path}:1", "is not a section of keys", "start from a shipped file under data_templates/")
    problems = list(document.problems)
    try:
        spec = kind.model_validate(document.value)
    except ValidationError as error:
        problems += complaints(error, document, kind)
    if problems:
        raise RecipeError(first_of(problems, document))
    return spec, document
