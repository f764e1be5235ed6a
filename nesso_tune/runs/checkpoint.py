"""Checkpoints: complete or absent, verified before use, independent of FSDP and DDP wrappers.

Layout of `checkpoint-N/`: `model.safetensors` and `optimizer.safetensors`, or both in `shard-RANK-….safetensors` (see
`training/state_dict.py`), `counters-RANK.json`, `rng-RANK.json`, `trainer_state.json`, and, written last,
`manifest.json` with size and SHA-256 of every file. The learning-rate schedule needs no file: it is a function of the
step. torch is imported only where tensors are read or written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.files import (
    apply_umask,
    fsync,
    json_sha256,
    make_staging_folder,
    remove_folder,
    replace_folder,
    sha256,
    staging_folder,
)

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
CHECKPOINT_PREFIX = "checkpoint-"
WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

FileRecords = dict[str, dict[str, Any]]  # {file name: {"size": bytes, "sha256": hexadecimal}}


class CheckpointWriter:
    """Writes one checkpoint: files into a staging folder, the manifest last, then one rename.

    Every rank has one and records the files that it wrote. While one file is written, the earlier ones are hashed and
    fsynced in the background.
    """

    def __init__(self, run: Path, step: int) -> None:
        self.final = checkpoint_path(run, step)
        self.staging = staging_folder(self.final)
        self._background = ThreadPoolExecutor(max_workers=2)
        self._written: dict[str, tuple[Future[None], Future[str]]] = {}

    def begin(self) -> None:
        """Creates an empty staging folder (main process only)."""
        make_staging_folder(self.final)

    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Writes a safetensors file."""
        with safetensors_errors(self.staging / name):
            save_tensors(tensors, self.staging / name)
        self._record(self.staging / name)

    def write_json(self, name: str, data: Any) -> None:
        """Writes a JSON file."""
        (self.staging / name).write_text(json.dumps(data), encoding="utf-8")
        self._record(self.staging / name)

    def adopt(self, pattern: str) -> None:
        """Records files that a library wrote into the staging folder for this rank."""
        for path in self.staging.glob(pattern):
            self._record(path)

    def file_records(self) -> FileRecords:
        """Size and SHA-256 of the files of this rank, once all of them are on disk."""
        records: FileRecords = {}
        with self._background:
            for name, (fsynced, digest) in self._written.items():
                fsynced.result()
                records[name] = {"size": (self.staging / name).stat().st_size, "sha256": digest.result()}
        return records

    def finish(self, facts: Mapping[str, Any], files: FileRecords) -> Path:
        """Writes the manifest, renames the folder into place (main process only) and returns its path.

        Args:
            facts: what the manifest records of the run and its progress.
            files: the records of all ranks.
        """
        body = {**facts, "files": files}
        (self.staging / MANIFEST).write_text(json.dumps({**body, "self": json_sha256(body)}), encoding="utf-8")
        fsync(self.staging / MANIFEST)
        replace_folder(self.staging, self.final)
        return self.final

    def _record(self, path: Path) -> None:
        """Starts fsync and SHA-256 of a written file in the background, while it is in the page cache."""
        apply_umask(path)
        self._written[path.name] = self._background.submit(fsync, path), self._background.submit(sha256, path)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after verifying itself and every file that it lists.

    Raises:
        ValueError: naming what is missing or damaged.
        OSError: if a file cannot be read at the moment, which does not mean that it is damaged.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        body = {key: value for key, value in manifest.items() if key != "self"}
        if manifest["self"] != json_sha256(body):
            raise ValueError("manifest.json was altered")
        for name, record in manifest["files"].items():
            if Path(name).name != name:
                raise ValueError(f"manifest.json names a file outside the checkpoint: {name}")
            file = checkpoint / name
            if not file.is_file():
                raise ValueError(f"{name} is missing")
            if file.stat().st_size != record["size"] or sha256(file) != record["sha256"]:
                raise ValueError(f"{name} is damaged")
    except (*_MISSING, KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError("manifest.json is missing or damaged") from None
    return dict(manifest)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [path for path in run.glob(f"{CHECKPOINT_PREFIX}*") if path.is_dir() and is_checkpoint_name(path.name)]
    return sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_path(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / f"{CHECKPOINT_PREFIX}{step}"


def checkpoint_step(checkpoint: Path) -> int:
    """The step of a checkpoint, from the name of its folder."""
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))


def is_checkpoint_name(name: str) -> bool:
    """Whether a name is `checkpoint-` followed by a whole number."""
    number = name.removeprefix(CHECKPOINT_PREFIX)
    return name.startswith(CHECKPOINT_PREFIX) and number.isascii() and number.isdecimal()


def prune(run: Path, keep: int, written: Path) -> None:
    """Deletes all checkpoints except the newest `keep`, the one just `written`, and the best one of each of these.

    Any of the remaining checkpoints can be resumed from and still finds its best weights.
    """
    kept = {*checkpoints(run)[:keep], written}
    kept |= {checkpoint_path(run, step) for step in map(_best_step, kept) if step is not None}
    for old in checkpoints(run):
        if old not in kept:
            remove_folder(old)


def _best_step(checkpoint: Path) -> int | None:
    """The step of the best evaluation so far, if the checkpoint's manifest records one."""
    try:
        best = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")).get("best")
    except (*_MISSING, ValueError):
        return None
    return best["step"] if isinstance(best, dict) else None


def read_json(folder: Path, name: str) -> Any:
    """A JSON file of a checkpoint or a run."""
    return json.loads((folder / name).read_text(encoding="utf-8"))


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """A safetensors file of a checkpoint, on the CPU."""
    from safetensors.torch import load_file

    return dict(load_file(checkpoint / name))


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a safetensors file."""
    from safetensors.torch import save_file

    save_file(tensors, file)


@contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """Turns a failed write of safetensors to `path` into a RunEnvironmentError."""
    try:
        yield
    except SafetensorError as error:
        raise RunEnvironmentError(
            str(path), f"cannot be written ({error})", "check the disk; finished checkpoints are intact"
        ) from None
