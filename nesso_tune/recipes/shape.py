"""The shape of a base model, read from its config.json without loading it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nesso_tune.recipes.sections import ModelSection
from nesso_tune.recipes.shipped import local_path

# Bases whose shape is known without their files, so that a plan can be made before anything is fetched.
KNOWN = {
    "mii-llm/zagreus-0.4B-ita": {
        "vocab_size": 128256, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 15, "num_key_value_heads": 5, "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    },
}  # fmt: skip


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

    @property
    def parameters(self) -> int:
        """Number of weights: embeddings, attention, gated MLP and RMS norms."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return embeddings + self.layers * layer + self.hidden_size


def find_shape(model: ModelSection) -> ModelShape | None:
    """The shape of the base from its folder, the hub's local cache, or the table of known bases; None if unknown."""
    config = _config_file(model)
    if config is not None:
        try:
            return shape_of(json.loads(config.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return shape_of(KNOWN[model.base]) if model.base in KNOWN else None


def shape_of(config: dict[str, Any]) -> ModelShape:
    """The shape that a config.json describes.

    Raises:
        KeyError, TypeError, ValueError: if a size is missing or not a positive number.
    """
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = vocabulary, hidden, intermediate, layers, heads = [int(config[name]) for name in names]
    if min(sizes) < 1:
        raise ValueError(f"sizes must be positive, got {sizes}")
    return ModelShape(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        tied=bool(config.get("tie_word_embeddings", False)),
        context=int(config.get("max_position_embeddings") or 0),
    )


def _config_file(model: ModelSection) -> Path | None:
    folder = local_path(model.base)
    if folder.is_dir():
        return folder / "config.json"
    home = os.environ.get("HF_HOME", str(Path("~/.cache/huggingface").expanduser()))
    hub = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")) / f"models--{model.base.replace('/', '--')}"
    revision = model.revision or "main"
    reference = hub / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    config = hub / "snapshots" / commit / "config.json"
    return config if config.is_file() else None
