"""What YAML does behind one's back, and files that are no YAML."""

import pytest

from nesso_tune.errors import RecipeError
from nesso_tune.recipes import load_recipe
from nesso_tune.recipes.yaml_source import parse_document
from tests.support.recipe_texts import SFT, problem, problems, read

VALUES = {
    "1e-3": 0.001, "1.0e-3": 0.001, "no": "no", "yes": "yes", "off": "off", "true": True, "null": None, "~": None,
    "017": 17, "0o17": 15, "12:30:45": "12:30:45", "2024-01-01": "2024-01-01", "'1e-3'": "1e-3", ".nan": ".nan",
    ".inf": ".inf", "-.inf": "-.inf", "1e999": "1e999", "9" * 5000: "9" * 5000, "0x" + "f" * 300: "0x" + "f" * 300,
    "!!int abc": "abc", "!!bool maybe": "maybe", "!!str 3": "3",
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), VALUES.items(), ids=[text[:20] for text in VALUES])
def test_scalars(text, value):
    found = parse_document(f"a: {text}\n", "r.yaml").value["a"]
    assert found == value
    assert type(found) is type(value)


def test_numbers_and_words_reach_the_recipe_as_meant():
    recipe = read(SFT + "      language: no\ntrain: {learning_rate: 1e-3}\n")
    assert recipe.data.sources[0].language == "no"
    assert recipe.train.learning_rate == 1e-3


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_numbers_that_are_none(value):
    assert "must be a number or auto" in problem(f"{SFT}train: {{learning_rate: {value}}}\n")
    assert "`data.sources.0.min_score` must be a number" in str(problems(f"{SFT}      min_score: {value}\n")[0])


# name: (text after the six lines of SFT, line, words)
BROKEN = {
    "second colon": ("seed: 3: 4", ":7", "a second `: ` in one line"),
    "no colon": ("seed 3\nchat: {}\n", ":7", "a key without a colon"),
    "second colon in braces": ("chat: {template: a: b}", ":7", "a second `: ` in one line"),
    "no comma": ("chat: {template: 'a' new_tokens: auto}", ":7", "a comma is missing"),
    "indentation": ("train:\n  max_steps: 3\n seed: 3", ":9", "not YAML"),
    "open brace": ("train: {max_steps: 3\nseed: 1\n", ":7", "not closed"),
    "open bracket at the end": ("seed: 1\nlogging: {report_to: [", ":8", "not closed"),
    "open quote": ("seed: 1\nchat: {template: 'a\n", ":8", "not closed"),
    "merge key": ("train: &a {max_steps: 3}\nlogging:\n  <<: *a", ":9", "merge keys"),
    "null as key": ("~: 1", ":7", "this key cannot be used"),
    "list as key": ("? [a]\n: 1", ":7", "this key cannot be used"),
    "section as key": ("{a: b}: 1", ":7", "this key cannot be used"),
    "two documents": ("---\n" + SFT, ":7", "a second document"),
    "unknown alias": ("seed: *x", ":7", "not YAML"),
    "Python object": ("seed: !!python/object/apply:os.getcwd []", ":7", "the tag"),
    "own tag": ("seed: !env SEED", ":7", "the tag `!env`"),
    "binary": ("seed: !!binary aGk=", ":7", "the tag"),
    "control character": ("seed: \x01", "", "not YAML"),
    "deep": ("seed: " + "[" * 900 + "]" * 900, "", "nested too deeply"),
    "alias of itself": ("seed: &a [*a]", "", "nested too deeply"),
}


@pytest.mark.parametrize(("text", "line", "words"), BROKEN.values(), ids=BROKEN)
def test_what_is_not_plain_yaml_is_told_with_its_line(text, line, words):
    said = problem(SFT + text)
    assert said.startswith(f"r.yaml{line}: "), said
    assert words in said


def test_a_bomb_of_aliases_is_refused():
    levels = [
        f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    assert "too large" in problem("a: &a [x, x, x]\n" + "\n".join(levels))


def test_plain_aliases_are_read():
    assert read(SFT.replace("base: b", "base: &x b") + "      subset: *x\n").data.sources[0].subset == "b"


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "nothing"), ("# only a comment\n", "nothing"), ("- a\n", "a list"), ("hello", "text"), ("42", "a single")],
)
def test_a_root_that_is_no_section(text, found):
    said = problem(text)
    assert said.startswith("r.yaml:1: a recipe must be a section of keys, not " + found)
    assert said.endswith("start with method: sft")


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbf" + SFT.encode(), SFT.replace("\n", "\r\n").encode()], ids=["BOM", "CRLF"]
)
def test_files_of_other_systems_are_read(recipe_file, content):
    assert load_recipe(recipe_file(content)).output_dir == "out"


@pytest.mark.parametrize(
    ("content", "line"), [("method: sft\nmodèl: x".encode("latin-1"), 2), (SFT.encode("utf-16"), 1)]
)
def test_a_file_in_another_encoding(recipe_file, content, line):
    path = recipe_file(content)
    with pytest.raises(RecipeError, match="is not UTF-8 text; save the file as UTF-8") as caught:
        load_recipe(path)
    assert caught.value.problems[0].where == f"{path}:{line}"


def test_a_data_file_given_as_a_recipe(recipe_file):
    with pytest.raises(RecipeError, match="bytes of data are not a recipe; make one: nesso-tune init --data"):
        load_recipe(recipe_file(b"a: 1\n" * 500_000))
