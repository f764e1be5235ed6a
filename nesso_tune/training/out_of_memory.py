"""Out of GPU memory: one error with what the plan expected, what is in use, and what to lower."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from nesso_tune.errors import NessoError, RunEnvironmentError, first_line, is_out_of_memory
from nesso_tune.planning.hardware import GIB
from nesso_tune.planning.plan import Plan, memory_in_words
from nesso_tune.recipes.schema import Recipe

OTHERS_SHARE = 0.05  # of the GPU's memory; less is the CUDA context of this process


@dataclass(frozen=True)
class MemoryInUse:
    """Memory of this process's GPU in bytes.

    Attributes:
        allocated: in tensors.
        reserved: by torch, tensors included.
        free: on the GPU.
        total: of the GPU.
    """

    allocated: int
    reserved: int
    free: int
    total: int

    @classmethod
    def now(cls) -> MemoryInUse | None:
        """What CUDA reports; None without a GPU, or if it cannot say it any more."""
        with suppress(RuntimeError, AssertionError):
            if torch.cuda.is_available():
                free, total = torch.cuda.mem_get_info()
                return cls(torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), free, total)
        return None

    def in_words(self) -> str:
        """The figures, and those of other processes if these are large."""
        words = f"{_gib(self.allocated)} are allocated and {_gib(self.reserved)} reserved by torch, {_gib(self.free)} "
        words += f"of {_gib(self.total)} are free"
        others = self.total - self.free - self.reserved
        if others > OTHERS_SHARE * self.total:
            words += f", {_gib(others)} are used by other processes (see `nvidia-smi`)"
        return words


@contextmanager
def out_of_memory_errors(recipe: Recipe, plan_of: Callable[[], Plan]) -> Iterator[None]:
    """Turns an out-of-memory error of the device, in any part of a run, into one that says what to lower.

    Args:
        recipe: the recipe of the run.
        plan_of: returns its plan.

    Raises:
        RunEnvironmentError: in place of the original error.
    """
    try:
        yield
    except NessoError:  # perhaps one of these, from a part that knew the plan better
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        plan = None
        with suppress(NessoError, RuntimeError):  # CUDA may not answer any more
            plan = plan_of()
        raise out_of_memory(error, recipe, plan, MemoryInUse.now()) from error


def out_of_memory(
    error: BaseException, recipe: Recipe, plan: Plan | None, in_use: MemoryInUse | None
) -> RunEnvironmentError:
    """The error for the user, of this rank."""
    where = "memory"
    if plan is not None and plan.processes > 1:
        where = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
    facts = [first_line(error).split(". ")[0].removesuffix(".")]
    if plan is not None and plan.memory is not None:
        needs, parts = memory_in_words(plan)
        facts.append(f"the plan expected {needs.partition(';')[0]} {parts}")
    if in_use is not None:
        facts.append(in_use.in_words())
    result = RunEnvironmentError(where, f"out of memory: {'. '.join(facts)}", _what_to_lower(recipe, plan))
    result.same_on_ranks = "out of memory"  # all ranks have the same shape of work: one message is enough
    return result


def _what_to_lower(recipe: Recipe, plan: Plan | None) -> str:
    """What needs less memory, in the order of what it costs."""
    train, steps = recipe.train, []
    if plan is None or plan.micro_batch > 1:
        keeps = "" if train.global_batch_size else " and raise train.gradient_accumulation_steps as much"
        now = f" (now {plan.micro_batch}{', by auto' if train.micro_batch_size == 'auto' else ''})" if plan else ""
        steps.append(f"lower train.micro_batch_size{now}{keeps}")
    if plan is None or not plan.gradient_checkpointing:
        steps.append("set train.gradient_checkpointing: true")
    steps.append(f"lower data.sequence_len (now {recipe.data.sequence_len})")
    can_shard = not recipe.needs_bitsandbytes
    if plan is not None and can_shard and plan.processes > 1 and plan.shards < plan.processes:
        steps.append("set distributed.fsdp: full_shard")
    if plan is not None and can_shard and plan.processes == 1:
        steps.append("share the weights over several GPUs with `nesso-tune launch` and distributed.fsdp: full_shard")
    return f"in this order: {', '.join(steps)} (to resume, name the changed keys with --allow-changes)"


def _gib(number: int) -> str:
    return f"{number / GIB:.1f} GiB"
