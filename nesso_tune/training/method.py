"""SFT and DPO side by side: everything in which their training differs, and the arguments of TRL's trainers.

No other module sets arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from trl import DPOConfig, SFTConfig

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.model.lm_head import ForwardPath
from nesso_tune.planning.plan import Plan
from nesso_tune.recipes.schema import DPORecipe, Recipe, SFTRecipe
from nesso_tune.training.dataset import Batch, Collator, ConversationCollator, PairCollator
from nesso_tune.training.dpo import PairTrainer, dpo_metrics, evaluate_dpo, pair_log_likelihood
from nesso_tune.training.evaluator import EvaluateLoss
from nesso_tune.training.fsdp import fsdp_arguments
from nesso_tune.training.grouped_metrics import Groups, MetricSpec
from nesso_tune.training.sft import SFT_METRICS, ConversationTrainer, conversation_log_likelihood, evaluate_sft

Arguments = TypeVar("Arguments", SFTConfig, DPOConfig)


def sft_arguments(recipe: SFTRecipe, plan: Plan, model: PreTrainedModel) -> SFTConfig:
    """Arguments of SFT. Rows are already tokenized and packed, so TRL does not tokenize, pack or truncate."""
    return _one_gpu(
        SFTConfig(
            **_common_arguments(recipe, plan, model),
            dataset_kwargs={"skip_prepare_dataset": True},
            packing=False,
            padding_free=False,
            max_length=None,
        )
    )


def dpo_arguments(recipe: DPORecipe, plan: Plan, model: PreTrainedModel) -> DPOConfig:
    """Arguments of DPO. Pairs are already tokenized, and `reference.py` computes the reference."""
    dpo = recipe.dpo
    return _one_gpu(
        DPOConfig(
            **_common_arguments(recipe, plan, model),
            beta=dpo.beta,
            loss_type=list(dpo.loss),
            loss_weights=list(dpo.loss.values()),
            label_smoothing=dpo.label_smoothing,
            ld_alpha=dpo.ld_alpha,
            max_length=None,
            precompute_ref_log_probs=True,
        )
    )


def _one_gpu(arguments: Arguments) -> Arguments:
    """Uses one GPU per process; by default transformers splits batches over all GPUs of the machine (DataParallel)."""
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _common_arguments(recipe: Recipe, plan: Plan, model: PreTrainedModel) -> dict[str, Any]:
    train, on_gpu = recipe.train, torch.cuda.is_available()
    checkpointing = bool(plan.gradient_checkpointing)
    sharded = plan.sharded
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
        # infinity: the norm is computed and logged, but nothing is clipped
        "max_grad_norm": float("inf") if train.max_grad_norm is None else train.max_grad_norm,
        "activation_checkpointing": checkpointing and not sharded,
        "router_aux_loss_coef": 0.0,  # no load-balancing loss of MoE routers
        "ddp_find_unused_parameters": False,  # every trainable parameter is used in every step
        "ddp_timeout": recipe.distributed.timeout_s,
        "report_to": list(recipe.logging.report_to) or "none",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "accelerator_config": {"non_blocking": on_gpu},  # copies from pinned memory do not wait
        # `IntervalCallback` decides when to log, evaluate and save
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        **(fsdp_arguments(model, checkpointing, plan.shards, plan.replicas) if sharded else {}),
    }


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        trainer: its trainer class.
        metrics: loss and metrics of training and validation rows.
        evaluate_loss: computes them over validation batches.
        log_likelihood: summed log-probability of the supervised tokens of a batch; takes the trainer.
        arguments: TRL's arguments for a plan and a model.
        collator: collator for a model's forward path, padding token, groups, and the length that rows are padded to
            (None for no fixed length).
    """

    trainer: type[ConversationTrainer] | type[PairTrainer]
    metrics: MetricSpec
    evaluate_loss: EvaluateLoss
    log_likelihood: Callable[[Any, Batch], float]
    arguments: Callable[[Plan, PreTrainedModel], SFTConfig | DPOConfig]
    collator: Callable[[ForwardPath, int, Groups, int | None], Collator]


def method_of(recipe: Recipe) -> Method:
    """The training method of a recipe."""
    if isinstance(recipe, SFTRecipe):
        arguments = partial(sft_arguments, recipe)
        return Method(
            ConversationTrainer,
            SFT_METRICS,
            evaluate_sft,
            conversation_log_likelihood,
            arguments,
            _conversation_collator,
        )
    metrics, arguments = dpo_metrics(recipe.dpo.loss), partial(dpo_arguments, recipe)
    return Method(PairTrainer, metrics, evaluate_dpo, pair_log_likelihood, arguments, _pair_collator)


def _conversation_collator(path: ForwardPath, pad_id: int, groups: Groups, length: int | None) -> Collator:
    return ConversationCollator(pad_id, groups, path.padding_free, length, path.packs_by_position_ids)


def _pair_collator(path: ForwardPath, pad_id: int, groups: Groups, length: int | None) -> Collator:
    return PairCollator(pad_id, groups, path.padding_free)
