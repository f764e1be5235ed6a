"""The size of a base model from its config.json."""

import json

import pytest

from nesso_tune.planning.shapes import KNOWN_CONFIGS, find_shape, known_config, shape_of
from nesso_tune.recipes.sections import ModelSection

ID = "mii-llm/zagreus-0.4B-ita"
LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def write(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return ModelSection(base=str(folder))


def test_parameters_are_those_of_published_models():
    assert shape_of(LLAMA_3_8B).parameters == 8_030_261_248
    assert shape_of(known_config(ID)).parameters == pytest.approx(438e6, rel=0.01)


@pytest.mark.parametrize("base", KNOWN_CONFIGS)
def test_known_bases_have_the_parameters_that_transformers_makes(base):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**known_config(base))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_of(known_config(base)).parameters == model.num_parameters()


def test_a_mixture_of_experts_is_left_open(tmp_path):
    assert find_shape(write(tmp_path / "base", LLAMA_3_8B | {"num_local_experts": 8})) is None


def test_tied_embeddings_count_once():
    tied = shape_of(LLAMA_3_8B | {"tie_word_embeddings": True}).parameters
    assert shape_of(LLAMA_3_8B).parameters - tied == 128256 * 4096


def test_missing_sizes_have_their_usual_values():
    config = {
        key: size for key, size in LLAMA_3_8B.items() if key not in ("num_key_value_heads", "max_position_embeddings")
    }
    shape = shape_of(config)
    assert (shape.kv_heads, shape.head_dim, shape.context) == (32, 128, 0)
    assert shape_of(config | {"head_dim": 64}).head_dim == 64


def test_it_is_found_in_a_folder_the_table_and_the_hub_cache(tmp_path, monkeypatch):
    assert find_shape(write(tmp_path / "base", LLAMA_3_8B)) == shape_of(LLAMA_3_8B)
    assert find_shape(ModelSection(base=ID)) == shape_of(known_config(ID))
    hub = tmp_path / "hub" / f"models--{ID.replace('/', '--')}"
    write(hub / "snapshots" / "abc", LLAMA_3_8B)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc\n")
    assert find_shape(ModelSection(base=ID)) == shape_of(LLAMA_3_8B)
    assert find_shape(ModelSection(base=ID, revision="abc")) == shape_of(LLAMA_3_8B)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_shape(ModelSection(base="~/base")) == shape_of(LLAMA_3_8B)


ODD = {
    "no JSON": "{", "a list": [], "no sizes": {"model_type": "x"}, "no heads": LLAMA_3_8B | {"num_attention_heads": 0},
    "null": LLAMA_3_8B | {"vocab_size": None}, "words": LLAMA_3_8B | {"hidden_size": "big"},
    "negative": LLAMA_3_8B | {"num_hidden_layers": -1},
}  # fmt: skip


@pytest.mark.parametrize("config", ODD.values(), ids=ODD)
def test_an_odd_config_leaves_the_size_open(tmp_path, config):
    assert find_shape(write(tmp_path / "base", config)) is None


def test_an_unknown_base_leaves_the_size_open(tmp_path):
    assert find_shape(ModelSection(base="someone/something")) is None
    (tmp_path / "empty").mkdir()
    assert find_shape(ModelSection(base=str(tmp_path / "empty"))) is None
