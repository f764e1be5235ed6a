"""Recipes built in Python obey the same rules, never change, and survive YAML."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nesso_tune.errors import RecipeError
from nesso_tune.recipes import DPORecipe, SFTRecipe, load_recipe
from nesso_tune.recipes.builtin import shipped_recipes
from nesso_tune.recipes.load import as_recipe
from nesso_tune.recipes.schema import Schedule, TrainSection
from nesso_tune.recipes.sections import DPOData, LoraSection, ModelSection, SFTData, Source
from tests.support.recipe_texts import read

MODEL = ModelSection(base="b")
ROWS = SFTData(sources=[Source(path="rows.jsonl")])
PAIRS = DPOData(sources=[Source(path="pairs.jsonl")])


def sft(**keys):
    return SFTRecipe(**{"output_dir": "out", "model": MODEL, "data": ROWS} | keys)


def test_sections_and_plain_dicts_mean_the_same():
    assert sft() == SFTRecipe(output_dir="out", model={"base": "b"}, data={"sources": [{"path": "rows.jsonl"}]})
    assert DPORecipe(output_dir="out", model=MODEL, data=PAIRS).method == "dpo"


BAD = {
    "unknown key": lambda: sft(epochs=3),
    "unknown key in a section": lambda: TrainSection(learning_rte=1e-3),
    "no coercion": lambda: TrainSection(max_steps="3"),
    "bool": lambda: TrainSection(micro_batch_size=True),
    "endless": lambda: TrainSection(num_epochs=float("inf")),
    "no number": lambda: Source(path="p", min_score=float("nan")),
    "no sources": lambda: SFTData(sources=[]),
    "blank": lambda: ModelSection(base=" "),
    "negative share": lambda: SFTData(sources=[Source(path="p")], validation_size=-1),
    "other data": lambda: sft(data=PAIRS),
    "other method": lambda: sft(method="dpo"),
    "unknown loss": lambda: DPORecipe(output_dir="out", model=MODEL, data=PAIRS, dpo={"loss": {"sigmod": 1.0}}),
}


@pytest.mark.parametrize("build", BAD.values(), ids=BAD)
def test_mistakes_are_refused(build):
    with pytest.raises(RecipeError):
        build()


MISTAKES = {
    "epochs": (lambda: sft(epochs=3), "SFTRecipe: unknown key `epochs`; it is called `train.num_epochs` here"),
    "value": (
        lambda: sft(train={"learning_rate": 5, "max_stepz": 1}),
        "SFTRecipe: `train.learning_rate` must be a number of at most 1 or auto, not 5; write a number of at most 1 "
        "or auto\nSFTRecipe: unknown key `train.max_stepz`; did you mean `train.max_steps`?",
    ),
    "section": (lambda: TrainSection(learning_rate="x", schedule={"typ": 1}), "TrainSection: `learning_rate` must be a "
                "number or auto, not 'x'; write a number or auto\nTrainSection: unknown key `schedule.typ`; did you "
                "mean `schedule.type`?"),
    "replaced": (
        lambda: sft().replace({"train.lr": 1e-3, "seed": "x"}),
        "recipe: `seed` must be a whole number, not 'x'; write a whole number\n"
        "recipe: unknown key `train.lr`; it is called `train.learning_rate` here",
    ),
    "other method": (lambda: sft().replace({"dpo.beta": 0.1}), "recipe: unknown key `dpo`; remove it: `dpo` is only "
                     "for method: dpo"),
    "no such item": (lambda: sft().replace({"data.sources.3.path": "x"}), "recipe: `data.sources.3.path`: there is no "
                     "item `3` in this list; use 0 to 0"),
    "no such file": (lambda: sft().replace({"chat.template": "none.yaml"}), "recipe: `chat.template` names a file that "
                     "does not exist: none.yaml; correct the path"),
    "no mapping": (lambda: sft().replace(None), "changes: must be a mapping, not NoneType; write values by dotted key"),
    "no mapping of overrides": (lambda: load_recipe("quickstart/sft", ["seed=1"]), "overrides: must be a mapping, not "
                                "list; write"),
    "no text as key": (lambda: sft().replace({1: 2}), "changes: the key 1 is not text; write values by dotted key"),
    "no text as key of a section": (lambda: sft(train={1: 2}), "SFTRecipe: the key `train.1` is not text; write"),
    "an array": (lambda: sft().replace({"seed": np.array([])}), "`seed` must be a whole number, not []"),
    "a table": (lambda: sft().replace({"seed": pd.DataFrame({"a": [1]})}), "`seed` must be a whole number, not "),
    "no number to suggest": (lambda: sft().replace({"train.learning_rate": "nan"}), "'nan'; write a number or auto"),
    "set": (lambda: setattr(sft(), "seed", 5), "SFTRecipe.seed: cannot be set, since sections and recipes are frozen; "
            "make another recipe: recipe.replace({...})"),
    "set in a section": (lambda: setattr(sft().train, "max_steps", 5), "TrainSection.max_steps: cannot be set"),
    "deleted": (lambda: delattr(sft(), "seed"), "SFTRecipe.seed: cannot be set"),
    "data of another method": (lambda: sft(data=PAIRS), "SFTRecipe: `data` must be a section of keys"),
    "mapping": (lambda: load_recipe({"method": "sft", "seed": 1}), "recipe: the key `output_dir` is missing; "),
    "long name": (lambda: load_recipe("a" * 5000), "no such file and no shipped recipe of this name"),
    "null in a name": (lambda: load_recipe("a\0.yaml"), "cannot be read (embedded null byte)"),
    "long name of a template": (lambda: sft(chat={"template": "a" * 5000 + ".yaml"}).replace({}), "does not exist"),
    "empty name": (lambda: load_recipe(" "), '"": is an empty name; write a path or a name'),
    "no recipe": (lambda: load_recipe(None), "recipe: must be a recipe, a name, a path, a mapping of keys or YAML "
                  "text, not NoneType; name"),
    "one line of text": (lambda: load_recipe("method: sft"), "recipe:1: the key `output_dir` is missing; "),
    "text": (lambda: load_recipe("method: sft\nseeed: 1\n"), "recipe:2: unknown key `seeed`; did you mean `seed`?"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_python_name_the_key_as_those_in_a_file_do(build, message):
    with pytest.raises(RecipeError) as caught:
        build()
    assert message in str(caught.value)


def test_paths_and_numbers_of_libraries_are_taken_in_python():
    made = sft(output_dir=Path("out"), seed=np.int64(3), train={"learning_rate": np.float64(5e-4)})
    assert made == sft(seed=3, train={"learning_rate": 5e-4})
    keys = {"train.max_steps": np.int64(3), "data.packing": np.bool_(False), "output_dir": Path("other")}
    for recipe in (sft().replace(keys), load_recipe(sft(), keys), load_recipe({"method": "sft", **dict(sft())}, keys)):
        assert (recipe.train.max_steps, recipe.data.packing, recipe.output_dir) == (3, False, "other")
    assert ModelSection(base=Path("b")) == MODEL
    assert TrainSection(max_steps=np.int64(3), schedule=Schedule(min_ratio=0.1)).max_steps == 3
    assert sft().replace({"train.learning_rate": torch.tensor(0.5)}).train.learning_rate == 0.5


def test_replace_returns_a_recipe_as_a_file_with_these_values():
    recipe = load_recipe("quickstart/sft")
    other = recipe.replace({"train.max_steps": 5, "data.sources.0.max_rows": 7, "data.packing": False})
    assert other == load_recipe(
        "quickstart/sft", {"train.max_steps": 5, "data.sources.0.max_rows": 7, "data.packing": False}
    )
    assert (other.train.num_epochs, recipe.train.max_steps) == (None, None), "max_steps replaces num_epochs"
    assert recipe.replace({"data.sources": [Source(path="other.jsonl")]}).data.sources[0].path == "other.jsonl"


@pytest.mark.parametrize("name", ["quickstart/sft", "quickstart/dpo"])
def test_a_recipe_is_loaded_by_name_keys_or_text(name):
    recipe = load_recipe(name)
    assert load_recipe(recipe) == as_recipe(name) == as_recipe(recipe) == recipe
    assert load_recipe(recipe, {"seed": 7}) == recipe.replace({"seed": 7})
    assert load_recipe(recipe.to_yaml()) == recipe
    assert load_recipe(json.dumps(recipe.model_dump(mode="json"))) == recipe, "in one line"
    assert load_recipe(recipe.model_dump(mode="json")) == recipe
    assert load_recipe({"method": recipe.method, **dict(recipe)}) == recipe, "sections as values"


def test_a_recipe_is_short_in_a_notebook():
    recipe = load_recipe("sft")
    assert (
        repr(recipe)
        == str(recipe)
        == ("SFTRecipe(base='mii-llm/zagreus-0.4B-ita', 2 sources, output_dir='outputs/nesso-0.4b-sft')")
    )
    html = recipe.replace({"card.name": "<b>"})._repr_html_()
    assert html.startswith("<pre>")
    assert "<b>" not in html


def test_inert_and_contradictory_knobs_are_refused():
    with pytest.raises(RecipeError, match=r"`train.schedule.min_ratio` has no effect under type: constant; remove it"):
        sft(train=TrainSection(schedule=Schedule(type="constant", min_ratio=0.1)))
    with pytest.raises(RecipeError, match=r"`train.num_epochs` contradicts train.max_steps"):
        sft(train={"max_steps": 5, "num_epochs": 1})


def test_a_recipe_never_changes():
    recipe = sft()
    with pytest.raises(RecipeError, match="frozen"):
        recipe.seed = 1
    with pytest.raises(RecipeError, match="frozen"):
        recipe.train.max_steps = 1
    with pytest.raises(TypeError):
        recipe.data.sources[0] = Source(path="q")


def test_recipes_share_no_defaults():
    one, two = (DPORecipe(output_dir="out", model=MODEL, data=PAIRS) for _ in range(2))
    one.dpo.loss["sft"] = 1.0
    assert two.dpo.loss == DPORecipe(output_dir="o", model=MODEL, data=PAIRS).dpo.loss == {"sigmoid": 1.0}


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_survive_yaml(name):
    recipe = load_recipe(name)
    assert read(recipe.to_yaml()) == recipe


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
rates = st.floats(min_value=1e-300, max_value=1.0, allow_subnormal=False)
# Words that YAML reads as something else when they are not quoted.
TRAPS = [
    "no", "null", "~", "1e-3", "017", "12:30:45", "2024-01-01", "true", "- a", "a: b", "#", "<<", "=", "&a", "*a", "!x",
    "'", "a\n\nb ", "\ufeff", "a\x85b", " x ", "1_0", ".5", "0b1", "0o7", "+1", "%",
]  # fmt: skip
words = texts | st.sampled_from(TRAPS)
paths = words.filter(lambda path: "\0" not in path and "$" not in path and not path.startswith("~"))
codes = st.sampled_from(["it", "en", "no", "on", "und"])  # of which YAML 1.1 reads two as truths


@given(paths, paths, words, rates, st.integers(0, 2**32 - 1), st.dictionaries(codes, words, max_size=3), st.booleans())
def test_any_recipe_survives_yaml(path, base, word, rate, seed, systems, adapted):
    recipe = sft(
        seed=seed,
        output_dir=path,
        model=ModelSection(base=base, adapter=LoraSection(target_modules=(path, word)) if adapted else None),
        chat={"default_system": systems or word},
        data={"sources": [{"path": path, "subset": word, "min_score": rate, "score_field": "s"}], "validation_size": 5},
        train={"learning_rate": rate, "schedule": {"min_ratio": rate, "warmup_steps": 0}},
    )
    assert read(recipe.to_yaml()) == recipe
