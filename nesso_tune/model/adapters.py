"""Low-rank adapters, through peft."""

from __future__ import annotations

from peft import LoraConfig

from nesso_tune.recipes.sections import LoraSection


def lora_config(section: LoraSection, new_ids: list[int]) -> LoraConfig:
    """The peft configuration of an adapter.

    Rows of tokens that the base never saw (the chat's control tokens) are trained beside the adapter, tied head
    included: a model whose end token stays untrained never stops.
    """
    targets = section.target_modules
    return LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        trainable_token_indices=new_ids or None,
        task_type="CAUSAL_LM",
    )
