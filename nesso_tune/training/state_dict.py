"""State dicts of a checkpoint: trained weights, optimizer state and random states, independent of wrappers.

Names are those of the unwrapped model, and tied weights occur once. A state dict is either whole, gathered on the CPU
of the main process, or sharded, as each process holds it.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.optim import Optimizer

from nesso_tune.errors import RunEnvironmentError, first_line
from nesso_tune.training import eight_bit
from nesso_tune.training.fsdp import finish_forward

SEPARATOR = "|"  # between parameter and moment; parameter names do not contain it
SHARDS = "shard-*.safetensors"
State = dict[str, Tensor]


def get_weights(model: nn.Module, whole: bool = True, offload: bool = True) -> State:
    """The trained weights: whole on the main process (empty on the others), or this process's shards.

    Without `offload`, whole weights of a model that is not sharded stay on its device, on every process.
    """
    offload = whole and (offload or _is_sharded(model))
    options = StateDictOptions(full_state_dict=whole, cpu_offload=offload, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    repeated = {name for names in _tied_names(model) for name in names[1:]}
    return {name: value.contiguous() for name, value in state.items() if name not in repeated}


def set_weights(model: nn.Module, state: State, whole: bool = True) -> None:
    """Sets the trained weights. `state` must have each of them, and tied ones once.

    Raises:
        RunEnvironmentError: if weights are missing or unexpected.
    """
    tied = _tied_names(model)
    repeated = {name for names in tied for name in names[1:]}
    frozen = {canonical_name(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    full = state | {name: state[names[0]] for names in tied for name in names[1:] if names[0] in state}
    options = StateDictOptions(full_state_dict=whole, strict=False)
    result = set_model_state_dict(model, full, options=options)
    _check_names(set(result.missing_keys) - repeated - frozen, set(result.unexpected_keys))


def get_optimizer_state(model: nn.Module, optimizer: Optimizer, whole: bool = True, offload: bool = True) -> State:
    """Moments and step counts of the optimizer as `PARAMETER|MOMENT`: whole or sharded, as in `get_weights`."""
    if eight_bit.is_eight_bit(optimizer):
        is_main = not dist.is_initialized() or dist.get_rank() == 0
        return _joined(eight_bit.get_state(_trained(model), optimizer)) if is_main else {}
    finish_forward(model)  # weights may be unsharded after an evaluation, but the optimizer state belongs to shards
    options = StateDictOptions(full_state_dict=whole, cpu_offload=whole and (offload or _is_sharded(model)))
    state = get_optimizer_state_dict(model, optimizer, options=options).get(
        "state", {}
    )  # empty except on the main process
    return _joined(state)


def set_optimizer_state(model: nn.Module, optimizer: Optimizer, tensors: State, whole: bool = True) -> None:
    """Sets the moments and step counts from `get_optimizer_state`.

    Raises:
        RunEnvironmentError: if 8-bit moments are of other parameters.
    """
    state: dict[str, State] = {}
    for name, value in tensors.items():
        parameter, _, moment = name.rpartition(SEPARATOR)
        state.setdefault(parameter, {})[moment] = value
    if eight_bit.is_eight_bit(optimizer):
        _check_names(set(), set(state) - set(_trained(model)))
        eight_bit.set_state(_trained(model), optimizer, state)
        return
    options = StateDictOptions(full_state_dict=whole)
    groups = get_optimizer_state_dict(model, optimizer, options=options)["param_groups"]
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)


def _joined(state: Mapping[str, State]) -> State:
    return {
        f"{name}{SEPARATOR}{moment}": value.contiguous()
        for name, moments in state.items()
        for moment, value in moments.items()
    }


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of a model that is not sharded, by canonical name."""
    return {canonical_name(name): weight for name, weight in model.named_parameters() if weight.requires_grad}


def get_shards(model: nn.Module, optimizer: Optimizer) -> State:
    """This process's shards of weights and optimizer state."""
    return get_weights(model, whole=False) | get_optimizer_state(model, optimizer, whole=False)


class HostCopies:
    """Copies of a state in host memory, which is kept: memory that is used for the first time slows the copy down."""

    def __init__(self) -> None:
        self._copies: State = {}

    def of(self, state: State, model: nn.Module, optimizer: Optimizer) -> State:
        """The state on the CPU, with a copy of each tensor that the next optimizer step changes.

        The copies are valid until the next call for tensors of the same names.
        """
        moments = [value for own in optimizer.state.values() for value in own.values() if isinstance(value, Tensor)]
        changing = {_local(tensor).untyped_storage().data_ptr() for tensor in (*model.parameters(), *moments)}
        on_cpu = {name: _local(value).device.type == "cpu" for name, value in state.items()}
        return {
            name: value
            if on_cpu[name] and _local(value).untyped_storage().data_ptr() not in changing
            else self._copy(name, value)
            for name, value in state.items()
        }

    def _copy(self, name: str, value: Tensor) -> Tensor:
        if name not in self._copies:
            self._copies[name] = value.detach().to("cpu", copy=True)
        else:
            _local(self._copies[name]).copy_(_local(value.detach()))
        return self._copies[name]


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_shards(folder: Path, state: State) -> None:
    """Writes weights and optimizer state as a torch distributed checkpoint in safetensors format.

    Every process must call this, and writes a file of its own shards.

    Raises:
        RunEnvironmentError: on every process, if a file cannot be written.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(state, storage_writer=writer)
    except CheckpointException as error:
        raise _not_written(folder, next(iter(error.failures.values()))[0]) from None


def plan_shards(folder: Path, state: State) -> Callable[[], None]:
    """The planning of `save_shards`, which is collective; returns its writing, which another thread may call.

    The writing raises RunEnvironmentError if the file of this process cannot be written.
    """
    writer = _PlannedWriter(str(folder), save_distributed=True)
    dcp.save(state, storage_writer=writer)

    def write() -> None:
        try:
            writer.write()
        except Exception as error:  # of safetensors or the file system
            raise _not_written(folder, error) from error

    return write


class _PlannedWriter(dcp.HuggingFaceStorageWriter):
    """Writes the data of this process when `write` is called, after the processes have agreed on who writes what."""

    _planned: tuple[SavePlan, SavePlanner]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Called by `dcp.save`; writes nothing."""
        self._planned = plan, planner
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def write(self) -> None:
        """Writes the data."""
        super().write_data(*self._planned).wait()


def _not_written(folder: Path, cause: BaseException) -> RunEnvironmentError:
    what = f"cannot be written ({first_line(cause)})"
    return RunEnvironmentError(str(folder), what, "check the disk; finished checkpoints are intact")


def shard_pattern(rank: int) -> str:
    """Glob pattern of the files that a process writes."""
    return f"shard-{rank + 1:05d}-*.safetensors"


def is_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint was written by `save_shards`."""
    return any(checkpoint.glob(SHARDS))


def load_shards(checkpoint: Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Loads the weights or, with an optimizer, its state from shards, with any number of processes.

    Raises:
        RunEnvironmentError: if tensors are missing.
    """
    # the state dict of an optimizer without steps creates the moments, which are then overwritten
    state = get_weights(model, whole=False) if optimizer is None else get_optimizer_state(model, optimizer, whole=False)
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    _check_names(set(state) - set(reader.read_metadata().state_dict_metadata), set())
    dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    if optimizer is None:
        set_weights(model, state, whole=False)
    else:
        set_optimizer_state(model, optimizer, state, whole=False)


def _tied_names(model: nn.Module) -> list[list[str]]:
    """Groups of names of tied weights, in the order of the model's parameters."""
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(canonical_name(name))
    return [names for names in by_tensor.values() if len(names) > 1]


def canonical_name(name: str) -> str:
    """The name of a parameter in the unwrapped model."""
    for wrapper in ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def _check_names(missing: set[str], unknown: set[str]) -> None:
    wrong: list[Any] = sorted(missing | unknown)
    if wrong:
        raise RunEnvironmentError(
            "checkpoint", f"its tensors do not match this model (first: {wrong[0]})",
            "continue with the recipe that wrote it, or start again with --overwrite",
        )  # fmt: skip


def get_rng_state() -> dict[str, Any]:
    """States of the random generators of Python, NumPy and torch in this process, as plain data."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],  # type: ignore[union-attr,attr-defined]
        "torch": _to_base64(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _to_base64(torch.cuda.get_rng_state())
    return states


def set_rng_state(states: dict[str, Any]) -> None:
    """Restores the states from `get_rng_state`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, normal = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, normal))
    torch.set_rng_state(_from_base64(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_base64(states["cuda"]))


def _to_base64(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _from_base64(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
