"""The recipe as JSON Schema, so that editors complete keys, show what they do, and mark mistakes while one types."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from nesso_tune.recipes.builtin import template_names
from nesso_tune.recipes.rules import EXCLUSIVE, INERT
from nesso_tune.recipes.schema import RECIPES, DPORecipe, SFTRecipe
from nesso_tune.recipes.yaml_source import KeyPath

SCHEMA_FILE = "nesso-tune.schema.json"  # its name beside the shipped recipes, and beside those that `init` writes
SHIPPED_FILE_KEYS = (  # keys that take the name of a shipped file: ((section, key), its folder under data_templates/, other names)
    (("ChatSection", "template"), "chat", ()),
    (("Source", "format"), "formats", ("auto",)),
)
NOT_NULL = {"not": {"type": "null"}}


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe; `method` decides between the two kinds.

    It accepts every recipe that loads. Besides names and types it knows the contradictions that a schema can express;
    `nesso-tune check` knows all.
    """
    recipes = {name: TypeAdapter(kind).json_schema() for name, kind in RECIPES.items()}
    definitions: dict[str, Any] = {}
    for name, schema in recipes.items():
        definitions |= schema.pop("$defs")
        definitions[RECIPES[name].__name__] = schema
        schema["required"] = ["method", *schema["required"]]
    for section, rule in _rules():
        definitions[_definition(definitions, section)].setdefault("allOf", []).append(rule)
    for (name, key), folder, more in SHIPPED_FILE_KEYS:
        definitions[name]["properties"][key]["examples"] = [*more, *template_names(folder)]
    for definition in definitions.values():  # pydantic leaves out what a section's own docstring says alike
        for entry in definition.get("properties", {}).values():
            if "$ref" in entry:
                entry.setdefault("description", definitions[entry["$ref"].rsplit("/", 1)[-1]]["description"])
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


def _tidy(schema: Any) -> Any:
    """Without the titles that pydantic makes of names, and with descriptions in one line."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _tidy(value) for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
    if isinstance(kept.get("description"), str):
        kept["description"] = " ".join(kept["description"].split())
    return kept


def _rules() -> list[tuple[KeyPath, dict[str, Any]]]:
    """Contradictions and knobs without effect, by section."""
    rules: list[tuple[KeyPath, dict[str, Any]]] = []
    for pair in EXCLUSIVE:
        both = {"required": list(pair.keys), "properties": dict.fromkeys(pair.keys, NOT_NULL)}
        rules.append((pair.section, {"not": both, "$comment": f"{' and '.join(pair.keys)}: {pair.remedy}"}))
    for knob in INERT:
        when = {"properties": {knob.key: {"const": knob.value}}, "required": [knob.key]}
        then = {"properties": {key: {"type": "null"} for key in knob.inert}}
        rules.append((knob.section, {"if": when, "then": then}))
    return rules


def _definition(definitions: dict[str, Any], section: KeyPath) -> str:
    """The name of the definition that a section refers to."""
    name = SFTRecipe.__name__
    for key in section:
        name = definitions[name]["properties"][key]["$ref"].rsplit("/", 1)[-1]
    return name
