"""`nesso-tune schema`: prints the recipe's JSON Schema."""

from __future__ import annotations

import json

from nesso_tune.recipes.json_schema import recipe_schema
from nesso_tune.terminal import print_text


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    print_text(json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n")
