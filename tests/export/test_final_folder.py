"""`final/` and its model card."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nesso_tune.export.final_folder import _reads_same_rope, with_transformers4_keys
from nesso_tune.run import train
from tests.support.runs import recipe


def test_private_sources_are_not_named_in_final(tmp_path, talks, write_rows, chats):
    secret = write_rows(chats, "segretissimo.jsonl")
    some = recipe("sft", tmp_path / "run", [talks])
    sources = (*some.data.sources, some.data.sources[0].model_copy(update={"path": secret, "private": True}))
    some = some.model_copy(update={"data": some.data.model_copy(update={"sources": sources})})
    final = train(some).model_dir
    assert "talks.jsonl" in (final / "README.md").read_text(encoding="utf-8")
    for file in final.iterdir():
        assert b"segretissimo" not in file.read_bytes(), file.name


@pytest.mark.parametrize("system", ["Sei Nesso.", {"it": "Sei Nesso.", "en": "You are Nesso."}])
def test_default_system_is_in_the_shipped_template(tmp_path, talks, system):
    from transformers import AutoTokenizer

    final = train(recipe("sft", tmp_path / "run", [talks], chat={"default_system": system})).model_dir
    tokenizer = AutoTokenizer.from_pretrained(final)
    turn = [{"role": "user", "content": "Ciao"}]
    assert "Sei Nesso." in tokenizer.apply_chat_template(turn, tokenize=False)
    own = [{"role": "system", "content": "Altro."}, *turn]
    assert "Nesso" not in tokenizer.apply_chat_template(own, tokenize=False)
    if isinstance(system, dict):
        assert "You are Nesso." in tokenizer.apply_chat_template(turn, tokenize=False, language="en")


def test_final_is_replaced_as_a_whole(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks])
    final = train(some).model_dir
    (final / "stale.bin").write_bytes(b"old")
    train(some, overwrite=True)
    assert not (final / "stale.bin").exists()
    assert not list((tmp_path / "run").glob(".*.partial"))


# Configurations whose rotary embedding has other keys in transformers 4.
ROPES = {
    "theta": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "llama3": {"model_type": "llama", "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128}},
    "linear": {"model_type": "mistral", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "yarn": {"model_type": "qwen2", "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 512}},
    "dynamic": {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 2e4, "factor": 2.0}},
    "longrope": {"model_type": "phi3", "original_max_position_embeddings": 512, "pad_token_id": 0, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 512, "partial_rotary_factor": 1.0}},
    "old fields": {"model_type": "olmo2", "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
    "qwen3": {"model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "partial": {"model_type": "stablelm", "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}},
    "other names": {"model_type": "gpt_neox", "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}},
    "by layer": {"model_type": "gemma3_text", "sliding_window": 32, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4}}},
}  # fmt: skip
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "intermediate_size": 96, "vocab_size": 90, "max_position_embeddings": 1024}  # fmt: skip


@pytest.mark.parametrize("shape", ROPES)
def test_both_versions_of_the_config_give_the_same_model(shape):
    """The keys of transformers 4 alone, which version 5 still reads, give the trained model; so do both together."""
    trained = AutoConfig.for_model(**SIZES, **copy.deepcopy(ROPES[shape]))
    written = json.loads(trained.to_json_string(use_diff=False))
    both = with_transformers4_keys(written)
    assert _reads_same_rope(SimpleNamespace(config=trained), written, both)
    older = {key: value for key, value in both.items() if key != "rope_parameters"}
    assert older["rope_scaling"] is None or older["rope_scaling"].get("type", older["rope_scaling"].get("rope_type"))
    for config in (both, older):
        again = AutoConfig.for_model(**copy.deepcopy(config))
        ids = torch.arange(3, 43)[None]
        logits = []
        for wanted in (trained, again):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(wanted, attn_implementation="eager").eval()
            logits.append(model(input_ids=ids).logits)
        assert torch.equal(*logits)
    plain = copy.deepcopy(older)
    for name in ("rope_theta", "rotary_emb_base", "rope_local_base_freq"):
        plain.pop(name, None)
    without = AutoConfig.for_model(**plain).rope_parameters
    assert without != trained.rope_parameters or shape in ("linear", "longrope"), "the old keys are read"
