"""Low-rank adapters, through peft."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from nesso_tune.errors import RecipeError
from nesso_tune.recipes.sections import LoraSection


def adapt(model: PreTrainedModel, section: LoraSection, new_ids: list[int], seed: int) -> PeftModel:
    """Puts an adapter into `model`, in place, and freezes everything else; seeded, so the same on every process.

    Returns:
        peft's view of the model, which can merge the adapter. Training goes on with `model` itself: its blocks, names
        and tables stay where trainers and FSDP look for them.
    """
    torch.manual_seed(seed)
    adapted: PeftModel = get_peft_model(model, lora_config(section, model, new_ids))  # type: ignore[assignment]
    return adapted


def lora_config(section: LoraSection, model: PreTrainedModel, new_ids: list[int]) -> LoraConfig:
    """The peft configuration of an adapter.

    Rows of tokens that the base never saw (the chat's control tokens) are trained beside the adapter, in the
    embedding and in the head, tied or not: a model whose end token stays untrained never stops.
    """
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {name: new_ids for name, module in model.named_modules() if any(module is table for table in tables)}
    tied = model.config.get_text_config().tie_word_embeddings
    targets = section.target_modules
    _check_targets(targets, model)
    return LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets),
        trainable_token_indices=None if not new_ids else new_ids if tied else names,
        task_type="CAUSAL_LM",
    )


def _check_targets(targets: str | tuple[str, ...], model: PreTrainedModel) -> None:
    """Raises RecipeError if a named layer does not exist, with the names that do."""
    layers = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )
    for target in () if targets == "all-linear" else (targets,) if isinstance(targets, str) else targets:
        if target.rsplit(".", 1)[-1] not in layers:
            raise RecipeError(
                "model.adapter.target_modules", f"the model has no layer `{target}`",
                f"use all-linear, or some of {', '.join(layers)}",
            )  # fmt: skip
