"""Reading small typed YAML files: chat templates and data formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from nesso_tune.errors import RecipeError
from nesso_tune.recipes.complaints import complaints
from nesso_tune.recipes.document import Document, read_document
from nesso_tune.recipes.sections import Section

Spec = TypeVar("Spec", bound=Section)


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
        raise RecipeError(problems)
    return spec, document
