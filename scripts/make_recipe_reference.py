"""Generates docs/recipe.md, the reference of all recipe keys, from the schema."""

from __future__ import annotations

import types
import typing
from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from nesso_tune.recipes.error_messages import key_descriptions
from nesso_tune.recipes.schema import BaseRecipe, DPORecipe, SFTRecipe
from nesso_tune.recipes.sections import Limit, SFTData

HEAD = """# Recipe reference

All keys of a recipe, by section. Generated from the schema by `scripts/make_recipe_reference.py`; do not edit.
Intervals are a number of steps (integer) or a fraction of the run (number between 0 and 1).
"""


def reference() -> str:
    """The page in Markdown."""
    parts = [HEAD]
    parts += _section("Top level: `method` (`sft` or `dpo`) and", BaseRecipe)
    for name, field in SFTRecipe.model_fields.items():
        section = field.annotation
        if name == "data":
            parts += _section("data (method: sft)", SFTRecipe.model_fields["data"].annotation)
            parts += _section("data (method: dpo)", DPORecipe.model_fields["data"].annotation)
            continue
        parts += [line for one in _sections(section) for line in _section(name, one)]
    parts += _section("dpo (method: dpo)", DPORecipe.model_fields["dpo"].annotation)
    for name in ("model", "cluster", "data", "train"):
        parts += _nested(name, _sections(SFTRecipe.model_fields[name].annotation)[0])
    parts += _nested("data", DPORecipe.model_fields["data"].annotation, besides=SFTData.model_fields)
    return "\n".join(parts).rstrip() + "\n"


def _nested(above: str, section: Any, besides: Container[str] = ()) -> list[str]:
    """The sections nested in a section, recursively."""
    lines, limits = [], False
    for key, field in section.model_fields.items():
        for inner in _sections(field.annotation) if key not in (*besides, "validation_sources") else ():
            entry = {tuple: ", one entry", dict: ".NAME"}.get(_holder(field.annotation), "")
            if inner is not Limit:
                lines += [*_section(f"{above}.{key}{entry}", inner), *_nested(f"{above}.{key}", inner)]
            limits = limits or inner is Limit
    return [*lines, *(_section(f"{above}, each of these", Limit) if limits else [])]


def _holder(annotation: Any) -> Any:
    """The container of a key's sections: tuple, dict, or None."""
    origin = get_origin(annotation)
    return _holder(get_args(annotation)[0]) if origin is Annotated else origin


def _section(title: str, model: Any) -> list[str]:
    rows = [
        f"| `{name}` | {_kind(field)} | {_default(field)} | {_cell(key_descriptions(model).get(name, ''))} |"
        for name, field in model.model_fields.items()
    ]
    summary = (model.__doc__ or "").strip().splitlines()[0]
    return [f"## {title}", "", summary, "", "| key | values | default | description |", "|---|---|---|---|", *rows, ""]


def _sections(annotation: Any, inside: str | None = None) -> list[type[BaseModel]]:
    """The sections in an annotation; with `inside`, those of one of its keys."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _sections(annotation.model_fields[inside].annotation) if inside else [annotation]
    return [found for arg in get_args(annotation) for found in _sections(arg, inside)]


def _kind(field: Any) -> str:
    bounds = {"gt": "> ", "ge": ">= ", "lt": "< ", "le": "<= "}
    limits = [f"{bounds[k]}{v:,}" for m in field.metadata for k in bounds if (v := getattr(m, k, None)) is not None]
    return _cell(", ".join([_named(field.annotation), *limits]))


def _named(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _named(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_named(a) for a in arguments))
    if origin is tuple:
        return f"list of {_named(arguments[0])}"
    if origin is dict:
        return f"{{{_named(arguments[0])}: {_named(arguments[1])}}}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    return names.get(annotation, str(annotation))


def _default(field: Any) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, BaseModel):
        return "see below"
    plain = {None: "null", True: "true", False: "false"}
    if default is None or isinstance(default, bool):
        return plain[default]
    return f"`{list(default) if isinstance(default, tuple) else default}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    Path(__file__).parent.parent.joinpath("docs", "recipe.md").write_text(reference(), encoding="utf-8")
