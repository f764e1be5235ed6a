"""`final/`: the trained model as a plain Hugging Face folder, complete or absent."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nesso_tune.chat.tokenizer import ChatTokenizer
from nesso_tune.distributed.process_group import is_first
from nesso_tune.files import apply_umask, fsync, make_staging_folder, replace_folder
from nesso_tune.model.adapters import adapt
from nesso_tune.model.loading import load_model
from nesso_tune.recipes.sections import ModelSection
from nesso_tune.runs.checkpoint import safetensors_errors
from nesso_tune.training.state_dict import State, set_weights, weights_of

# What transformers 4 calls the base of the rotary embedding: of the layers that attend to all, and of the local ones.
THETA = ("rope_theta", "rope_local_base_freq")
THETA_OF = {
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "gpt_neox": ("rotary_emb_base", None),
    "gpt_neox_japanese": ("rotary_emb_base", None),
}
# Where version 4 takes no other fields in `rope_scaling` than these and `type`.
ONLY_FIELDS = {"olmo": ("factor",), "olmo2": ("factor",), "phi3": ("short_factor", "long_factor")}
PARTIAL_OF = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}  # for partial_rotary_factor


def whole_model(
    trained: nn.Module, model: PreTrainedModel, section: ModelSection, chat: ChatTokenizer, seed: int
) -> tuple[PreTrainedModel, State]:
    """The model to publish and its canonical weights, whole on the first process (elsewhere none).

    An adapter is merged into a fresh copy of its base, so that it matters nowhere how the trained one is spread; of a
    quantised base into what it was quantised to, since that is the model that was trained and evaluated.

    Args:
        trained: the model as it was trained, wrapped and maybe sharded. Every process takes part.
        model: the same without its wrapper.
        section, chat, seed: what it was made of.
    """
    state = weights_of(trained)
    if section.adapter is None or not is_first():
        return model, state
    fresh = load_model(section, chat, seed)
    adapted = adapt(fresh, section, chat.new_ids, seed, merging=True)
    set_weights(fresh, state)
    merged: PreTrainedModel = adapted.merge_and_unload()  # type: ignore[operator]
    return merged, weights_of(merged.requires_grad_(True))  # of which frozen ones would be left out


def final_bytes(model: PreTrainedModel, dtype: str) -> int:
    """Size of the weights in `final/`, tied ones once."""
    return sum(weight.numel() for weight in model.parameters()) * getattr(torch, dtype).itemsize


def save_final(state: State, model: PreTrainedModel, chat: ChatTokenizer, card: str, folder: Path, dtype: str) -> None:
    """Writes weights, tokenizer, template, generation config and card; runs with plain transformers.

    Args:
        state: weights from `whole_model`.
        model: the model, for its configuration.
        chat: the chat-ready tokenizer.
        card: README.md.
        folder: where `final/` shall stand.
        dtype: precision of the saved weights.
    """
    precision = getattr(torch, dtype)
    staging = make_staging_folder(folder)
    model.config.dtype, model.config.use_cache = precision, True  # training had turned the cache off
    with safetensors_errors(folder):
        model.save_pretrained(staging, state_dict={name: tensor.to(precision) for name, tensor in state.items()})
    config = staging / "config.json"
    plain = json.loads(config.read_text())
    if _still_read(model, plain, both := read_by_older_versions(plain)):
        config.write_text(json.dumps(both, indent=2) + "\n")
    chat.save(staging)
    (staging / "README.md").write_text(card, encoding="utf-8")
    for file in staging.iterdir():
        apply_umask(file)
        fsync(file)
    replace_folder(staging, folder)


def _still_read(model: PreTrainedModel, plain: Mapping[str, Any], both: Mapping[str, Any]) -> bool:
    """Whether this version of transformers reads the same rotary embedding where older versions' names are added."""
    try:
        found = [type(model.config).from_dict(copy.deepcopy(dict(some))) for some in (plain, both)]
    except Exception:  # a layer's kind lacks something, say
        return False
    first, second = (_without_type(getattr(one, "rope_parameters", None)) for one in found)
    return bool(first == second)


def _without_type(rope: Any) -> Any:
    """Rotary parameters without the older name of `rope_type`, which is read along with it."""
    if not isinstance(rope, Mapping):
        return rope
    return {key: _without_type(value) for key, value in rope.items() if key != "type"}


def read_by_older_versions(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 with what transformers 4 reads under other names, so that both see one model.

    Version 5 keeps all of the rotary embedding in `rope_parameters`, flat or by layer type. Version 4 ignores that key
    and computes with its defaults: it reads the base and the scaling beside it.
    """
    out = dict(config)
    if "dtype" in config:
        out["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return out
    kind = config.get("model_type", "")
    by_layer = any(isinstance(value, Mapping) for value in rope.values())
    everywhere = rope.get("full_attention") if by_layer else rope
    for name, of_layers in zip(THETA_OF.get(kind, THETA), (everywhere, rope.get("sliding_attention")), strict=True):
        if name is not None and isinstance(of_layers, Mapping) and "rope_theta" in of_layers:
            out[name] = of_layers["rope_theta"]
    if not isinstance(everywhere, Mapping):
        return out
    if "partial_rotary_factor" in everywhere:
        out[PARTIAL_OF.get(kind, "partial_rotary_factor")] = everywhere["partial_rotary_factor"]
    scaling = {key: v for key, v in everywhere.items() if key not in ("type", "rope_theta", "partial_rotary_factor")}
    rope_type = scaling.get("rope_type", "default")
    if rope_type == "longrope" and "original_max_position_embeddings" in scaling:
        out["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    if kind in ONLY_FIELDS:
        scaling = {"type": rope_type, **{key: scaling[key] for key in ONLY_FIELDS[kind] if key in scaling}}
    out["rope_scaling"] = None if rope_type == "default" else scaling
    return out
