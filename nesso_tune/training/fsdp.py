"""FSDP2 through accelerate, FULL_SHARD and HYBRID_SHARD: its arguments, precision, checks and workarounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.parallelism_config import ParallelismConfig
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer

from nesso_tune.errors import Problem, RecipeError, RunEnvironmentError


def fsdp_arguments(model: PreTrainedModel, checkpointing: bool, shards: int, replicas: int) -> dict[str, Any]:
    """FSDP arguments of transformers' trainers: each transformer block is one unit.

    Args:
        model: the model to shard.
        checkpointing: whether activations are recomputed.
        shards: processes over which the state is sharded; consecutive ranks, so those of a node.
        replicas: groups of so many processes that hold the same state.

    Raises:
        RecipeError: if this model cannot be trained with FSDP.
    """
    blocks = sorted(model._no_split_modules or [])
    classes = {type(module).__name__ for module in model.modules()}
    problems = []
    if not classes & set(blocks):
        problems.append(Problem("distributed.fsdp", f"{type(model).__name__} does not declare its transformer blocks",
                                "set distributed.fsdp: none"))  # fmt: skip
    if checkpointing and has_dropout(model):
        # accelerate uses torch's checkpoint wrapper without preserving the random state
        problems.append(Problem("train.gradient_checkpointing",
                                "would use different dropout masks in the recomputation under FSDP",
                                "set it to false, or set the dropout to 0"))  # fmt: skip
    if problems:
        raise RecipeError(problems)
    hybrid = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards) if replicas > 1 else None
    return {
        "fsdp": True,
        "parallelism_config": hybrid,
        "fsdp_config": {
            "version": 2,
            "reshard_after_forward": True,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": [block for block in blocks if block in classes],
            "state_dict_type": "FULL_STATE_DICT",  # unused: `checkpoint.py` writes the checkpoints
            "activation_checkpointing": checkpointing,
        },
    }


def has_dropout(model: PreTrainedModel) -> bool:
    """Whether the model has dropout with a probability above 0."""
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return layers or bool(getattr(model.config.get_text_config(), "attention_dropout", 0.0))


def set_precision(trainer: Trainer) -> None:
    """With bfloat16: blocks compute in bfloat16, but gradients are reduced and outputs returned in float32.

    Accelerate's default policy uses bfloat16 for all three, with errors of up to 0.5 in the log-probabilities of whole
    answers.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and trainer.args.bf16:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def check_sharded(model: nn.Module, shards: int, replicas: int) -> None:
    """Checks that the model is sharded over as many processes as planned.

    Raises:
        RunEnvironmentError: if not.
    """
    sizes = {tuple(parameter.device_mesh.shape) for parameter in model.parameters() if isinstance(parameter, DTensor)}
    if sizes != {(shards,) if replicas == 1 else (replicas, shards)}:
        fsdp = "full_shard" if replicas == 1 else "hybrid_shard"
        raise RunEnvironmentError(
            "distributed.fsdp", f"{fsdp} is set, but the weights are not sharded on these devices",
            "set distributed.fsdp: none, or use GPUs",
        )  # fmt: skip


def finish_forward(model: nn.Module) -> None:
    """Ends the last forward pass of every FSDP unit and reshards its weights; call it after a pass without gradients.

    The LM head on supervised positions reads the head's weight, so the module of the head does not run forward. FSDP2
    then takes the forward pass of its unit (that of a tied embedding) as not finished. A backward pass ends it.
    After a pass without gradients, torch 2.13 and newer end it; older ones keep the weights unsharded, and would not
    unshard them in the next forward pass after they are resharded.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            state._modules_to_run_forward.clear()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # one before torch 2.13
            for group in groups:
                if group is not None:
                    group._training_state = TrainingState.IDLE  # in FORWARD, `reshard` may keep the weights
            module.reshard()


@contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """Keeps the weights of a sharded model whole on every rank, in the precision of computation. Collective.

    Inside, a forward pass communicates nothing, so ranks may run different numbers of them, but at least one each.
    Gradients are not supported.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)  # as in `fsdp_arguments`
        finish_forward(model)


@contextmanager
def keep_tied_embeddings_together(model: PreTrainedModel) -> Iterator[None]:
    """Hides a tied embedding and head with PEFT's trainable tokens while accelerate sets up FSDP.

    Accelerate compares their weights to detect the tie, but PEFT computes `weight` on each access, so the two would be
    wrapped as separate units, which FSDP refuses. Hidden, both stay in the root unit.
    """
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    if not all(isinstance(table, TrainableTokensWrapper) for table in tables):
        yield
        return
    names = ("get_input_embeddings", "get_output_embeddings")
    for name in names:
        setattr(model, name, lambda: None)
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)
