"""`final/`: the trained model as a plain Hugging Face folder, complete or absent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nesso_tune.chat.tokenizer import ChatTokenizer
from nesso_tune.training.checkpoint import model_state, readable


def save_final(trained: nn.Module, model: PreTrainedModel, chat: ChatTokenizer, card: str, folder: Path, dtype: str) -> None:
    """Writes weights, tokenizer, template, generation config and card; runs with plain transformers.

    Args:
        trained: the wrapped model that was trained.
        model: the unwrapped model, for its configuration; adapters are merged.
        chat: the chat-ready tokenizer.
        card: README.md.
        folder: where `final/` shall stand.
        dtype: precision of the saved weights.
    """
    state = _plain_state(trained, model)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    precision = getattr(torch, dtype)
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    plain.config.dtype, plain.config.use_cache = precision, True  # training had turned the cache off
    plain.save_pretrained(staging, state_dict={name: tensor.to(precision) for name, tensor in state.items()})
    chat.save(staging)
    (staging / "README.md").write_text(card, encoding="utf-8")
    for file in staging.iterdir():
        readable(file)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def _plain_state(trained: nn.Module, model: Any) -> dict[str, Tensor]:
    """Canonical weights; of an adapter run, those of the base with the adapter merged into it."""
    if not hasattr(model, "merge_and_unload"):
        return model_state(trained)
    merged = model.merge_and_unload()
    return model_state(merged)
