"""The arguments of `evaluate`: those that are wrong are named before a model is loaded."""

import pytest

from nesso_tune import EvaluationOptions, RecipeError, evaluate

MISTAKES = {
    "no model": (lambda: evaluate([], "chat"), r"models: must be names of models, not \[\]"),
    "no name": (lambda: evaluate(3, "chat"), "models: must be names of models, not 3"),
    "empty name": (lambda: evaluate("", "chat"), '"": is an empty name'),
    "no suite": (lambda: evaluate("m", ""), '"": is an empty name'),
    "keys": (lambda: evaluate("m", "chat", {"limit": 3}), "options: must be of class EvaluationOptions, not dict"),
    "no prompts": (lambda: EvaluationOptions(limit=0), "limit: must be a whole number of at least 1, not 0"),
    "no batch": (lambda: EvaluationOptions(batch_size=0), "batch_size: must be a whole number of at least 1, not 0"),
}


@pytest.mark.parametrize(("build", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_name_the_argument(build, message):
    with pytest.raises(RecipeError, match=message):
        build()
