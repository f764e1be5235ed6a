"""Recipes built in Python obey the same rules, never change, and survive YAML."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nesso_tune.recipes import DPORecipe, SFTRecipe, load_recipe
from nesso_tune.recipes.builtin import shipped_recipes
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
    with pytest.raises(ValidationError):
        build()


def test_inert_and_contradictory_knobs_are_refused():
    with pytest.raises(
        ValidationError, match=r"train.schedule.min_ratio: has no effect under type: constant; remove it"
    ):
        sft(train=TrainSection(schedule=Schedule(type="constant", min_ratio=0.1)))
    with pytest.raises(ValidationError, match=r"train.num_epochs: contradicts train.max_steps"):
        sft(train={"max_steps": 5, "num_epochs": 1})


def test_a_recipe_never_changes():
    recipe = sft()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
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
