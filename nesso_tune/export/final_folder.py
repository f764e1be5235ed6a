"""`final/`: the trained model as a plain Hugging Face folder, written atomically."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from nesso_tune.chat.tokenizer import ChatTokenizer
from nesso_tune.distributed.process_group import is_main_process
from nesso_tune.export.card import CARD, model_card
from nesso_tune.export.stages import Stage, write_stages
from nesso_tune.files import apply_umask, fsync, make_staging_folder, remove, replace_folder
from nesso_tune.model.adapters import adapt
from nesso_tune.model.loading import load_model
from nesso_tune.recipes.sections import ModelSection
from nesso_tune.runs.checkpoint import safetensors_errors
from nesso_tune.training.state_dict import State, get_weights, set_weights


def gather_final_model(
    trained: nn.Module, model: PreTrainedModel, section: ModelSection, chat: ChatTokenizer, seed: int
) -> tuple[PreTrainedModel, State]:
    """The model to export and its full state dict with canonical names; the state dict is empty except on rank 0.

    An adapter is merged into a freshly loaded base, which makes the result independent of sharding. A quantized base is
    first dequantized, so the merged model is the one that was trained and evaluated.

    Args:
        trained: the trained model, wrapped and possibly sharded. Collective: all ranks must call.
        model: the same model without its wrapper.
        section, chat, seed: as given to `load_model`.
    """
    state = get_weights(trained)
    if section.adapter is None or not is_main_process():
        return model, state
    fresh, adapted = adapted_base(section, chat, seed)
    set_weights(fresh, state)
    merged: PreTrainedModel = adapted.merge_and_unload()  # type: ignore[operator]
    return merged, get_weights(merged.requires_grad_(True))  # frozen weights would be left out


def adapted_base(section: ModelSection, chat: ChatTokenizer, seed: int) -> tuple[PreTrainedModel, PeftModel]:
    """The base with an untrained adapter to merge, by itself and in peft's wrapper; trained weights are set on it."""
    fresh = load_model(section, chat, seed)
    return fresh, adapt(fresh, section, chat.new_ids, seed, merging=True)


def final_bytes(model: PreTrainedModel, dtype: str) -> int:
    """Size in bytes of the weights in `final/`; tied weights count once."""
    return sum(weight.numel() for weight in model.parameters()) * getattr(torch, dtype).itemsize


def save_final(
    state: State,
    model: PreTrainedModel,
    chat: ChatTokenizer,
    stages: Sequence[Stage],
    folder: Path,
    dtype: str,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Writes weights, configuration, tokenizer, chat template, generation config, provenance and model card.

    The folder loads with transformers alone. It is staged beside `folder` and renamed once it is complete.

    Args:
        state: state dict from `gather_final_model`.
        model: the model, for its configuration.
        chat: the chat tokenizer.
        stages: training stages of the model, the last one of this run.
        folder: path of `final/`; an existing folder is replaced.
        dtype: dtype of the saved weights.
        check: called with the complete folder before it gets its name; if it raises, the folder is removed.
    """
    staging = make_staging_folder(folder)
    save_model(state, model, staging, dtype)
    chat.save(staging)
    write_stages(staging, stages)
    (staging / CARD).write_text(model_card(staging), encoding="utf-8")
    try:
        if check is not None:
            check(staging)
    except BaseException:
        remove(staging)
        raise
    finish_folder(staging, folder)


def save_model(state: Mapping[str, Tensor], model: PreTrainedModel, folder: Path, dtype: str) -> None:
    """Writes weights, config.json and generation_config.json into an existing folder; arguments as of `save_final`."""
    precision = getattr(torch, dtype)
    model.config.use_cache = True  # training disables the cache
    with safetensors_errors(folder):
        model.save_pretrained(folder, state_dict={name: tensor.to(precision) for name, tensor in state.items()})
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text()) | {"dtype": dtype}  # transformers writes that of the model in memory
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    compatible = with_transformers4_keys(config)
    if _reads_same_rope(model, config, compatible):
        config_file.write_text(json.dumps(compatible, indent=2) + "\n")


def finish_folder(staging: Path, folder: Path) -> None:
    """Flushes the files of a staging folder to disk, and renames it to `folder`."""
    for file in staging.iterdir():
        apply_umask(file)
        fsync(file)
    replace_folder(staging, folder)


# Keys of transformers 4 for the base of the rotary embedding: in layers with full attention, and in sliding ones.
ROPE_BASE_KEYS = ("rope_theta", "rope_local_base_freq")
ROPE_BASE_KEYS_BY_TYPE = {
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "gpt_neox": ("rotary_emb_base", None),
    "gpt_neox_japanese": ("rotary_emb_base", None),
}
# Model types for which transformers 4 rejects other fields in `rope_scaling` than `type` and these.
ROPE_SCALING_FIELDS = {"olmo": ("factor",), "olmo2": ("factor",), "phi3": ("short_factor", "long_factor")}
PARTIAL_ROTARY_KEYS = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}  # for partial_rotary_factor


def with_transformers4_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a config.json of transformers 5 the keys that transformers 4 reads for the same settings.

    Version 5 keeps the whole rotary embedding in `rope_parameters`, flat or by layer type. Version 4 ignores that key
    and would use its defaults: it reads the base and the scaling from keys of their own.
    """
    out = dict(config)
    if "dtype" in config:
        out["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return out
    model_type = config.get("model_type", "")
    by_layer_type = any(isinstance(value, Mapping) for value in rope.values())
    full, sliding = rope.get("full_attention") if by_layer_type else rope, rope.get("sliding_attention")
    for key, parameters in zip(ROPE_BASE_KEYS_BY_TYPE.get(model_type, ROPE_BASE_KEYS), (full, sliding), strict=True):
        if key is not None and isinstance(parameters, Mapping) and "rope_theta" in parameters:
            out[key] = parameters["rope_theta"]
    if not isinstance(full, Mapping):
        return out
    if "partial_rotary_factor" in full:
        out[PARTIAL_ROTARY_KEYS.get(model_type, "partial_rotary_factor")] = full["partial_rotary_factor"]
    scaling = {key: v for key, v in full.items() if key not in ("type", "rope_theta", "partial_rotary_factor")}
    rope_type = scaling.get("rope_type", "default")
    if rope_type == "longrope" and "original_max_position_embeddings" in scaling:
        out["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    if model_type in ROPE_SCALING_FIELDS:
        fields = ROPE_SCALING_FIELDS[model_type]
        scaling = {"type": rope_type, **{key: scaling[key] for key in fields if key in scaling}}
    out["rope_scaling"] = None if rope_type == "default" else scaling
    return out


def _reads_same_rope(model: PreTrainedModel, config: Mapping[str, Any], compatible: Mapping[str, Any]) -> bool:
    """Whether the installed transformers reads the same rotary embedding from both versions of a configuration."""
    try:
        configs = [type(model.config).from_dict(copy.deepcopy(dict(values))) for values in (config, compatible)]
    except Exception:  # e.g. a layer type without parameters
        return False
    first, second = (_without_type(getattr(one, "rope_parameters", None)) for one in configs)
    return bool(first == second)


def _without_type(rope: Any) -> Any:
    """Rotary parameters without `type`, the older name of `rope_type`, which transformers 5 also stores."""
    if not isinstance(rope, Mapping):
        return rope
    return {key: _without_type(value) for key, value in rope.items() if key != "type"}
