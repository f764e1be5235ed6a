"""Tiny random models of every causal-LM architecture of transformers, built from their configuration classes.

No architecture is listed by name: sizes are set by the names of configuration fields, and variants are tried until the
model runs a forward pass.
"""

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).parent.parent.parent
TOKENIZER = ROOT / "recipes" / "quickstart" / "base"
VOCABULARY = 1823
MAX_PARAMETERS = 20_000_000
SIZES = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "d_ff", "dim_ff", "dff", "ffn_hidden_size",
                     "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers",
                     "num_encoder_layers", "num_decoder_layers", "max_window_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim",
                     "linear_value_head_dim", "mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size",
                     "state_size", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "rotary_dim"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_attention"), 64),
    "linear_num_value_heads": 4, "mamba_d_ssm": 128, "mamba_expand": 2, "initializer_range": 0.1, "is_decoder": True,
    "index_head_dim": 16, "index_n_heads": 4, "num_kv_shared_layers": 0,
}  # fmt: skip
IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
# Variants in order: layer types, more layers, ungrouped heads, own special-token ids, wider states.
KINDS = (("conv", "full_attention"), ("linear_attention", "full_attention"), ("mamba", "attention"),
         ("mamba", "hybrid"), ("recurrent", "attention"), ("sliding_attention", "full_attention"))  # fmt: skip
VARIANTS: tuple[dict[str, Any], ...] = (
    *({"kinds": kinds} for kinds in KINDS),
    {}, {"layers": 4}, {"ids": "own"}, {"heads": 4}, {"heads": 4, "layers": 4}, {"ids": "own", "layers": 4},
    {"layers": 6}, {"layers": 8}, {"heads": 4, "layers": 8}, {"free": True}, {"free": True, "layers": 4},
    {"states": 8}, {"ids": "own", "free": True}, {"ids": "own", "free": True, "layers": 4},
    {"free": True, "layers": None},
)  # fmt: skip


class CannotBeBuilt(Exception):
    """No variant gives a model that runs a forward pass."""


def architectures() -> Iterator[type]:
    """Configuration classes of all causal language models, without repetition."""
    return iter(dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING.keys()))


def tiny(kind: type) -> PreTrainedModel:
    """A tiny model of a configuration class that runs a forward pass.

    Raises:
        CannotBeBuilt: with the first two distinct errors.
    """
    reasons: dict[str, None] = {}
    for variant in VARIANTS:
        try:
            return _checked(_build(kind, variant))
        except Exception as error:  # any error of a configuration or model with these sizes
            text = (str(error).strip().splitlines() or [""])[0]
            reasons[f"{type(error).__name__}: {text}"[:160]] = None
    raise CannotBeBuilt("; ".join(list(reasons)[:2]))


def _build(kind: type, variant: dict[str, Any]) -> PreTrainedModel:
    config = kind(**_options(kind, variant))
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size:,} parameters with the known size fields")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _options(kind: type, variant: dict[str, Any]) -> dict[str, Any]:
    """Values for all size fields of a configuration, including nested configurations."""
    default: Any = kind()
    known = default.to_dict()
    if (
        "kinds" in variant
        and not {"layer_types", "layers_block_type"} & {*known}
        and not getattr(kind, "sub_configs", 0)
    ):
        raise ValueError("has no layer types")
    options = {name: value for name, value in SIZES.items() if name in known}
    layers = variant.get("layers", 2)
    for name, value in list(options.items()):
        if "layers" in name and value == 2:
            options[name] = layers
        if variant.get("free") and ("head_dim" in name or "key_value" in name or known[name] is None):
            del options[name]
        if name == "num_key_value_heads" and "heads" in variant:
            options[name] = variant["heads"]
        if name == "num_heads" and "states" in variant:
            options[name] = variant["states"]
    options = {name: value for name, value in options.items() if value is not None}
    for name, value in known.items():  # indices of layers that do not exist
        if isinstance(value, list) and value and all(isinstance(i, int) and i >= 2 for i in value) and "layer" in name:
            options[name] = [1]
    if "kinds" in variant:
        options |= {name: list(variant["kinds"]) for name in ("layer_types", "layers_block_type") if name in known}
    options |= {name: 0.0 for name, value in known.items() if "drop" in name and isinstance(value, float)}
    for place, name in enumerate(IDS):
        own = known.get(name)
        fits = isinstance(own, int) and 0 <= own < VOCABULARY
        options[name] = None if variant.get("ids") != "own" else own if fits else place
    for name in getattr(kind, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if hasattr(part, "to_dict"):
            options[name] = _options(type(part), variant)
    return options


def _checked(model: PreTrainedModel) -> PreTrainedModel:
    """The model after a forward pass, with nonzero biases and a head scaled for a wide spread of logits."""
    model.eval()
    ids = torch.arange(3, 14)[None]
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for _ in range(4):
            logits = model(input_ids=ids, **cache).logits
            assert logits.shape == (1, 11, model.get_input_embeddings().weight.shape[0]), f"logits {logits.shape}"
            spread = float(logits.std())
            assert math.isfinite(spread), "logits are not finite"
            if spread < 2.2:
                model.get_output_embeddings().weight *= 2.5 / spread
    return model
