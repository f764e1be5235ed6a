"""`final/`: the trained model as a plain Hugging Face folder, complete or absent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nesso_tune.chat.tokenizer import ChatTokenizer
from nesso_tune.training.checkpoint import as_environment_error, model_state, readable


def plain_state(trained: nn.Module, model: Any) -> dict[str, Tensor]:
    """Canonical weights of the trained model, whole on the first process; an adapter is merged into its base.

    Args:
        trained: the model as it was trained, wrapped and maybe sharded. Every process takes part.
        model: the same without its wrapper.
    """
    return model_state(model.merge_and_unload() if hasattr(model, "merge_and_unload") else trained)


def save_final(
    state: dict[str, Tensor], model: PreTrainedModel, chat: ChatTokenizer, card: str, folder: Path, dtype: str
) -> None:
    """Writes weights, tokenizer, template, generation config and card; runs with plain transformers.

    Args:
        state: weights from `plain_state`.
        model: the model, for its configuration.
        chat: the chat-ready tokenizer.
        card: README.md.
        folder: where `final/` shall stand.
        dtype: precision of the saved weights.
    """
    precision = getattr(torch, dtype)
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.config.dtype, model.config.use_cache = precision, True  # training had turned the cache off
    with as_environment_error(folder):
        model.save_pretrained(staging, state_dict={name: tensor.to(precision) for name, tensor in state.items()})
    chat.save(staging)
    (staging / "README.md").write_text(card, encoding="utf-8")
    for file in staging.iterdir():
        readable(file)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
