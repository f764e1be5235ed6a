"""From recipe and plan to the arguments of TRL's trainers. Nothing else sets one."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from trl import DPOConfig, SFTConfig

from nesso_tune.errors import RecipeError, RunEnvironmentError
from nesso_tune.recipes.plan import Plan
from nesso_tune.recipes.schema import DPORecipe, Recipe, SFTRecipe


def sft_arguments(recipe: SFTRecipe, plan: Plan, blocks: list[str]) -> SFTConfig:
    """Arguments of SFT: rows come prepared and collated, so TRL neither tokenises nor packs nor truncates."""
    return SFTConfig(
        **_shared(recipe, plan, blocks),
        dataset_kwargs={"skip_prepare_dataset": True},
        packing=False,
        padding_free=False,
        max_length=None,
    )


def dpo_arguments(recipe: DPORecipe, plan: Plan, blocks: list[str]) -> DPOConfig:
    """Arguments of DPO: pairs come prepared, and the reference's log-probabilities come with them."""
    dpo = recipe.dpo
    return DPOConfig(
        **_shared(recipe, plan, blocks),
        beta=dpo.beta,
        loss_type=list(dpo.loss),
        loss_weights=list(dpo.loss.values()),
        label_smoothing=dpo.label_smoothing,
        ld_alpha=dpo.ld_alpha,
        max_length=None,
        precompute_ref_log_probs=True,
    )


def _shared(recipe: Recipe, plan: Plan, blocks: list[str]) -> dict[str, Any]:
    train, on_gpu = recipe.train, torch.cuda.is_available()
    checkpointing = bool(plan.gradient_checkpointing)
    sharded = shards(recipe, plan.processes)
    if sharded and recipe.model.adapter is not None:
        raise RecipeError(
            "distributed.fsdp", "adapters are not trained under full_shard yet", "set distributed.fsdp: none"
        )
    if recipe.model.dtype == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise RunEnvironmentError("model.dtype", "this GPU has no bfloat16", "set model.dtype: float32")
    return {
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "use_cpu": not on_gpu,
        "bf16": recipe.model.dtype == "bfloat16",
        "max_steps": plan.total_steps,
        "per_device_train_batch_size": plan.micro_batch,
        "per_device_eval_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": plan.learning_rate,
        "optim": train.optimizer,
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_epsilon": train.adam_epsilon,
        "weight_decay": train.weight_decay,
        # the norm is measured even where nothing is clipped
        "max_grad_norm": float("inf") if train.max_grad_norm is None else train.max_grad_norm,
        "activation_checkpointing": checkpointing and not sharded,
        "ddp_find_unused_parameters": False,  # every weight has a part in every loss
        "ddp_timeout": recipe.distributed.timeout_s,
        "report_to": list(recipe.logging.report_to) or "none",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        # when to log, evaluate and save is decided by the plan, see `pace.py`
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        **(_fsdp(blocks, checkpointing) if sharded else {}),
    }


def check_trackers(recipe: Recipe) -> None:
    """Raises RunEnvironmentError if a tracker of `logging.report_to` is not installed."""
    for tracker in recipe.logging.report_to:
        if find_spec(tracker) is None:
            raise RunEnvironmentError("logging.report_to", f"{tracker} is not installed", f"pip install {tracker}")


def shards(recipe: Recipe, processes: int) -> bool:
    """Whether weights, gradients and optimizer are spread over the processes; one process has nothing to share."""
    return processes > 1 and recipe.distributed.fsdp != "none"


def _fsdp(blocks: list[str], checkpointing: bool) -> dict[str, Any]:
    """FSDP2 FULL_SHARD: every transformer block is one unit, gathered for its turn and freed after it."""
    if not blocks:
        raise RecipeError(
            "distributed.fsdp", "this model does not name its transformer blocks", "set distributed.fsdp: none"
        )
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "reshard_after_forward": True,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": blocks,
            "state_dict_type": "FULL_STATE_DICT",
            "activation_checkpointing": checkpointing,
        },
    }
