"""The processes of a run: who is first, when they come together, and when they part."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list

from nesso_tune.recipes.gpus import Gpu
from nesso_tune.recipes.plan import World


def world_size() -> int:
    """Processes that the launcher started, known before they come together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes; known before they come together."""
    return int(os.environ.get("RANK", "0")) == 0


def world() -> World:
    """The processes and, where there is one, the kind of GPU."""
    if not torch.cuda.is_available():
        return World(world_size())
    memory = torch.cuda.get_device_properties(0).total_memory
    return World(world_size(), Gpu(torch.cuda.get_device_name(), memory, bfloat16=torch.cuda.is_bf16_supported()))


def come_together(timeout_s: int) -> None:
    """Forms the process group. Data is prepared before: no collective operation then waits for a slow disk.

    Args:
        timeout_s: seconds after which a collective operation that does not finish ends the run. Accelerate does not
            pass it on for CPU processes, so their group is formed here.
    """
    timeout = timedelta(seconds=timeout_s)
    if world_size() > 1 and not torch.cuda.is_available() and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timeout)
    PartialState(cpu=not torch.cuda.is_available(), timeout=timeout)


def from_first(value: Any) -> Any:
    """The first process's value, on all of them."""
    if world_size() == 1:
        return value
    (shared,) = broadcast_object_list([value], from_process=0)
    return shared


def wait_for_all() -> None:
    """Goes on when every process has come here."""
    PartialState().wait_for_everyone()


def part() -> None:
    """Ends the process group, so that the next run of a chain prepares its data outside of one."""
    if world_size() == 1:
        return
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    if dist.is_initialized():
        dist.destroy_process_group()
