"""Base models whose shape is known without their files, so that a plan can be made before anything is fetched.

Each entry holds what the model's config.json says.
"""

from __future__ import annotations

from typing import Any

NAMES = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip
TABLE: dict[str, tuple[Any, ...]] = {
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


def known_config(base: str) -> dict[str, Any] | None:
    """The sizes of a known base by its hub id, in the words of config.json; None if it is not known."""
    return dict(zip(NAMES, TABLE[base], strict=True)) if base in TABLE else None
