"""Checkpoints: complete or absent, verified before they are used, independent of wrappers.

Layout of `checkpoint-N/`: `model.safetensors` and `optimizer.safetensors`, or both in `shard-RANK-….safetensors` (see
`state.py`), `counters-RANK.json`, `rng-RANK.json`, `trainer_state.json`, and last of all `manifest.json` with size and
SHA-256 of every file. The schedule needs no file: it is a function of the step.
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

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nesso_tune.errors import RunEnvironmentError

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"


class CheckpointWriter:
    """Writes one checkpoint: files into a staging folder, the manifest last, then one rename.

    Every process has one, and notes the files that it wrote itself.
    """

    def __init__(self, run: Path, step: int) -> None:
        self.final = run / f"{PREFIX}{step}"
        self.staging = run / f".{PREFIX}{step}.partial"
        self._written: list[Path] = []

    def begin(self) -> None:
        """Makes an empty staging folder (main process)."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)

    def tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Adds a file of tensors."""
        with as_environment_error(self.staging / name):
            save_file(tensors, self.staging / name)
        self._written.append(self.staging / name)

    def data(self, name: str, data: Any) -> None:
        """Adds a file of plain data."""
        (self.staging / name).write_text(json.dumps(data), encoding="utf-8")
        self._written.append(self.staging / name)

    def adopt(self, pattern: str) -> None:
        """Counts files that a library wrote for this process as its own."""
        self._written += self.staging.glob(pattern)

    def note(self) -> dict[str, dict[str, Any]]:
        """{name: size and SHA-256} of this process's files, which are safe on the disk then."""
        for path in self._written:
            readable(path)
            _sync(path)
        return {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in self._written}

    def finish(self, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> Path:
        """Writes the manifest with `facts` and what all noted, and renames the folder into place (main process)."""
        body = {**facts, "files": files}
        self.data(MANIFEST, {**body, "self": _hash_of(body)})
        readable(self.staging / MANIFEST)
        _sync(self.staging / MANIFEST)
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
