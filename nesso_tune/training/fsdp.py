"""How several processes share a model: FSDP2 FULL_SHARD through accelerate, and what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from nesso_tune.errors import Problem, RecipeError, RunEnvironmentError


def fsdp_arguments(model: PreTrainedModel, checkpointing: bool) -> dict[str, Any]:
    """Arguments of transformers' trainers: every transformer block is one unit, gathered for its turn, freed after it.

    Raises:
        RecipeError: if this model cannot be trained so.
    """
    blocks = sorted(model._no_split_modules or [])
    there = {type(module).__name__ for module in model.modules()}
    problems = []
    if not there & set(blocks):
        problems.append(Problem("distributed.fsdp", f"{type(model).__name__} does not name its transformer blocks",
                                "set distributed.fsdp: none"))  # fmt: skip
    if checkpointing and drops_at_random(model):
        # torch's wrapper, as accelerate calls it, does not restore the state of the random numbers
        problems.append(Problem("train.gradient_checkpointing",
                                "would draw other dropout masks when it computes a block again under full_shard",
                                "set it to false, or the dropout to 0"))  # fmt: skip
    if problems:
        raise RecipeError(problems)
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "reshard_after_forward": True,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": [block for block in blocks if block in there],
            "state_dict_type": "FULL_STATE_DICT",  # checkpoints are ours, see `state.py`
            "activation_checkpointing": checkpointing,
        },
    }


def drops_at_random(model: PreTrainedModel) -> bool:
    """Whether something in the model is dropped at random."""
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return layers or bool(getattr(model.config.get_text_config(), "attention_dropout", 0.0))


def set_precision(trainer: Any) -> None:
    """Blocks compute in bfloat16; gradients are summed over the processes, and losses come out, in float32.

    Accelerate's own policy would round all three: log-probabilities of whole answers then are off by up to 0.5.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and trainer.args.bf16:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def check_sharded(model: nn.Module) -> None:
    """Makes sure that what was asked for is what runs.

    Raises:
        RunEnvironmentError: if no weight is spread over the processes.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise RunEnvironmentError(
            "distributed.fsdp", "full_shard was asked for, but the weights are not sharded on these devices",
            "set distributed.fsdp: none, or use GPUs",
        )  # fmt: skip


@contextmanager
def tied_tables_together(model: PreTrainedModel) -> Iterator[None]:
    """While FSDP is set up, hides an embedding and a head that are tied under peft's trainable rows.

    Accelerate compares their weights to see the tie, but peft computes `weight` anew whenever it is read: the two
    would land in two units, which FSDP refuses. Unseen, both stay in the unit of the whole model.
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
