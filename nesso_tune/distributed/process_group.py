"""The processes of a run: who is first, when they come together, and when they part."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list, gather_object

from nesso_tune.distributed.membership import RollCall, call_roll
from nesso_tune.errors import NessoError, Problem, RecipeError, RunEnvironmentError, first_line, of_os
from nesso_tune.planning.hardware import Gpu
from nesso_tune.planning.plan import Plan, World
from nesso_tune.recipes.schema import Recipe

SEEN_AFTER_S = 5
# What gloo and NCCL say when another process is gone or does not answer in time.
LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "timeout",
        "Timed out", "timed out", "NCCL communicator was aborted", "remote process exited")  # fmt: skip


def world_size() -> int:
    """Processes that the launcher started, known before they come together."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def is_first() -> bool:
    """Whether this is the process that writes; known before they come together."""
    return int(os.environ.get("RANK") or "0") == 0


def world() -> World:
    """The processes and, where there is one, the kind of GPU."""
    if not torch.cuda.is_available():
        return World(world_size())
    memory = torch.cuda.get_device_properties(0).total_memory
    return World(world_size(), Gpu(torch.cuda.get_device_name(), memory, bfloat16=torch.cuda.is_bf16_supported()))


def idle_gpus() -> int:
    """GPUs of this machine that no process of the run has."""
    return max(0, torch.cuda.device_count() - int(os.environ.get("LOCAL_WORLD_SIZE") or "1"))


_roll: RollCall | None = None  # of this process, for as long as it lives


def come_together(timeout_s: int) -> None:
    """Forms the process group. Data is prepared before: no collective operation then waits for a slow disk.

    Args:
        timeout_s: seconds in which all must have come, and after which a collective operation that does not finish
            ends the run (accelerate would not pass it on for CPU processes).

    Raises:
        RunEnvironmentError: naming the processes that did not come, or what else is in the way.
    """
    global _roll
    on_gpu, timeout = torch.cuda.is_available(), timedelta(seconds=timeout_s)
    if world_size() > 1 and not dist.is_initialized():
        _roll = _roll or call_roll(world_size(), timeout_s)
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", store=_roll.group_store(), rank=int(os.environ["RANK"]),
                world_size=world_size(), timeout=timeout,
            )  # fmt: skip
        except RuntimeError as error:
            raise _deaf("cannot connect to the others, though all are there", error) from None
    PartialState(cpu=not on_gpu, timeout=timeout)


def here() -> str:
    """This process and its machine, as errors call them."""
    return f"process {os.environ.get('RANK', '0')} on {socket.gethostname()}"


@contextmanager
def contact() -> Iterator[None]:
    """Turns the loss of another process, or a collective operation that does not end in time, into one clear error.

    The processes that live say so; the others are named, by the first of those that live. What a process finds
    itself is said once, by whichever found it.
    """
    try:
        yield
    except (NessoError, OSError) as found:
        own = of_os(found) if isinstance(found, OSError) else found
        if _roll is not None and own.speaks is None:
            own.speaks = _roll.first_to_say(str(own))
        if own is found:
            raise
        raise own from found
    except RuntimeError as error:
        if world_size() == 1 or not any(sign in str(error) for sign in LOST):
            raise
        raise _lost(error) from None


def _deaf(what: str, error: Exception) -> RunEnvironmentError:
    remedy = (
        "name the network that connects the machines in NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME on CPUs), or raise "
        "distributed.timeout_s"
    )
    return RunEnvironmentError(here(), f"{what} ({first_line(error)})", remedy)


def _lost(error: Exception) -> RunEnvironmentError:
    with suppress(ValueError):  # of a thread that is not the main one
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which would come before this has been said
    again = "its own message, or the launcher's, says why; the same command continues from the last checkpoint"
    silent = None if _roll is None else _roll.silent()
    if silent == []:
        return _deaf("all processes live, but they do not hear each other", error)
    if _roll is None or silent is None:
        gone = "the first process" if _roll is None else _roll.keeper
        beside = _roll is not None and not _roll.launchers and _roll.hosts[0] == socket.gethostname()
        speaks = os.environ.get("LOCAL_RANK", "0") == ("1" if beside else "0")  # one on each machine
    else:
        gone = ", ".join(_roll.called(rank) for rank in silent)
        speaks = int(os.environ["RANK"]) == min(set(range(world_size())) - set(silent)) and not _roll.spoke(silent)
    lost = RunEnvironmentError(here(), f"lost contact with {gone} ({first_line(error)})", again)
    lost.speaks = speaks
    return lost


def from_first(value: Any) -> Any:
    """The first process's value, on all of them."""
    if world_size() == 1:
        return value
    (shared,) = broadcast_object_list([value], from_process=0)
    return shared


def check_shared(folder: Path) -> None:
    """Makes sure that all processes see one and the same folder: checkpoints are written by one and read by all.

    Raises:
        RunEnvironmentError: on all of them, naming the machines that do not.
    """
    if world_size() == 1:
        return
    mark = folder / f".shared-{from_first(uuid4().hex if is_first() else None)}"
    if is_first():
        mark.touch()
    wait_for_all()
    for _ in range(SEEN_AFTER_S * 10):  # network file systems may show a new file a moment later
        if mark.exists():
            break
        time.sleep(0.1)
    blind = [host for host, sees in gather_object([(socket.gethostname(), mark.exists())]) if not sees]
    wait_for_all()
    if is_first():
        mark.unlink(missing_ok=True)
    if blind:
        raise RunEnvironmentError(
            str(folder), f"is not the same folder on all machines (not on {', '.join(sorted(set(blind)))})",
            "set output_dir on a file system that they share",
        )  # fmt: skip


def wait_for_all() -> None:
    """Goes on when every process has come here."""
    PartialState().wait_for_everyone()


def part() -> None:
    """Ends the process group, so that the next run of a chain prepares its data outside of one."""
    if world_size() == 1 and not dist.is_initialized():  # a launcher's single process has one too
        return
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    if dist.is_initialized():
        dist.destroy_process_group()


NOT_OFFERED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or pipeline parallelism",
}  # fmt: skip
WHERE = "accelerate's configuration"


def check_launcher(recipe: Recipe, plan: Plan, environment: Mapping[str, str]) -> None:
    """Raises RecipeError with every value of the launcher's configuration that contradicts the recipe's."""
    problems = [
        Problem(WHERE, f"asks for {name}, which version 1 does not offer", "remove it: the recipe says how to share")
        for variable, name in NOT_OFFERED.items()
        if _yes(environment.get(variable))
    ]
    problems += [
        Problem(WHERE, f"says {theirs}, the recipe {ours}", "make the two equal, or leave it to the recipe")
        for theirs, ours in _contradictions(recipe, plan, environment)
    ]
    if problems:
        raise RecipeError(problems)


def _contradictions(recipe: Recipe, plan: Plan, environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pairs of what the launcher and what the recipe says."""
    found = []
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    allowed = ("no", "bf16") if recipe.model.dtype == "bfloat16" else ("no",)
    if precision not in allowed:
        found.append((f"mixed_precision: {precision}", f"model.dtype: {recipe.model.dtype}"))
    compiler = environment.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if compiler.upper() != "NO":
        found.append((f"dynamo_backend: {compiler}", "nothing of compilation"))
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(plan.accumulation)):
        found.append((f"gradient_accumulation_steps: {steps}", f"accumulation {plan.accumulation}"))
    if plan.processes > 1 and _yes(environment.get("ACCELERATE_USE_FSDP")):
        found += _of_fsdp(recipe, plan, environment)
    return found


def _of_fsdp(recipe: Recipe, plan: Plan, environment: Mapping[str, str]) -> list[tuple[str, str]]:
    said = f"distributed.fsdp: {recipe.distributed.fsdp}"
    if recipe.distributed.fsdp == "none":
        return [("distributed_type: FSDP", said)]
    found = []
    version = environment.get("FSDP_VERSION", "2")
    if version != "2":
        found.append((f"fsdp_version: {version}", f"{said}, which is FSDP version 2"))
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if version == "2" and reshard not in ("true", "full_shard"):
        found.append((f"fsdp_reshard_after_forward: {reshard}", f"{said}, which frees weights after their turn"))
    if _yes(environment.get("FSDP_OFFLOAD_PARAMS")):
        found.append(("fsdp_offload_params: true", "nothing of offloading"))
    wrap = environment.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if wrap != "TRANSFORMER_BASED_WRAP":
        found.append((f"fsdp_auto_wrap_policy: {wrap}", f"{said}, block by block (TRANSFORMER_BASED_WRAP)"))
    if _yes(environment.get("FSDP_ACTIVATION_CHECKPOINTING")) and not plan.gradient_checkpointing:
        found.append(("fsdp_activation_checkpointing: true", "train.gradient_checkpointing: false"))
    kind = environment.get("FSDP_STATE_DICT_TYPE")
    if kind not in (None, f"{recipe.distributed.state_dict.upper()}_STATE_DICT"):
        found.append((f"fsdp_state_dict_type: {kind}", f"distributed.state_dict: {recipe.distributed.state_dict}"))
    return found


def _yes(value: str | None) -> bool:
    return (value or "").lower() in ("true", "1", "yes")
