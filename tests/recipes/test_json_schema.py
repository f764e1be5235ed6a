"""The schema that editors read says what the reader says."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from nesso_tune.errors import RecipeError
from nesso_tune.recipes import load_recipe
from nesso_tune.recipes.builtin import find_recipe, shipped_folder, shipped_recipes
from nesso_tune.recipes.error_messages import key_paths
from nesso_tune.recipes.json_schema import SCHEMA_FILE, recipe_schema
from nesso_tune.recipes.load import validate
from nesso_tune.recipes.schema import DPORecipe, SFTRecipe, dump
from nesso_tune.recipes.yaml_source import parse_document, read_document
from tests.support.examples import examples
from tests.support.recipe_texts import DPO, SFT, with_value

from .test_fuzz import VALUES
from .test_load import MISTAKES

SCHEMA = recipe_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
# What YAML readers of editors see by themselves, and what no schema can say: in JSON, 1.0 is a whole number.
ONLY_READ = ("tab", "twice", "twice in a section", "a share of 1.0")


def test_it_is_a_schema():
    Draft202012Validator.check_schema(SCHEMA)


def test_the_shipped_file_is_current():
    written = json.loads((shipped_folder("recipes") / SCHEMA_FILE).read_text(encoding="utf-8"))
    assert written == SCHEMA, "run: nesso-tune schema > recipes/nesso-tune.schema.json"


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_name_it(name):
    file = find_recipe(name)
    assert list(VALIDATOR.iter_errors(read_document(file).value)) == []
    assert list(VALIDATOR.iter_errors(dump(load_recipe(name)))) == [], "resolved recipes too"
    (said,) = re.findall(r"^# yaml-language-server: \$schema=(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert (file.parent / said).resolve() == (shipped_folder("recipes") / SCHEMA_FILE).resolve()


@pytest.mark.parametrize("name", [name for name in MISTAKES if name not in ONLY_READ])
def test_it_rejects_what_the_reader_rejects(name):
    value = parse_document(MISTAKES[name][0], "r.yaml").value
    assert not VALIDATOR.is_valid(value)


CONTRADICTIONS = [
    SFT + "train: {max_steps: 1, num_epochs: 1}",
    SFT + "train: {global_batch_size: 8, gradient_accumulation_steps: 1}",
    DPO + "train: {schedule: {warmup_steps: 1, warmup_ratio: 0.1}}",
    SFT + "train: {schedule: {type: constant, min_ratio: 0.1}}",
    SFT.replace("method: sft\n", ""),
    SFT.replace("method: sft", "method: kto"),
]


@pytest.mark.parametrize("text", CONTRADICTIONS)
def test_it_rejects_contradictions(text):
    document = parse_document(text, "r.yaml")
    with pytest.raises(RecipeError):
        validate(document)
    assert not VALIDATOR.is_valid(document.value)


def test_null_contradicts_nothing():
    for text in (SFT + "train: {max_steps: 1, num_epochs: null}", SFT + "train: {schedule: {type: constant}}"):
        value = parse_document(text, "r.yaml").value
        assert VALIDATOR.is_valid(value)


@examples(80)
@given(st.sampled_from(sorted(key_paths(DPORecipe) | key_paths(SFTRecipe))), VALUES, st.sampled_from([SFT, DPO]))
def test_it_accepts_whatever_the_reader_accepts(path, value, recipe):
    document = with_value(recipe, path, value)
    try:
        validate(document)
    except RecipeError:
        return
    assert VALIDATOR.is_valid(json.loads(json.dumps(document.value)))


def test_every_key_is_described_and_has_its_default_and_choices():
    sections = {name: body for name, body in SCHEMA["$defs"].items() if "properties" in body}
    assert len(sections) > 10
    for name, body in sections.items():
        assert body["additionalProperties"] is False
        for key, entry in body["properties"].items():
            assert entry.get("description", "").strip(), f"{name}.{key} has no description"
            assert "\n" not in entry["description"]
            assert "default" in entry or key in body.get("required", []) or key == "method", f"{name}.{key}"
    train = SCHEMA["$defs"]["Schedule"]["properties"]
    assert train["type"]["enum"] == ["cosine", "linear", "constant"]
    assert SCHEMA["$defs"]["ChatSection"]["properties"]["template"]["examples"] == [
        "chatml", "gemma3", "llama3", "mistral", "qwen3", "qwen3_instruct", "qwen3_nothink", "smollm3",
        "smollm3_nothink",
    ]  # fmt: skip
    assert "preference" in SCHEMA["$defs"]["Source"]["properties"]["format"]["examples"]
