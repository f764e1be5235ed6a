"""Tiny random bases of every causal-LM architecture of transformers, made from their configuration classes.

No architecture is known here by name: sizes are set by what configurations call them, and the first set of sizes with
which the model scores a row of tokens is taken.
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
MOST = 20_000_000  # parameters of what is still tiny
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
# What is tried in turn: more layers for those that have several kinds, heads that are not grouped, ids, wider states.
KINDS = (("conv", "full_attention"), ("linear_attention", "full_attention"), ("mamba", "attention"),
         ("mamba", "hybrid"), ("recurrent", "attention"), ("sliding_attention", "full_attention"))  # fmt: skip
LADDER: tuple[dict[str, Any], ...] = (
    *({"kinds": kinds} for kinds in KINDS),
    {}, {"layers": 4}, {"ids": "own"}, {"heads": 4}, {"heads": 4, "layers": 4}, {"ids": "own", "layers": 4},
    {"layers": 6}, {"layers": 8}, {"heads": 4, "layers": 8}, {"free": True}, {"free": True, "layers": 4},
    {"states": 8}, {"ids": "own", "free": True}, {"ids": "own", "free": True, "layers": 4},
    {"free": True, "layers": None},
)  # fmt: skip


class CannotBeBuilt(Exception):
    """No set of sizes gives a model that scores a row of tokens."""


def architectures() -> Iterator[type]:
    """Configuration classes of all causal language models, each once."""
    return iter(dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING.keys()))


def tiny(kind: type) -> PreTrainedModel:
    """A model of a configuration class that scores a row of tokens.

    Raises:
        CannotBeBuilt: with the first reason of each kind.
    """
    reasons: dict[str, None] = {}
    for step in LADDER:
        try:
            return _scores(_made(kind, step))
        except Exception as error:  # whatever a configuration or a model says of sizes that do not fit
            text = (str(error).strip().splitlines() or [""])[0]
            reasons[f"{type(error).__name__}: {text}"[:160]] = None
    raise CannotBeBuilt("; ".join(list(reasons)[:2]))


def _made(kind: type, step: dict[str, Any]) -> PreTrainedModel:
    config = kind(**_options(kind, step))
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"{size:,} parameters at the sizes that are known")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _options(kind: type, step: dict[str, Any]) -> dict[str, Any]:
    """Sizes for all that a configuration has of them, in parts of it too."""
    default: Any = kind()
    known = default.to_dict()
    if "kinds" in step and not {"layer_types", "layers_block_type"} & {*known} and not getattr(kind, "sub_configs", 0):
        raise ValueError("has no kinds of layers")
    options = {name: value for name, value in SIZES.items() if name in known}
    layers = step.get("layers", 2)
    for name, value in list(options.items()):
        if "layers" in name and value == 2:
            options[name] = layers
        if step.get("free") and ("head_dim" in name or "key_value" in name or known[name] is None):
            del options[name]
        if name == "num_key_value_heads" and "heads" in step:
            options[name] = step["heads"]
        if name == "num_heads" and "states" in step:
            options[name] = step["states"]
    options = {name: value for name, value in options.items() if value is not None}
    for name, value in known.items():  # of layers that are not there
        if isinstance(value, list) and value and all(isinstance(i, int) and i >= 2 for i in value) and "layer" in name:
            options[name] = [1]
    if "kinds" in step:
        options |= {name: list(step["kinds"]) for name in ("layer_types", "layers_block_type") if name in known}
    options |= {name: 0.0 for name, value in known.items() if "drop" in name and isinstance(value, float)}
    for place, name in enumerate(IDS):
        own = known.get(name)
        fits = isinstance(own, int) and 0 <= own < VOCABULARY
        options[name] = None if step.get("ids") != "own" else own if fits else place
    for name in getattr(kind, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if hasattr(part, "to_dict"):
            options[name] = _options(type(part), step)
    return options


def _scores(model: PreTrainedModel) -> PreTrainedModel:
    """The model, if it scores a row of tokens, with weights that hide nothing: logits spread, biases are not 0."""
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
