"""A tiny stand-in for a base model: the same architecture, two thin layers, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

HIDDEN, HEADS, HEAD_DIM, INNER, LAYERS = 64, 4, 16, 128, 2
FALLBACK = "llama"  # stands in for an architecture that transformers does not know by itself
LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "sliding_window_pattern")  # one entry a layer
FITTING = ("pad_token_id", "bos_token_id", "eos_token_id")  # ids that may lie beyond a small vocabulary
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "initializer_range", "tie_word_embeddings")  # fmt: skip
DROPPED = ("auto_map", "quantization_config", "torch_dtype", "dtype", "_name_or_path", "transformers_version",
           "rope_scaling", "architectures")  # fmt: skip


def shrunk(config: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """The configuration of a model like that of `config`, but tiny, with `vocabulary` rows.

    Heads keep whether they are grouped, embeddings whether they are tied; a rope that is scaled for long contexts is
    left plain, since its factors belong to the size of the heads.
    """
    heads, groups = config.get("num_attention_heads") or 1, config.get("num_key_value_heads")
    small = {key: value for key, value in config.items() if key not in DROPPED}
    small |= {
        "model_type": config.get("model_type", FALLBACK),
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS if groups in (None, heads) else HEADS // 2,
        "head_dim": HEAD_DIM,
        "initializer_range": HIDDEN**-0.5,
        "max_window_layers": LAYERS,
    }
    for key in FITTING:
        if isinstance(small.get(key), int) and small[key] >= vocabulary:
            small[key] = None
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and any(isinstance(value, (list, dict)) for value in rope.values()):
        small.pop("rope_parameters")
    for key in LISTS:
        if isinstance(small.get(key), list):
            small[key] = small[key][:LAYERS]
    return small


def build_standin(folder: Path, config: dict[str, Any], seed: int = 0) -> str:
    """Writes weights and config.json of a model of this (tiny) configuration into a folder.

    Returns:
        The architecture it has: that of `config`, or Llama where transformers cannot make that one.
    """
    transformers_logging.disable_progress_bar()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except Exception:  # an architecture of its own code, or one with more to it than sizes
        plain = {key: value for key, value in config.items() if key in SIZES} | {"model_type": FALLBACK}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain))
    model.save_pretrained(folder)
    return str(model.config.model_type)
