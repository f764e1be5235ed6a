"""Recipe texts that the tests of this folder build on, and short ways to read them."""

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
    """The recipe that a text holds."""
    return validate(parse_document(text, "r.yaml"))


def problems(text):
    """All that is wrong with a text."""
    with pytest.raises(RecipeError) as caught:
        read(text)
    return caught.value.problems


def problem(text):
    """The one thing that is wrong with a text, as it is printed."""
    found = problems(text)
    assert len(found) == 1, [str(one) for one in found]
    return str(found[0])


def with_value(recipe, path, value):
    """The document of a recipe's text with one key set; in a list, that of its first entry."""
    document = parse_document(recipe, "r.yaml")
    node = document.value
    for part in path[:-1]:
        node = node.setdefault(part, {})
        node = node[0] if isinstance(node, list) else node
    node[path[-1]] = value
    return document
