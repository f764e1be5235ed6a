"""One forward and backward pass of the largest micro batch before the first step, for `micro_batch_size: auto`.

The plan's memory is an estimate. The pass runs on the longest row of the data, beside gradients and as many bytes as
the optimizer will need. If the GPU has no memory for it, the micro batch is halved, on all ranks alike. The pass
changes no weights, random states or optimizer state, and its gradients are discarded. Layers are not compiled here,
which takes more memory, not less. A sharded model is not probed: the plan's estimate decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from transformers import PreTrainedModel

from nesso_tune.chat.encoding import IGNORE_INDEX
from nesso_tune.data.prepare import PreparedData
from nesso_tune.errors import first_line, is_out_of_memory
from nesso_tune.logs import logger
from nesso_tune.model.adapters import training_device
from nesso_tune.model.lm_head import attach_supervised_head, forward_path
from nesso_tune.planning.auto import divisors, with_micro_batch
from nesso_tune.planning.hardware import GIB
from nesso_tune.planning.memory import MOMENT_BYTES
from nesso_tune.planning.plan import Plan
from nesso_tune.recipes.schema import Recipe
from nesso_tune.training.dataset import NON_MODEL_KEYS
from nesso_tune.training.grouped_metrics import Groups
from nesso_tune.training.method import method_of
from nesso_tune.training.out_of_memory import out_of_memory_errors

MEMORY_LIMIT = 0.95  # share of the memory of the GPU that torch may reserve: evaluations and fragmentation need some


def probe_micro_batch(model: PreTrainedModel, recipe: Recipe, data: PreparedData, plan: Plan) -> Plan:
    """The plan with the largest micro batch, at most the planned one, that the devices of all ranks have memory for.

    Every rank must call this, before the trainer is built.

    Args:
        model: as it trains, with its adapter; it is moved to the device of this process.
        recipe, data: of the run.
        plan: its micro batch is the one that `auto` chose.

    Raises:
        RunEnvironmentError: on all ranks, if one of them has no memory for a single row.
    """
    if plan.sharded or forward_path(model).head == "trl":
        why = "a sharded model is" if plan.sharded else "models with TRL's LM head are"
        logger.info(f"micro batch auto: {plan.micro_batch} rows by the plan's memory; {why} not probed")
        return plan
    model.to(training_device())
    micro_batch, sizes = plan.micro_batch, divisors(plan.micro_batch * plan.accumulation)
    while True:
        error, peak = _attempt(model, recipe, data, plan, micro_batch)
        errors = gather_object([None if error is None else first_line(error)])
        failed = [rank for rank, text in enumerate(errors) if text is not None]
        if not failed:
            break
        if micro_batch == 1:
            with out_of_memory_errors(recipe, partial(with_micro_batch, recipe, plan, 1, plan.micro_batch_reason)):
                raise error or torch.OutOfMemoryError(f"on rank {failed[0]}: {errors[failed[0]]}")
        smaller = max(n for n in sizes if n <= micro_batch // 2)
        reason = "on another rank" if error is None else first_line(error)
        logger.warning(f"micro batch auto: no memory for {micro_batch} rows ({reason}): trying {smaller}")
        micro_batch = smaller
    if peak is not None and plan.memory is not None:
        planned = with_micro_batch(recipe, plan, micro_batch, "").memory
        expected = "" if planned is None else f"; the plan expected {planned.total / GIB:.1f} GiB"
        logger.info(f"micro batch auto: {micro_batch} rows take {peak / GIB:.1f} GiB in a test of one pass{expected}")
    if micro_batch == plan.micro_batch:
        return plan
    reason = f"a test of one pass ran out of memory with {plan.micro_batch} rows"
    return with_micro_batch(recipe, plan, micro_batch, reason)


def _attempt(
    model: PreTrainedModel, recipe: Recipe, data: PreparedData, plan: Plan, micro_batch: int
) -> tuple[BaseException | None, int | None]:
    """The out-of-memory error of a pass, or None; and its peak in bytes, on a GPU."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        _pass(model, recipe, plan, _largest_batch(model, recipe, data, plan, micro_batch))
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        if on_gpu and torch.cuda.max_memory_reserved() > MEMORY_LIMIT * torch.cuda.mem_get_info()[1]:
            used = torch.cuda.max_memory_reserved() / GIB
            return torch.OutOfMemoryError(f"it would take {used:.1f} GiB, and leave too little"), peak
        return None, peak
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return error.with_traceback(None), None  # the frames of the traceback hold the activations
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # of the run, which reports its own peak


def _largest_batch(
    model: PreTrainedModel, recipe: Recipe, data: PreparedData, plan: Plan, micro_batch: int
) -> dict[str, Any]:
    """The longest row of the data, as often as a micro batch has rows, on the device."""
    length = recipe.data.sequence_len if plan.torch_compile else None
    groups = Groups.of(data.stream.documents)
    collate = method_of(recipe).collator(forward_path(model), data.chat.pad_id, groups, length)
    row = data.train[int(data.train.token_counts.argmax())]
    batch = {name: value for name, value in collate([row] * micro_batch).items() if name not in NON_MODEL_KEYS}
    if "completion_mask" in batch:  # pairs
        batch["labels"] = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, IGNORE_INDEX)
    return send_to_device(batch, training_device())  # type: ignore[no-any-return]


def _pass(model: PreTrainedModel, recipe: Recipe, plan: Plan, batch: dict[str, Any]) -> None:
    """A forward and a backward pass, beside the gradients of earlier ones and what the optimizer needs."""
    device = training_device()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    each = MOMENT_BYTES[recipe.train.optimizer] + (4 if plan.processes > 1 else 0)  # DDP has buckets of gradients
    later = torch.empty(int(each * sum(map(Tensor.numel, trained))) if device.type == "cuda" else 0, dtype=torch.uint8,
                        device=device)  # fmt: skip
    bfloat16 = torch.autocast(device.type, torch.bfloat16) if recipe.model.dtype == "bfloat16" else nullcontext()
    with _as_in_training(model, bool(plan.gradient_checkpointing)), torch.enable_grad():
        with bfloat16:
            log_probs = model(**batch, fused_lm_head=True).log_probs
        log_probs.sum().backward()
    del later


@contextmanager
def _as_in_training(model: PreTrainedModel, checkpointing: bool) -> Iterator[None]:
    """The model with its head on supervised positions, in training mode; everything is restored, random states too."""
    device, was_training, forward = training_device(), model.training, model.__dict__.get("forward")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            model.train()
            attach_supervised_head(model)
            if checkpointing:
                model.activation_checkpointing_enable()
            yield
        finally:
            if checkpointing:
                model.activation_checkpointing_disable()
                model.disable_input_require_grads()
            model.train(was_training)
            del model.forward
            if forward is not None:
                model.forward = forward
