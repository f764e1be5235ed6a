"""`--set` and `overrides`: the same rules as in the file."""

import pytest

from nesso_tune.errors import RecipeError
from nesso_tune.recipes.load import SetOptions, parse_overrides
from tests.support.recipe_texts import DPO, SFT


def fault(override, overrides, text=SFT):
    with pytest.raises(RecipeError) as caught:
        override(overrides, text)
    return str(caught.value)


def test_values_by_key_and_by_position(override):
    text = SFT + "    - path: more.jsonl\n      weight: 2.0\ntrain: {max_steps: 3, micro_batch_size: 2}\n"
    recipe = override({"train.max_steps": None, "data.sources.1.weight": 0.5, "train.schedule.type": "linear"}, text)
    assert recipe.train.max_steps is None
    assert recipe.train.micro_batch_size == 2
    assert recipe.data.sources[1].weight == 0.5
    assert recipe.data.sources[1].path == "more.jsonl"
    assert recipe.train.schedule.type == "linear"


def test_sections_are_made_on_the_way_and_whole_sections_set(override):
    recipe = override({"model.adapter.r": 4, "evaluation": None, "data.sources": [{"path": "a"}, {"path": "b"}]})
    assert recipe.model.adapter.r == 4
    assert recipe.evaluation is None
    assert [source.path for source in recipe.data.sources] == ["a", "b"]


def test_an_override_mends_a_file(override):
    broken = SFT.replace("model: {base: b}\n", "") + "train: {learning_rate: fast, max_steps: [1]}\n"
    assert override({"model.base": "b", "train": {"max_steps": 2}}, broken).train.max_steps == 2


def test_later_overrides_reach_into_earlier_ones_and_leave_them_alone(override):
    given = {"data.sources": [{"path": "a"}], "data.sources.0.path": "z"}
    assert override(given).data.sources[0].path == "z"
    assert given["data.sources"] == [{"path": "a"}]


BAD = {
    "misspelt": ({"train.learning_rte": 1e-3}, "unknown key `train.learning_rte`; did you mean `train.learning_rate`?"),
    "wrong type": ({"train.max_steps": "many"}, "`train.max_steps` must be a whole number, not 'many'"),
    "inside a set section": ({"train": {"max_steps": [3]}}, "`train.max_steps` must be a whole number, not [3]"),
    "no such item": ({"data.sources.1.path": "x"}, "there is no item `1` in this list; use 0 to 0"),
    "negative item": ({"data.sources.-1.path": "x"}, "there is no item `-1`"),
    "odd digit": ({"data.sources.².path": "x"}, "there is no item `²`"),
    "empty list": ({"data.validation_sources": [], "data.validation_sources.0": 1}, "set the whole list"),
    "keys of a value": ({"seed.x": 1}, "`seed` must be a whole number, not {'x': 1}"),
    "keys of a text": ({"data.sources.0.path.x": 1}, "`data.sources.0.path` must be text"),
    "inert": ({"train.schedule.type": "constant", "train.schedule.min_ratio": 0.1}, "no effect under type: constant"),
    "inert in a tuple": ({"data.sources": ({"path": "p", "min_score": 1.0},)}, "needs score_field"),
    "nowhere": ({"": 1}, "unknown key ``"),
    "between": ({"a..b": 1}, "unknown key `a`"),
    "not a number": ({"train.learning_rate": float("nan")}, "must be a finite number or auto, not nan"),
    "endless": ({"data.sources.0.min_score": float("inf"), "data.sources.0.score_field": "s"}, "a finite number"),
    "null": ({"output_dir": None}, "`output_dir` is not set"),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "words"), BAD.values(), ids=BAD)
def test_a_wrong_override_is_told_as_such(override, overrides, words):
    said = fault(override, overrides)
    assert said.startswith("overrides: ")
    assert words in said
    assert fault(override, SetOptions(overrides)) == said.replace("overrides: ", "--set: ")


def test_one_of_two_exclusive_keys_displaces_the_other_of_the_file(override):
    text = SFT + "train: {num_epochs: 2, gradient_accumulation_steps: 4, schedule: {warmup_steps: 3}}\n"
    train = override({"train.max_steps": 5}, text).train
    assert (train.max_steps, train.num_epochs, train.gradient_accumulation_steps) == (5, None, 4)
    train = override({"train.global_batch_size": 8, "train.schedule.warmup_ratio": 0.1}, text).train
    assert (train.num_epochs, train.gradient_accumulation_steps, train.schedule.warmup_steps) == (2, None, None)
    assert override({"train.max_steps": None}, text).train.num_epochs == 2
    said = fault(override, {"train.max_steps": 5, "train.num_epochs": 1}, SFT)
    assert "`train.num_epochs` contradicts train.max_steps; set one and null the other" in said


def test_the_method_can_be_set(override):
    assert override({"method": "dpo"}).method == "dpo"
    assert "only for method: dpo" in fault(override, {"method": "sft"}, DPO + "dpo: {beta: 0.1}\n")


def test_settings_are_read_as_yaml():
    settings = ["a.b=1e-3", "c=no", "d=", "e=[x, y]", "f={k: 1}", "g=a=b", "h=<|im_end|>"]
    assert parse_overrides(settings) == {
        "a.b": 0.001, "c": "no", "d": None, "e": ["x", "y"], "f": {"k": 1}, "g": "a=b", "h": "<|im_end|>",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed", "write --set key.path=value"),
        ("=3", "write --set"),
        ("x=[", "--set x:1: "),
        ("x={a: 1, a: 2}", "given twice"),
    ],
)
def test_settings_that_cannot_be_read(setting, words):
    with pytest.raises(RecipeError) as caught:
        parse_overrides([setting])
    assert words in str(caught.value)
