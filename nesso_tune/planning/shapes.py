"""Model shapes from config.json or, for common base models, from a table, without downloads."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nesso_tune.recipes.builtin import local_path
from nesso_tune.recipes.sections import ModelSection

CONFIG_KEYS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip
KNOWN_CONFIGS: dict[str, tuple[Any, ...]] = {
    "mii-llm/zagreus-0.4B-ita": ("llama", 128256, 960, 2560, 32, 15, 5, 64, True, 4096),
    "meta-llama/Llama-3.2-1B": ("llama", 128256, 2048, 8192, 16, 32, 8, 64, True, 131072),
    "meta-llama/Llama-3.2-3B": ("llama", 128256, 3072, 8192, 28, 24, 8, 128, True, 131072),
    "meta-llama/Llama-3.1-8B": ("llama", 128256, 4096, 14336, 32, 32, 8, 128, False, 131072),
    "Qwen/Qwen2.5-0.5B": ("qwen2", 151936, 896, 4864, 24, 14, 2, 64, True, 32768),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, True, 131072),
    "Qwen/Qwen2.5-3B": ("qwen2", 151936, 2048, 11008, 36, 16, 2, 128, True, 32768),
    "Qwen/Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False, 131072),
    "Qwen/Qwen3-0.6B-Base": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True, 32768),
    "Qwen/Qwen3-1.7B-Base": ("qwen3", 151936, 2048, 6144, 28, 16, 8, 128, True, 32768),
    "Qwen/Qwen3-4B-Base": ("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True, 32768),
    "Qwen/Qwen3-8B-Base": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False, 32768),
    "mistralai/Mistral-7B-v0.3": ("mistral", 32768, 4096, 14336, 32, 32, 8, 128, False, 32768),
    "HuggingFaceTB/SmolLM2-135M": ("llama", 49152, 576, 1536, 30, 9, 3, 64, True, 8192),
    "HuggingFaceTB/SmolLM2-360M": ("llama", 49152, 960, 2560, 32, 15, 5, 64, True, 8192),
    "HuggingFaceTB/SmolLM2-1.7B": ("llama", 49152, 2048, 8192, 24, 32, 32, 64, True, 8192),
    "sapienzanlp/Minerva-1B-base-v1.0": ("mistral", 32768, 2048, 7168, 16, 16, 4, 128, False, 16384),
    "sapienzanlp/Minerva-3B-base-v1.0": ("mistral", 32768, 2560, 8960, 32, 32, 8, 80, False, 16384),
    "sapienzanlp/Minerva-7B-base-v1.0": ("mistral", 51200, 4096, 14336, 32, 32, 8, 128, False, 4096),
}
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text", "cohere", "gpt2")  # if config.json does not set it


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder of the Llama family."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    context: int
    biases: int = 0  # parameters of a layer besides its matrices and two norms

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: attention, gated MLP and RMS norms."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size + self.biases

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding and the LM head, which can be tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Total number of parameters."""
        return self.embedding_parameters + self.layers * self.layer_parameters + self.hidden_size


def find_shape(model: ModelSection) -> ModelShape | None:
    """Shape of the base model from its folder, the local hub cache or the table; None if unknown."""
    config = find_config(model)
    try:
        return None if config is None else shape_of(config)
    except (ValueError, KeyError, TypeError):
        return None


def find_config(model: ModelSection) -> dict[str, Any] | None:
    """The base model's config without downloads: from its folder, the local hub cache or the table.

    `model.overrides` are applied.
    """
    file = _config_file(model)
    config = known_config(model.base)
    if file is not None:
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
    return {**config, **model.overrides} if isinstance(config, dict) else None


def known_config(base: str) -> dict[str, Any] | None:
    """The config.json sizes of a base model in the table, by hub id; None if it is not listed."""
    return dict(zip(CONFIG_KEYS, KNOWN_CONFIGS[base], strict=True)) if base in KNOWN_CONFIGS else None


def shape_of(config: dict[str, Any]) -> ModelShape:
    """Shape of a dense decoder from its config.json.

    Raises:
        KeyError, TypeError, ValueError: if a size is missing or not a positive number, or the model is not dense.
    """
    if (reason := unsupported(config)) is not None:
        raise ValueError(reason)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = vocabulary, hidden, intermediate, layers, heads = [int(config[name]) for name in names]
    if min(sizes) < 1:
        raise ValueError(f"sizes must be positive, got {sizes}")
    kv_heads, head_dim = int(config.get("num_key_value_heads") or heads), int(config.get("head_dim") or hidden // heads)
    return ModelShape(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        tied=bool(config.get("tie_word_embeddings", config.get("model_type") in TIED_BY_DEFAULT)),
        context=int(config.get("max_position_embeddings") or 0),
        biases={"qwen2": head_dim * (heads + 2 * kv_heads), "qwen3": 2 * head_dim}.get(config.get("model_type", ""), 0),
    )


def unsupported(config: dict[str, Any]) -> str | None:
    """Why a model is not supported, from its config.json; None for a dense text decoder."""
    if any(config.get(name) for name in EXPERT_COUNT_KEYS):
        return "is a mixture of experts; only dense decoders are supported"
    if any(isinstance(config.get(name), dict) for name in ("text_config", "vision_config", "audio_config")):
        return "is multimodal; only text decoders are supported"
    if config.get("quantization_config"):
        return "is quantized; use the original model (qlora quantizes it while loading)"
    return "is an encoder-decoder; only decoders are supported" if config.get("is_encoder_decoder") else None


def hub_cache() -> Path:
    """The cache folder of huggingface_hub, by its own rules, without importing it."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", os.path.join(os.path.expanduser(caches), "huggingface"))
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(cache)))


def _config_file(model: ModelSection) -> Path | None:
    folder = local_path(model.base)
    if folder.is_dir():
        return folder / "config.json"
    hub = hub_cache() / f"models--{model.base.replace('/', '--')}"
    revision = model.revision or "main"
    reference = hub / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    config = hub / "snapshots" / commit / "config.json"
    return config if config.is_file() else None
