"""From recipe and plan to the arguments of TRL's trainers. Nothing else sets one."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from trl import DPOConfig, SFTConfig

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.recipes.plan import Plan
from nesso_tune.recipes.schema import DPORecipe, Recipe, SFTRecipe
from nesso_tune.training.sharding import fsdp_arguments


def sft_arguments(recipe: SFTRecipe, plan: Plan, model: PreTrainedModel) -> SFTConfig:
    """Arguments of SFT: rows come prepared and collated, so TRL neither tokenises nor packs nor truncates."""
    return _on_one_device(
        SFTConfig(
            **_shared(recipe, plan, model),
            dataset_kwargs={"skip_prepare_dataset": True},
            packing=False,
            padding_free=False,
            max_length=None,
        )
    )


def dpo_arguments(recipe: DPORecipe, plan: Plan, model: PreTrainedModel) -> DPOConfig:
    """Arguments of DPO: pairs come prepared, and the reference's log-probabilities come with them."""
    dpo = recipe.dpo
    return _on_one_device(
        DPOConfig(
            **_shared(recipe, plan, model),
            beta=dpo.beta,
            loss_type=list(dpo.loss),
            loss_weights=list(dpo.loss.values()),
            label_smoothing=dpo.label_smoothing,
            ld_alpha=dpo.ld_alpha,
            max_length=None,
            precompute_ref_log_probs=True,
        )
    )


Arguments = TypeVar("Arguments", SFTConfig, DPOConfig)


def _on_one_device(arguments: Arguments) -> Arguments:
    """One process, one GPU: on a machine with several, transformers would split its rows over all of them."""
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _shared(recipe: Recipe, plan: Plan, model: PreTrainedModel) -> dict[str, Any]:
    train, on_gpu = recipe.train, torch.cuda.is_available()
    checkpointing = bool(plan.gradient_checkpointing)
    sharded = recipe.distributed.shards(plan.processes)
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
        "router_aux_loss_coef": 0.0,  # the loss is the language model's; a dense model has no router to balance
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
        **(fsdp_arguments(model, checkpointing) if sharded else {}),
    }


def check_trackers(recipe: Recipe) -> None:
    """Raises RunEnvironmentError if a tracker of `logging.report_to` is not installed."""
    for tracker in recipe.logging.report_to:
        if find_spec(tracker) is None:
            raise RunEnvironmentError("logging.report_to", f"{tracker} is not installed", f"pip install {tracker}")
