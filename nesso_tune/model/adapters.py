"""Low-rank adapters, through peft: LoRA, DoRA, and LoRA over a base in 4 bits."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nesso_tune.errors import RecipeError, first_line
from nesso_tune.model.quantized import check_quantiser, quantise, round_weights
from nesso_tune.recipes.sections import LoraSection, ModelSection

TARGETS = "model.adapter.target_modules"


def check_adapter(section: LoraSection | None) -> None:
    """Raises RunEnvironmentError if what an adapter needs is not here."""
    if section is not None and section.type == "qlora":
        check_quantiser()


def adapt(
    model: PreTrainedModel, section: ModelSection, new_ids: list[int], seed: int, merging: bool = False
) -> PeftModel:
    """Puts an adapter into `model`, in place, and freezes everything else; seeded, so the same on every process.

    Args:
        model: the base as it was loaded.
        section: says which adapter, and in which precision the base computes.
        new_ids: rows of the tables that are trained too.
        seed: of the adapter's first weights.
        merging: the adapter shall be merged. A quantised base then is made of plain layers that hold what its 4 bits
            stand for: these weights the adapter was trained on, and only with them it is the model that was evaluated.
            The unquantised base would differ from it by the error of the quantisation.

    Returns:
        peft's view of the model, which can merge the adapter. Training goes on with `model` itself: its blocks, names
        and tables stay where trainers and FSDP look for them.

    Raises:
        RecipeError: if the adapter cannot stand on this model.
    """
    adapter = section.adapter
    assert adapter is not None
    config = lora_config(adapter, model, new_ids)
    if adapter.type == "qlora":
        (round_weights if merging else quantise)(model, getattr(torch, section.dtype))
        model.is_loaded_in_4bit = not merging  # peft asks for it; TRL would round the adapter's own weights for it
    torch.manual_seed(seed)
    try:
        adapted: PeftModel = get_peft_model(model, config)  # type: ignore[assignment]
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:  # of layers that it does not know
        raise RecipeError(
            "model.adapter", f"peft cannot adapt {type(model).__name__} ({first_line(error)})",
            "name other model.adapter.target_modules, or set adapter: null",
        ) from None  # fmt: skip
    model.is_loaded_in_4bit = False
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
        use_dora=section.type == "dora",
        target_modules=targets if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets),
        trainable_token_indices=None if not new_ids else new_ids if tied else names,
        task_type="CAUSAL_LM",
    )


def _check_targets(targets: str | tuple[str, ...], model: PreTrainedModel) -> None:
    """Raises RecipeError if a named layer does not exist, with the names that do, or cannot have an adapter."""
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    heads = [name for name, module in model.named_modules() if module is head]
    kinds = sorted({name.rsplit(".", 1)[-1] for name in names if name not in heads})
    for target in () if targets == "all-linear" else (targets,) if isinstance(targets, str) else targets:
        found = [name for name in names if f".{name}".endswith(f".{target}")]
        if not found or set(found) <= set(heads):
            why = "the loss is computed from the head's own weights, without an adapter on it"
            why = why if found else f"the model has no layer `{target}`"
            raise RecipeError(TARGETS, why, f"use all-linear, or some of {', '.join(kinds)}")
