"""What is wrong with a recipe is said with file, line and remedy, all of it at once."""

import time

import pytest

from nesso_tune.errors import RecipeError
from nesso_tune.recipes import DPORecipe, SFTRecipe, load_recipe, yaml_source
from nesso_tune.recipes.builtin import recipe_summaries, shipped_recipes
from nesso_tune.recipes.error_messages import EQUIVALENT_KEYS, MAX_PROBLEMS, key_descriptions, key_paths, section_at
from nesso_tune.recipes.load import parse_overrides
from nesso_tune.recipes.schema import RECIPES
from tests.support.recipe_texts import DPO, SFT, problem, problems, read

IN_TRAIN = SFT + "train:\n  "  # what follows stands in line 8
IN_SOURCE = SFT + "      "  # and here in line 7


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load(name):
    assert load_recipe(name).method == ("dpo" if name.endswith("dpo") else "sft")


def test_each_shipped_recipe_says_its_command_hardware_and_cost():
    entries = recipe_summaries()
    assert {entry.name for entry in entries} >= {"sft", "dpo", "open-zagreus", "lora", "agentic", "sft-8b"}
    for entry in entries:
        assert entry.title, entry
        assert entry.hardware, entry
        assert entry.cost, entry
        named = [word for word in entry.command.split() if word.endswith(".yaml") or "/" in word]
        stems = [word.removeprefix("recipes/").removesuffix(".yaml") for word in named]
        assert entry.name in stems, "the command runs this recipe"
        assert set(stems) <= {other.name for other in entries}


def test_the_reference_recipe_says_what_the_contract_says():
    recipe = load_recipe("sft")
    schedule = recipe.train.schedule
    assert schedule.type == "cosine"
    assert (schedule.warmup_ratio, schedule.constant_ratio, schedule.min_ratio) == (0.03, 0.8, 0.3)
    assert recipe.data.sources[0].messages_field == "conversation"
    assert (recipe.num_epochs, recipe.seed, recipe.data.validation_size) == (3, 42, 10000)


# name: (text, line, words that the message must hold)
MISTAKES = {
    "misspelt key": (IN_TRAIN + "learning_rte: 1e-3", 8, ["unknown key", "did you mean `train.learning_rate`?"]),
    "a list for a number": (IN_TRAIN + "num_epochs: [3]", 8, ["`train.num_epochs`", "a number", "[3]"]),
    "epochs of elsewhere": (SFT + "epochs: [3]", 7, ["unknown key `epochs`", "called `train.num_epochs` here"]),
    "twice": (SFT + "seed: 1\nseed: 2", 8, ["`seed` is given twice", "line 7", "keep one"]),
    "twice in a section": (IN_TRAIN + "max_steps: 1\n  max_steps: 1", 9, ["`train.max_steps` is given twice"]),
    "inert": (IN_TRAIN + "schedule: {type: constant,\n    constant_ratio: 0.5}", 9, ["has no effect", "remove it"]),
    "tab": (SFT + "train:\n\tmax_steps: 3", 8, ["a tab", "indent with spaces"]),
    "path unset": (SFT.replace(" rows.jsonl", ""), 6, ["`data.sources.0.path` is not set", "hub id of a dataset"]),
    "path missing": (SFT.replace("path: rows.jsonl", "split: x"), 6, ["`data.sources.0.path` is missing", "add it"]),
    "blank": (SFT.replace("rows.jsonl", "'  '"), 6, ["`data.sources.0.path` must not be empty", "give it a value"]),
    "unset section": (SFT + "train:", 7, ["`train` is not set"]),
    "misspelt choice": (SFT + "chat: {new_tokens: resise}", 7, ["one of auto", "did you mean `resize`?"]),
    "misspelt loss": (DPO + "dpo: {loss: {sigmod: 1.0}}", 7, ["`dpo.loss.sigmod`", "did you mean `sigmoid`?"]),
    "misplaced": (SFT + "learning_rate: 1e-3", 7, ["unknown key `learning_rate`", "belongs to `train.learning_rate`"]),
    "misplaced, far": (IN_TRAIN + "keep: 3", 8, ["`train.keep`", "belongs to `checkpoint.keep`"]),
    "misplaced, nearer": (IN_TRAIN + "type: linear", 8, ["belongs to `train.schedule.type`"]),
    "misplaced, several": (SFT + "every_steps: 5", 7, ["`checkpoint.every_steps` or"]),
    "misplaced in a source": (SFT + "split: test", 7, ["belongs to `data.sources.split`"]),
    "misplaced and misspelt": (SFT + "warmup_ration: 0.1", 7, ["did you mean `train.schedule.warmup_ratio`?"]),
    "other method's section": (SFT + "dpo: {beta: 0.1}", 7, ["unknown key `dpo`", "only for method: dpo"]),
    "other method's key": (DPO.replace("data:", "data:\n  packing: true"), 5, ["unknown key", "only for method: sft"]),
    "not offered": (IN_TRAIN + "neftune_noise_alpha: 5", 8, ["remove it", "NEFTune is not supported"]),
    "unknown": (SFT + "größe: 1", 7, ["unknown key `größe`", "the keys here are output_dir, seed, model"]),
    "number as key": (SFT + "7: 1", 7, ["unknown key `7`"]),
    "true for a count": (IN_TRAIN + "micro_batch_size: true", 8, ["a whole number", "not true"]),
    "fraction of a count": (IN_TRAIN + "max_steps: 1.5", 8, ["a whole number", "1.5"]),
    "negative count": (IN_TRAIN + "max_steps: -1", 8, ["at least 1", "not -1"]),
    "huge count": (IN_TRAIN + "max_steps: 9999999999", 8, ["at most 1000000000"]),
    "huge seed": (SFT + "seed: 4294967296", 7, ["below 4294967296"]),
    "endless epochs": (IN_TRAIN + "num_epochs: 1e250", 8, ["at most 100000"]),
    "no rate": (IN_TRAIN + "learning_rate: 0", 8, ["above 0 or auto"]),
    "sign lost": (IN_TRAIN + "learning_rate: 1.0e3", 8, ["at most 1 or auto"]),
    "quoted number": (IN_TRAIN + "learning_rate: '1e-3'", 8, ["a number or auto", "not '1e-3'"]),
    "number as text": (SFT.replace("out\n", "2024\n"), 2, ["`output_dir` must be text, not 2024"]),
    "no sources": (
        SFT.replace("\n    - path: rows.jsonl", " []"), 5, ["must not be empty", "sources of training rows"],
    ),
    "sources as a section": (SFT.replace("- path", "path"), 5, ["`data.sources` must be a list"]),
    "source as text": (SFT.replace("- path: ", "- "), 6, ["`data.sources.0` must be a section"]),
    "sources of nothing": (SFT.replace("path: rows.jsonl", "null"), 6, ["`data.sources.0` is not set"]),
    "a role for roles": (SFT.replace("data:", "data:\n  roles_to_train: assistant"), 5, ["must be a list"]),
    "held out: true": (SFT.replace("data:", "data:\n  validation_size: true"), 5, ["must be a number, not true"]),
    "held out: below 0": (SFT.replace("data:", "data:\n  validation_size: -1"), 5, ["at least 0"]),
    "held out: above 1": (SFT.replace("data:", "data:\n  validation_size: 1.5"), 5, ["whole number or", "below 1"]),
    "a share of 1.0": (SFT + "checkpoint: {every_steps: 1.0}", 7, ["whole number or a number below 1"]),
    "no interval": (SFT + "checkpoint: {every_steps: 0}", 7, ["at least 1, not 0"]),
    "no default system": (SFT + "chat: {default_system: {}}", 7, ["`chat.default_system` must not be empty"]),
    "nothing selected": (IN_SOURCE + "where: {a: []}", 7, ["`data.sources.0.where.a` must not be empty"]),
    "in a choice of types": (SFT + "chat: {default_system: {it: 3}}", 7, ["`chat.default_system.it` must be text"]),
    "a wrong weight": (DPO + "dpo: {loss: {sigmoid: -1}}", 7, ["`dpo.loss.sigmoid`", "above 0"]),
    "a wrong role": (IN_SOURCE + "roles: {utente: usr}", 7, ["`data.sources.0.roles.utente`", "did you mean `user`?"]),
    "misspelt in a source": (IN_SOURCE + "langage: it", 7, ["did you mean `data.sources.0.language`?"]),
    "misspelt in a validation source": (
        SFT + "  validation_sources: [{path: v, langage: it}]", 7, ["mean `data.validation_sources.0.language`?"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "line", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_with_line_and_remedy(text, line, words):
    said = problem(text)
    assert said.startswith(f"r.yaml:{line}: "), said
    assert [word for word in words if word not in said] == [], said


def test_all_mistakes_of_a_file_come_at_once_in_its_order():
    found = problems("""\
method: sft
output_dir: out
model: {bas: b}
data:
  sequence_len: long
  sources:
    - {path: a, min_score: 1}
    - {split: train}
seed: 1
seed: 2
train:
  learning_rte: 1e-3
  schedule: {type: constant, min_ratio: 0.1}
""")
    assert [(one.where.removeprefix("r.yaml:"), one.what.split("`")[1]) for one in found] == [
        ("3", "model.base"), ("3", "model.bas"), ("5", "data.sequence_len"), ("7", "data.sources.0.min_score"),
        ("8", "data.sources.1.path"), ("10", "seed"), ("12", "train.learning_rte"), ("13", "train.schedule.min_ratio"),
    ]  # fmt: skip
    assert all(one.remedy for one in found)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("base_model", "model.base"), ("model_name_or_path", "model.base"), ("sample_packing", "data.packing"),
        ("datasets", "data.sources"), ("dataset", "data.sources"), ("cutoff_len", "data.sequence_len"),
        ("max_length", "data.sequence_len"), ("val_set_size", "data.validation_size"),
        ("num_train_epochs", "train.num_epochs"), ("per_device_train_batch_size", "train.micro_batch_size"),
        ("lr_scheduler_type", "train.schedule.type"), ("cosine_constant_lr_ratio", "train.schedule.constant_ratio"),
        ("cosine_min_lr_ratio", "train.schedule.min_ratio"), ("save_total_limit", "checkpoint.keep"),
        ("lora_r", "model.adapter.r"), ("lang", "data.sources.language"), ("rl", "method"),
    ],
)  # fmt: skip
def test_names_of_other_tools_get_their_name_here(theirs, ours):
    assert problem(f"{SFT}{theirs}: x\n").endswith(f"unknown key `{theirs}`; it is called `{ours}` here")


def test_a_name_of_another_tool_in_a_source():
    assert "called `data.sources.format` here" in problem(SFT + "      type: sharegpt")
    assert "called `data.sources.messages_field` here" in problem(SFT + "      field_messages: conversations")


@pytest.mark.parametrize("theirs", EQUIVALENT_KEYS)
def test_every_translated_name_leads_to_a_key(theirs):
    base = DPO if EQUIVALENT_KEYS[theirs].startswith("dpo.") else SFT
    said = problem(f"{base}{theirs}: x\n")
    assert "called `" in said or "belongs to" in said, said  # `type` is a key here too, of other sections


def test_a_dpo_name_in_an_sft_recipe():
    assert "`dpo.beta` is only for method: dpo" in problem(SFT + "rl_beta: 0.1\n")


METHODS = {
    "missing": ("", "the key `method` is missing", "write method: sft or method: dpo"),
    "unset": ("method:\n", "the key `method` is missing", "write method: sft"),
    "misspelt": ("method: spo\n", "must be sft or dpo, not 'spo'", "did you mean `dpo`?"),
    "another": ("method: kto\n", "must be sft or dpo, not 'kto'", "write method: sft or method: dpo"),
    "a list": ("method: [dpo]\n", "must be sft or dpo", "did you mean `dpo`?"),
}


@pytest.mark.parametrize(("line", "what", "remedy"), METHODS.values(), ids=METHODS)
def test_method_missing_or_wrong(line, what, remedy):
    said = problem(SFT.replace("method: sft\n", line))
    assert said.startswith("r.yaml:1: ")
    assert what in said
    assert remedy in said


def test_without_a_method_the_rest_is_still_checked():
    found = problems(DPO.replace("method: dpo\n", "") + "dpo: {betta: 0.1}\n")
    assert [one.what for one in found] == ["the key `method` is missing", "unknown key `dpo.betta`"]


def test_a_file_or_a_name_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"nope.yaml: no such file; check the path"):
        load_recipe(tmp_path / "nope.yaml")
    with pytest.raises(
        RecipeError, match="no such file and no shipped recipe of this name; did you mean `quickstart/sft`"
    ):
        load_recipe("quickstart/sfx")
    with pytest.raises(RecipeError, match=r"is a folder; name a YAML file"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("model", RECIPES.values())
def test_every_key_is_described(model):
    for path in key_paths(model):
        description = key_descriptions(section_at(model, path[:-1])).get(path[-1], "")
        assert description.rstrip().endswith("."), ".".join(path)


def test_a_missing_section_is_told_with_what_it_is_for():
    found = problems("method: sft\n")
    assert [str(one).partition("; ")[0] for one in found] == [
        "r.yaml:1: the key `output_dir` is missing", "r.yaml:1: the key `model` is missing",
        "r.yaml:1: the key `data` is missing",
    ]  # fmt: skip
    assert "run directory" in found[0].remedy


def test_types_of_the_two_methods():
    assert isinstance(read(SFT), SFTRecipe)
    assert isinstance(read(DPO), DPORecipe)
    assert (read(SFT).num_epochs, read(DPO).num_epochs) == (3, 2)
    assert (read(SFT).data.sequence_len, read(DPO).data.sequence_len) == (4096, 1024)


LARGE = 100_000
OVERSIZED = {
    "a key": f'{SFT}? "{"k" * LARGE}"\n: 1\n',
    "a value": f"{SFT}seed: {'v' * LARGE}\n",
    "a name": f"{SFT}chat: {{template: {'n' * LARGE}}}\n",
    "a method": SFT.replace("sft", "m" * LARGE),
    "unknown keys": SFT + "".join(f"key{i}: 1\n" for i in range(1500)),
    "keys twice": SFT + "seed: 1\n" * 1500,
    "keys under a list": SFT + "  validation_sources: [" + "{path: a, frmat: x}, " * 500 + "]\n",
}


@pytest.mark.parametrize("text", OVERSIZED.values(), ids=OVERSIZED)
def test_what_is_said_of_an_oversized_recipe_stays_short(text):
    """And is said at once: a comparison of long names, or of each with all others, takes minutes here."""
    began = time.process_time()
    found = problems(text)
    assert time.process_time() - began < 20, "of this process's own time, a second or two on any machine"
    assert len(found) <= MAX_PROBLEMS + 1
    assert all(len(str(one)) < 1000 for one in found)
    assert "..." in str(found[0]) or len(found) == 1 or found[-1].what.endswith("more problems")


def test_a_file_of_far_too_many_values_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(yaml_source, "MAX_NODES", 100)
    assert "is too large" in problem(SFT + "cluster: {modules: [" + "a, " * 300)


@pytest.mark.parametrize("key", ["k", "k.", "k[0]", "train."])
def test_an_oversized_setting(override, key):
    with pytest.raises(RecipeError) as caught:
        override(parse_overrides([f"{key * (LARGE // len(key))}=1"]))
    assert len(str(caught.value)) < 1000


def test_files_that_say_how_data_is_read_are_there(recipe_file, tmp_path):
    text = (
        SFT
        + f"""\
      format: {tmp_path}/own.py:read
      tools_file: {tmp_path}/tools.json
    - {{path: b, format: {tmp_path}/own.yml}}
chat: {{template: {tmp_path}/chat.yaml}}
"""
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(text))
    said = sorted(map(str, caught.value.problems))
    assert [one.split(".yaml:", 1)[1][:2].rstrip(":") for one in said] == ["10", "7", "8", "9"]
    assert all("names a file that does not exist" in one for one in said)
    for name in ("own.py", "tools.json", "own.yml", "chat.yaml"):
        (tmp_path / name).write_text("")
    assert load_recipe(recipe_file(text)).data.sources[0].tools_file
