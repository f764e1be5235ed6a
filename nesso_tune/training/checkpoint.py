"""Checkpoints: complete or absent, verified before they are used, independent of wrappers.

Layout of `checkpoint-N/`: `model.safetensors` and `optimizer.safetensors` (canonical parameter names, through
`torch.distributed.checkpoint.state_dict`), `counters-RANK.json`, `rng-RANK.json`, `trainer_state.json`, and last of all
`manifest.json` with size and SHA-256 of every file. The schedule needs no file: it is a function of the step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from nesso_tune.errors import RunEnvironmentError

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
SEPARATOR = "|"  # no parameter name has one


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights by canonical name, gathered on the CPU of the main process; tied weights once."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return _without_ties(model, get_model_state_dict(model, options=options))


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Sets all weights; `state` must hold each of them, tied ones once.

    Raises:
        RunEnvironmentError: if weights are missing or unknown.
    """
    ties = {name for names in _ties(model) for name in names[1:]}
    whole = dict(state) | {n: state[names[0]] for names in _ties(model) for n in names[1:] if names[0] in state}
    options = StateDictOptions(full_state_dict=True, strict=False)
    result = set_model_state_dict(model, whole, options=options)
    wrong = sorted((set(result.missing_keys) - ties) | set(result.unexpected_keys))
    if wrong:
        raise RunEnvironmentError(
            "checkpoint", f"its weights are not those of this model (first: {wrong[0]})",
            "continue with the recipe that wrote it, or start anew with --overwrite",
        )  # fmt: skip


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments and step counts as `parameter|moment`, gathered on the CPU of the main process.

    Learning rate, betas and the like are not kept: they follow from the recipe and the step.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options).get("state", {})  # the first process has it
    return {
        f"{name}{SEPARATOR}{moment}": value.contiguous()
        for name, moments in state.items()
        for moment, value in moments.items()
    }


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Sets what `optimizer_state` gave."""
    options = StateDictOptions(full_state_dict=True)
    groups = get_optimizer_state_dict(model, optimizer, options=options)["param_groups"]
    state: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, _, moment = name.rpartition(SEPARATOR)
        state.setdefault(parameter, {})[moment] = value
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)


class CheckpointWriter:
    """Writes one checkpoint: files into a staging folder, the manifest last, then one rename."""

    def __init__(self, run: Path, step: int) -> None:
        self.final = run / f"{PREFIX}{step}"
        self.staging = run / f".{PREFIX}{step}.partial"

    def begin(self) -> None:
        """Makes an empty staging folder (main process)."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)

    def tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Adds a file of tensors."""
        with as_environment_error(self.staging / name):
            save_file(tensors, self.staging / name)

    def data(self, name: str, data: Any) -> None:
        """Adds a file of plain data."""
        (self.staging / name).write_text(json.dumps(data), encoding="utf-8")

    def finish(self, facts: dict[str, Any]) -> Path:
        """Writes the manifest with `facts` and renames the folder into place (main process)."""
        files = sorted(path for path in self.staging.iterdir() if path.is_file())
        listed = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files}
        body = {**facts, "files": listed}
        self.data(MANIFEST, {**body, "self": _hash_of(body)})
        for path in [*files, self.staging / MANIFEST]:
            readable(path)
            _sync(path)
        _sync(self.staging)
        shutil.rmtree(self.final, ignore_errors=True)
        self.staging.rename(self.final)
        _sync(self.final.parent)
        return self.final


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The verified manifest of a checkpoint.

    Raises:
        ValueError: with what is missing or altered.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        body = {key: value for key, value in manifest.items() if key != "self"}
        if manifest["self"] != _hash_of(body):
            raise ValueError("manifest.json was altered")
        for name, noted in manifest["files"].items():
            file = checkpoint / name
            if not file.is_file():
                raise ValueError(f"{name} is missing")
            if file.stat().st_size != noted["size"] or _sha256(file) != noted["sha256"]:
                raise ValueError(f"{name} is damaged")
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError):
        raise ValueError("manifest.json is missing or damaged") from None
    return dict(manifest)


def read_data(checkpoint: Path, name: str) -> Any:
    """A file of plain data of a checkpoint."""
    return json.loads((checkpoint / name).read_text(encoding="utf-8"))


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """A file of tensors of a checkpoint."""
    return dict(load_file(checkpoint / name))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [path for path in run.glob(f"{PREFIX}*") if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def prune(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints."""
    for old in checkpoints(run)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def as_environment_error(path: Path) -> Iterator[None]:
    """Turns a write that safetensors could not do (a full disk, say) into an error of the environment."""
    try:
        yield
    except SafetensorError as error:
        raise RunEnvironmentError(
            str(path), f"cannot be written ({error})", "free some space; finished checkpoints are intact"
        ) from None


def readable(path: Path) -> None:
    """Gives a file the permissions that the user's umask asks for; safetensors writes for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _ties(model: nn.Module) -> list[list[str]]:
    """Groups of names that are one tensor, as the model itself declares them."""
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(_canonical(name))
    return [names for names in by_tensor.values() if len(names) > 1]


def _canonical(name: str) -> str:
    for wrapper in ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def _without_ties(model: nn.Module, state: dict[str, Any]) -> dict[str, Tensor]:
    repeated = {name for names in _ties(model) for name in names[1:]}
    return {name: value.contiguous() for name, value in state.items() if name not in repeated}


def _hash_of(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_staging(run: Path) -> None:
    """Removes what interrupted saves left behind."""
    leftovers: Iterable[Path] = run.glob(".*.partial")
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
