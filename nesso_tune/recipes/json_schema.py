"""JSON Schema of recipes, for completion, documentation and validation in editors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter

from nesso_tune.recipes.builtin import template_names
from nesso_tune.recipes.error_messages import key_descriptions
from nesso_tune.recipes.rules import EXCLUSIVE, INERT
from nesso_tune.recipes.schema import RECIPES, DPORecipe, SFTRecipe
from nesso_tune.recipes.sections import Section
from nesso_tune.recipes.yaml_source import KeyPath

SCHEMA_FILE = "nesso-tune.schema.json"  # written next to recipes
# Keys that take the name of a shipped file: ((section, key), folder under data_templates/, other names)
SHIPPED_FILE_KEYS = (
    (("ChatSection", "template"), "chat", ()),
    (("Source", "format"), "formats", ("auto",)),
)
NOT_NULL = {"not": {"type": "null"}}


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe; `method` selects SFT or DPO.

    It accepts every recipe that loads. It includes the lint rules that JSON Schema can express; `nesso-tune check`
    runs all rules.
    """
    recipes = {name: TypeAdapter(kind).json_schema() for name, kind in RECIPES.items()}
    definitions: dict[str, Any] = {}
    for name, schema in recipes.items():
        definitions |= schema.pop("$defs")
        definitions[RECIPES[name].__name__] = schema
        schema["required"] = ["method", *schema["required"]]
    for kind in _subclasses(Section):
        for key, text in key_descriptions(kind).items():
            if kind.__name__ in definitions:
                definitions[kind.__name__]["properties"][key]["description"] = text
    for section, rule in _rules():
        definitions[_definition(definitions, section)].setdefault("allOf", []).append(rule)
    for (name, key), folder, more in SHIPPED_FILE_KEYS:
        definitions[name]["properties"][key]["examples"] = [*more, *template_names(folder)]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "nesso-tune recipe",
        "description": "One validated file, one training run.",
        "type": "object",
        "required": ["method"],
        "properties": {"method": {"enum": list(RECIPES), "description": "The training method."}},
        "if": {"properties": {"method": {"const": "dpo"}}, "required": ["method"]},
        "then": {"$ref": f"#/$defs/{DPORecipe.__name__}"},
        "else": {"$ref": f"#/$defs/{SFTRecipe.__name__}"},
        "$defs": {name: _tidy(definitions[name]) for name in sorted(definitions)},
    }


def _subclasses(kind: type[Section]) -> Iterator[type[Section]]:
    """All classes derived from a section."""
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


def _tidy(schema: Any) -> Any:
    """Removes titles that pydantic generates and joins descriptions into one line."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _tidy(value) for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
    if isinstance(kept.get("description"), str):
        kept["description"] = " ".join(kept["description"].split())
    return kept


def _rules() -> list[tuple[KeyPath, dict[str, Any]]]:
    """Schemas of the lint rules, by section."""
    rules: list[tuple[KeyPath, dict[str, Any]]] = []
    for pair in EXCLUSIVE:
        both = {"required": list(pair.keys), "properties": dict.fromkeys(pair.keys, NOT_NULL)}
        rules.append((pair.section, {"not": both, "$comment": f"{' and '.join(pair.keys)}: {pair.remedy}"}))
    for inert in INERT:
        when = {"properties": {inert.key: {"const": inert.value}}, "required": [inert.key]}
        then = {"properties": {key: {"type": "null"} for key in inert.inert}}
        rules.append((inert.section, {"if": when, "then": then}))
    return rules


def _definition(definitions: dict[str, Any], section: KeyPath) -> str:
    """Name of a section's definition in `$defs`."""
    name = SFTRecipe.__name__
    for key in section:
        name = definitions[name]["properties"][key]["$ref"].rsplit("/", 1)[-1]
    return name
