"""The states of all random generators, as plain data."""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from nesso_tune.errors import RunEnvironmentError, first_line


def get_rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators in this process."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],  # type: ignore[union-attr,attr-defined]
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state())
    return states


def set_rng_state(states: dict[str, Any]) -> None:
    """Restores what `get_rng_state` gave."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, normal = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, normal))
    torch.set_rng_state(_tensor(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(states["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


SEPARATOR = "|"  # no parameter name has one
SHARDS = "shard-*.safetensors"
State = dict[str, Tensor]


def get_weights(model: nn.Module, whole: bool = True) -> State:
    """The trained weights: gathered on the CPU of the main process (elsewhere empty), or each process's shards."""
    options = StateDictOptions(full_state_dict=whole, cpu_offload=whole, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    repeated = {name for names in ties(model) for name in names[1:]}
    return {name: value.contiguous() for name, value in state.items() if name not in repeated}


def set_weights(model: nn.Module, state: State, whole: bool = True) -> None:
    """Sets the trained weights; `state` must hold each of them, tied ones once.

    Raises:
        RunEnvironmentError: if weights are missing or unknown.
    """
    tied = ties(model)
    repeated = {name for names in tied for name in names[1:]}
    frozen = {canonical_name(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    full = state | {name: state[names[0]] for names in tied for name in names[1:] if names[0] in state}
    options = StateDictOptions(full_state_dict=whole, strict=False)
    result = set_model_state_dict(model, full, options=options)
    _check(set(result.missing_keys) - repeated - frozen, set(result.unexpected_keys))


def get_optimizer_state(model: nn.Module, optimizer: Optimizer, whole: bool = True) -> State:
    """The optimizer's moments and step counts, gathered on the CPU of the main process, or each process's shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation weights may still be whole, and the optimizer knows their shards
    options = StateDictOptions(full_state_dict=whole, cpu_offload=whole)
    state = get_optimizer_state_dict(model, optimizer, options=options).get("state", {})  # the first process has it
    return {
        f"{name}{SEPARATOR}{moment}": value.contiguous()
        for name, moments in state.items()
        for moment, value in moments.items()
    }


def set_optimizer_state(model: nn.Module, optimizer: Optimizer, tensors: State, whole: bool = True) -> None:
    """Sets what `get_optimizer_state` gave."""
    options = StateDictOptions(full_state_dict=whole)
    groups = get_optimizer_state_dict(model, optimizer, options=options)["param_groups"]
    state: dict[str, State] = {}
    for name, value in tensors.items():
        parameter, _, moment = name.rpartition(SEPARATOR)
        state.setdefault(parameter, {})[moment] = value
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)


def save_shards(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Writes weights and moments, each process its own shards into a safetensors file of its own.

    The files are those of torch's distributed checkpoints in their safetensors form; every process calls this.
    """
    state = get_weights(model, whole=False) | get_optimizer_state(model, optimizer, whole=False)
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(state, storage_writer=writer)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise RunEnvironmentError(
            str(folder), f"cannot be written ({first_line(cause)})", "see to the disk; finished checkpoints are intact"
        ) from None


def shard_pattern(rank: int) -> str:
    """Pattern of the files that one process wrote."""
    return f"shard-{rank + 1:05d}-*.safetensors"


def is_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint's tensors were written by `save_shards`."""
    return any(checkpoint.glob(SHARDS))


def load_shards(checkpoint: Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Sets the weights or, with an optimizer, its moments from shards; any number of processes reads them.

    Raises:
        RunEnvironmentError: if tensors are missing.
    """
    # asking an optimizer that has not stepped makes it create its moments, which then are filled
    state = get_weights(model, whole=False) if optimizer is None else get_optimizer_state(model, optimizer, whole=False)
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    _check(set(state) - set(reader.read_metadata().state_dict_metadata), set())
    dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    if optimizer is None:
        set_weights(model, state, whole=False)
    else:
        set_optimizer_state(model, optimizer, state, whole=False)


def ties(model: nn.Module) -> list[list[str]]:
    """Groups of names that are one tensor, as the model itself declares them."""
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(canonical_name(name))
    return [names for names in by_tensor.values() if len(names) > 1]


def canonical_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def _check(missing: set[str], unknown: set[str]) -> None:
    wrong: list[Any] = sorted(missing | unknown)
    if wrong:
        raise RunEnvironmentError(
            "checkpoint", f"its weights are not those of this model (first: {wrong[0]})",
            "continue with the recipe that wrote it, or start anew with --overwrite",
        )  # fmt: skip
