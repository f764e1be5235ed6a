"""All key paths of the recipe models, to tell a misplaced key from a misspelt one."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from nesso_tune.recipes.names import FOREIGN, NAMES_LIST, closest

Path = tuple[str | int, ...]


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, looked for inside Optional, tuple and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section(arg))), None)


@cache
def key_paths(model: type[BaseModel]) -> dict[tuple[str, ...], type[BaseModel] | None]:
    """Every key of `model` by its path (list positions left out), with the section it opens, if any."""
    out: dict[tuple[str, ...], type[BaseModel] | None] = {}
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        out[(name,)] = section
        if section is not None:
            out |= {(name, *below): kind for below, kind in key_paths(section).items()}
    return out


def section_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The section that stands at `path` (list positions are skipped); the model itself at the root."""
    names = tuple(part for part in path if isinstance(part, str))
    return key_paths(model).get(names) if names else model


def suggest_key(model: type[BaseModel], path: Path) -> str:
    """The remedy for the unknown key at `path`: the name it has here, its right place, or its right spelling."""
    *above, key = [str(part) for part in path if isinstance(part, str)]
    if key in NAMES_LIST:
        return f"remove it: {NAMES_LIST[key]}"
    section = section_at(model, path[:-1])
    siblings = list(section.model_fields) if section else []
    spelling = closest(key, siblings)
    foreign = FOREIGN.get(key)
    if foreign and (foreign in siblings or tuple(foreign.split(".")) in key_paths(model)):
        dotted = ".".join((*above, foreign)) if foreign in siblings else foreign
        return f"it is called `{dotted}` here"
    if spelling:
        return f"did you mean `{'.'.join((*above, spelling))}`?"
    elsewhere = [".".join(names) for names in key_paths(model) if names[-1] == key]
    if elsewhere:
        return f"it belongs to `{elsewhere[0]}`"
    misplaced = closest(key, {names[-1] for names in key_paths(model)})
    if misplaced:
        dotted = next(".".join(names) for names in key_paths(model) if names[-1] == misplaced)
        return f"did you mean `{dotted}`?"
    return f"remove it; the keys here are {', '.join(siblings)}"
