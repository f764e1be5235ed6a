"""All key paths of the recipe models, to tell a misplaced key from a misspelt one."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from nesso_tune.errors import closest, shortened
from nesso_tune.recipes.other_tools import FOREIGN, NAMES_LIST
from nesso_tune.recipes.schema import RECIPES

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
    if not names:
        return model
    return key_paths(model).get(names) or key_paths(model).get(names[:-1])  # a name of the user's own, as in rules.en


def suggest_key(model: type[BaseModel], path: Path) -> str:
    """The remedy for the unknown key at `path`: the name it has here, its right place, or its right spelling."""
    *above, key = [str(part) for part in path if isinstance(part, str)]
    if key in NAMES_LIST:
        return f"remove it: {NAMES_LIST[key]}"
    section = section_at(model, path[:-1])
    siblings = list(section.model_fields) if section else []
    ours = FOREIGN.get(key, key)
    if ours in siblings:
        return f"it is called `{'.'.join((*map(shortened, above), ours))}` here"
    if places := _places(model, key, above):
        return f"it belongs to {places}"
    if places := _places(model, ours, above):
        return f"it is called {places} here"
    for method, other in RECIPES.items():
        if model in RECIPES.values() and (places := _places(other, ours, above)):
            return f"remove it: {places} is only for method: {method}"
    everywhere = sorted({names[-1] for names in key_paths(model)})
    for names, cutoff in ((siblings, 0.8), (everywhere, 0.8), (siblings, 0.6)):
        if guess := closest(key, names, cutoff):
            here = ".".join(
                shortened(str(part)) for part in (*path[:-1], guess)
            )  # with the positions in lists, as --set takes them
            places = f"`{here}`" if guess in siblings else _places(model, guess, above)
            return f"did you mean {places}?"
    return f"remove it; the keys here are {', '.join(siblings)}"


def _places(model: type[BaseModel], name: str, near: list[str]) -> str:
    """The places of a key (a name or a dotted path), those in the section `near` if there are any; "" if none."""
    wanted = tuple(name.split("."))
    found = [names for names in key_paths(model) if names[-len(wanted) :] == wanted]
    found = [names for names in found if "validation_sources" not in names[:-1]]  # `sources` has the same keys
    found = [names for names in found if list(names[: len(near)]) == near] or found
    return " or ".join(f"`{'.'.join(names)}`" for names in found)
