"""`model.overrides`: checked against the base's config, trained with, exported, and part of a run's identity."""

import json
import shutil

import pytest
from transformers import AutoConfig, GPT2Config

from nesso_tune import RecipeError, load_recipe
from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.model.loading import base_hash, load_model
from nesso_tune.planning.planner import make_plan
from nesso_tune.recipes.sections import ChatSection, ModelSection
from nesso_tune.run import train
from nesso_tune.runs.layout import FINAL
from tests.support.runs import recipe

LONGER = {"rope_theta": 1000000, "max_position_embeddings": 32768}


def load(folder, overrides, random_init=False):
    section = ModelSection(base=str(folder), random_init=random_init, overrides=overrides)
    return load_model(section, chat_tokenizer(section, ChatSection()), seed=1)


def test_the_model_computes_with_the_new_values(whole_base):
    model, base = load(whole_base, LONGER), load(whole_base, {})
    assert model.config.rope_parameters["rope_theta"] == 1e6
    assert base.config.rope_parameters["rope_theta"] != 1e6
    assert not model.model.rotary_emb.inv_freq.equal(base.model.rotary_emb.inv_freq)
    assert (model.config.max_position_embeddings, model.generation_config.max_length) == (32768, 32768)
    assert all(a.equal(b) for a, b in zip(model.parameters(), base.parameters(), strict=True))


def test_the_tokenizer_states_the_new_context(whole_base):
    chat = chat_tokenizer(ModelSection(base=str(whole_base), overrides=LONGER), ChatSection())
    assert json.loads(chat.files["tokenizer_config.json"])["model_max_length"] == 32768


def test_the_plan_knows_the_new_context(whole_base, talks, tmp_path):
    some = recipe(
        "sft", tmp_path / "run", [talks], model={"base": str(whole_base), "random_init": False, "overrides": LONGER}
    )
    assert make_plan(some).shape.context == 32768


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"rope_teta": 1e6},
            r"model\.overrides\.rope_teta: the config of .* has no such key; did you mean `rope_theta`\?",
        ),
        ({"max_position_embeddings": "lots"}, r'"lots" is not of the type of the base\'s own value'),
        ({"rms_norm_eps": True}, r"rms_norm_eps: true is not of the type"),
        ({"max_position_embeddings": 0.5}, r"0\.5 is not of the type"),
    ],
)
def test_what_does_not_fit_the_configuration_is_an_error(whole_base, overrides, expected):
    with pytest.raises(RecipeError, match=expected):
        load(whole_base, overrides)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", 64, "changes the shape of weights"),
        ("vocab_size", 10, "changes the shape of weights"),
        ("torch_dtype", "float16", "is set by another key; use model.dtype"),
        ("eos_token_id", 2, "is set by another key; use chat.template"),
    ],
)
def test_shapes_and_keys_of_other_sections_are_refused_at_once(recipe_file, key, value, expected):
    with pytest.raises(RecipeError, match=rf"`model\.overrides\.{key}` {expected}"):
        load_recipe(recipe_file(), {f"model.overrides.{key}": value})


def test_a_key_that_changes_a_shape_in_this_architecture_only(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "gpt2")
    vocabulary = AutoConfig.from_pretrained(base).vocab_size
    GPT2Config(vocab_size=vocabulary, n_embd=8, n_layer=1, n_head=2, n_positions=32).save_pretrained(folder)
    with pytest.raises(RecipeError, match=r"n_positions: transformer\.wpe\.weight would have another shape"):
        load(folder, {"n_positions": 64}, random_init=True)


def test_a_run_exports_the_values_and_refuses_others_on_resume(whole_base, talks, tmp_path):
    def make(theta, **more):
        model = {"base": str(whole_base), "random_init": False, "overrides": {**LONGER, "rope_theta": theta}}
        return recipe("sft", tmp_path / "run", [talks], model=model, evaluation=None, train={"max_steps": 1, **more})

    train(make(1000000))
    config = json.loads((tmp_path / "run" / FINAL / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 1e6
    assert config["max_position_embeddings"] == 32768
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["recipe"]["model"]["overrides"] == LONGER
    with pytest.raises(RecipeError, match=r"model\.overrides\.rope_theta: 1000000, the recipe now has 500000"):
        train(make(500000))


def test_the_hash_of_the_base_covers_them(whole_base):
    hashes = {base_hash(ModelSection(base=str(whole_base), overrides=each)) for each in ({}, LONGER, {"rope_theta": 5})}
    assert len(hashes) == 3
