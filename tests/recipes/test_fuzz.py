"""Whatever stands in a recipe, the answer is a recipe or a list of problems that each say where, what and how."""

from io import StringIO

from hypothesis import example, given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from nesso_tune.errors import RecipeError
from nesso_tune.recipes.error_messages import EQUIVALENT_KEYS, key_paths
from nesso_tune.recipes.load import parse_overrides, validate
from nesso_tune.recipes.schema import DPORecipe, SFTRecipe
from nesso_tune.recipes.yaml_source import parse_document
from tests.support.examples import examples
from tests.support.recipe_texts import DPO, SFT, with_value

OURS = sorted({path[-1] for model in (SFTRecipe, DPORecipe) for path in key_paths(model)})
KEYS = st.one_of(
    st.sampled_from(OURS), st.sampled_from(sorted(EQUIVALENT_KEYS)), st.text(max_size=8), st.integers(), st.booleans()
)
WORDS = st.sampled_from(
    ["sft", "dpo", "auto", "cosine", "constant", "assistant", "messages", "lora", "sigmoid", "1e-3"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=25
)
PIECES = [
    *SFT.splitlines(keepends=True), "dpo: {beta: 0.1}\n", "  ", "\t", "- ", ": ", "{", "}", "[", "]", ",", "&a ", "*a",
    "<<", "!!int ",
    "!x ", "'", '"', "#", "|", ">", "?", "---\n", "...\n", "%YAML 1.1\n", "%YAML 1.2\n", "%TAG ! a\n", "null",
    "0x", "1e", "0", "9", "_", ".", "~", "\n", "\ufeff", "\x85", "\x00", "train:\n", "  schedule: {type: constant}\n",
]  # fmt: skip


def survives(read, *arguments):
    """Reads something; only a RecipeError may come of it, and that says where, what and how."""
    try:
        read(*arguments)
        found = ()
    except RecipeError as error:
        found = error.problems or [None]
    for problem in found:
        assert problem.where.startswith(("r.yaml", "overrides", "--set"))
        assert problem.what.strip()
        assert problem.remedy.strip()


def read_text(text):
    validate(parse_document(text, "r.yaml"))


@examples(150)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25).map("".join))
@example("%YAML 9.9\n---\n" + SFT)
@example("a: !!int ''")
@example("{{a: b}: c}")
@example(SFT + "seed: 0x" + "f" * 5000)
def test_any_text(text):
    survives(read_text, text)


@examples(100)
@given(
    st.sampled_from([SFT, DPO]),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join),
    st.integers(0, 90),
)
def test_any_damage_to_a_recipe(recipe, damage, at):
    survives(read_text, recipe[:at] + damage + recipe[at:])


@examples(100)
@given(st.dictionaries(st.sampled_from(sorted({path[0] for path in key_paths(DPORecipe)})), VALUES, max_size=8))
def test_any_data_under_our_keys(data):
    out = StringIO()
    YAML(typ="safe", pure=True).dump(data, out)
    survives(read_text, out.getvalue())


@examples(100)
@given(st.sampled_from(sorted(key_paths(DPORecipe))), VALUES, st.sampled_from([SFT, DPO]))
def test_any_value_for_each_key(path, value, recipe):
    document = with_value(recipe, path, value)
    survives(validate, document)


@given(st.text(max_size=12), st.text(max_size=12))
def test_any_setting(key, value):
    survives(parse_overrides, [f"{key}={value}"])
