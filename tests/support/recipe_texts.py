"""Recipe texts for the tests, and helpers to validate them."""

import pytest

from nesso_tune.errors import RecipeError
from nesso_tune.recipes.load import validate
from nesso_tune.recipes.yaml_source import parse_document

SFT = """\
method: sft
output_dir: out
model: {base: b}
data:
  sources:
    - path: rows.jsonl
"""
DPO = SFT.replace("method: sft", "method: dpo")


def read(text):
    """Parses and validates a recipe text."""
    return validate(parse_document(text, "r.yaml"))


def problems(text):
    """All problems of a recipe text."""
    with pytest.raises(RecipeError) as caught:
        read(text)
    return caught.value.problems


def problem(text):
    """The only problem of a recipe text, as printed."""
    found = problems(text)
    assert len(found) == 1, [str(one) for one in found]
    return str(found[0])


def with_value(recipe, path, value):
    """The parsed recipe text with one key replaced; in lists, in the first entry."""
    document = parse_document(recipe, "r.yaml")
    node = document.value
    for part in path[:-1]:
        node = node.setdefault(part, {})
        node = node[0] if isinstance(node, list) else node
    node[path[-1]] = value
    return document
