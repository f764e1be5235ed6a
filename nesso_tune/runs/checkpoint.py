"""Checkpoints: complete or absent, verified before they are used, independent of wrappers.

Layout of `checkpoint-N/`: `model.safetensors` and `optimizer.safetensors`, or both in `shard-RANK-….safetensors` (see
`state.py`), `counters-RANK.json`, `rng-RANK.json`, `trainer_state.json`, and last of all `manifest.json` with size and
SHA-256 of every file. The schedule needs no file: it is a function of the step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.files import fsync, json_sha256, sha256

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
BEFORE = ".before.partial"  # ends the name of what is being replaced
GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"


class CheckpointWriter:
    """Writes one checkpoint: files into a staging folder, the manifest last, then one rename.

    Every process has one, and notes the files that it wrote itself. While one file is
    written, those before it are hashed and brought to the disk.
    """

    def __init__(self, run: Path, step: int) -> None:
        self.final = run / f"{PREFIX}{step}"
        self.staging = run / f".{PREFIX}{step}.partial"
        self._beside = ThreadPoolExecutor(max_workers=2)
        self._written: dict[str, tuple[Future[None], Future[str]]] = {}

    def begin(self) -> None:
        """Makes an empty staging folder (main process)."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)

    def tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Adds a file of tensors."""
        with as_environment_error(self.staging / name):
            save_file(tensors, self.staging / name)
        self._seal(self.staging / name)

    def data(self, name: str, data: Any) -> None:
        """Adds a file of plain data."""
        (self.staging / name).write_text(json.dumps(data), encoding="utf-8")
        self._seal(self.staging / name)

    def adopt(self, pattern: str) -> None:
        """Counts files that a library wrote for this process as its own."""
        for path in self.staging.glob(pattern):
            self._seal(path)

    def note(self) -> dict[str, dict[str, Any]]:
        """{name: size and SHA-256} of this process's files, which are safe on the disk then."""
        noted: dict[str, dict[str, Any]] = {}
        with self._beside:
            for name, (safe, digest) in self._written.items():
                safe.result()
                noted[name] = {"size": (self.staging / name).stat().st_size, "sha256": digest.result()}
        return noted

    def _seal(self, path: Path) -> None:
        """Begins to bring a file that is written to the disk, and to hash it from memory meanwhile."""
        readable(path)
        self._written[path.name] = self._beside.submit(fsync, path), self._beside.submit(sha256, path)

    def finish(self, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> Path:
        """Writes the manifest with `facts` and what all noted, and renames the folder into place (main process)."""
        body = {**facts, "files": files}
        (self.staging / MANIFEST).write_text(json.dumps({**body, "self": json_sha256(body)}), encoding="utf-8")
        fsync(self.staging / MANIFEST)
        put_in_place(self.staging, self.final)
        return self.final


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The verified manifest of a checkpoint.

    Raises:
        ValueError: with what is missing or altered.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        body = {key: value for key, value in manifest.items() if key != "self"}
        if manifest["self"] != json_sha256(body):
            raise ValueError("manifest.json was altered")
        for name, noted in manifest["files"].items():
            if Path(name).name != name:
                raise ValueError(f"manifest.json names a file outside: {name}")
            file = checkpoint / name
            if not file.is_file():
                raise ValueError(f"{name} is missing")
            if file.stat().st_size != noted["size"] or sha256(file) != noted["sha256"]:
                raise ValueError(f"{name} is damaged")
    except (*GONE, KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError("manifest.json is missing or damaged") from None  # what only cannot be read now is no damage
    return dict(manifest)


def read_data(folder: Path, name: str) -> Any:
    """A file of plain data of a checkpoint or a run."""
    return json.loads((folder / name).read_text(encoding="utf-8"))


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """A file of tensors of a checkpoint."""
    return dict(load_file(checkpoint / name))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [path for path in run.glob(f"{PREFIX}*") if path.is_dir() and is_step(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def is_step(name: str) -> bool:
    """Whether a name is that of a checkpoint: `checkpoint-` and a whole number."""
    number = name.removeprefix(PREFIX)
    return name.startswith(PREFIX) and number.isascii() and number.isdecimal()


def prune(run: Path, keep: int, written: Path) -> None:
    """Removes all but the newest `keep` checkpoints, the one `written` last, and what any of these knows as the best.

    So, whichever of them a run goes on from, the best weights before it are there.
    """
    kept = {*checkpoints(run)[:keep], written}
    kept |= {run / f"{PREFIX}{step}" for step in map(_best_step, kept) if step is not None}
    for old in checkpoints(run):
        if old not in kept:
            discard(old)


def _best_step(checkpoint: Path) -> int | None:
    """The step of the best evaluation that a checkpoint's manifest notes, if any."""
    try:
        noted = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")).get("best")
    except (*GONE, ValueError):
        return None
    return noted["step"] if isinstance(noted, dict) else None


@contextmanager
def as_environment_error(path: Path) -> Iterator[None]:
    """Turns a write that safetensors could not do into an error of the environment."""
    try:
        yield
    except SafetensorError as error:
        raise RunEnvironmentError(
            str(path), f"cannot be written ({error})", "see to the disk; finished checkpoints are intact"
        ) from None


def readable(path: Path) -> None:
    """Gives a file the permissions that the user's umask asks for; safetensors writes for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def put_in_place(staging: Path, folder: Path) -> None:
    """Renames a folder whose files are on the disk to its name, for good; one that stood there goes."""
    fsync(staging)
    before = folder.with_name(f".{folder.name}{BEFORE}")
    if os.path.lexists(folder):
        remove(before)
        folder.rename(before)
    staging.rename(folder)
    fsync(folder.parent)
    remove(before)


def discard(folder: Path) -> None:
    """Removes a folder: it loses its name first, so that none is ever seen half removed."""
    going = folder.with_name(f".{folder.name}.going.partial")
    remove(going)
    folder.rename(going)
    remove(going)


def remove(path: Path) -> None:
    """Removes a folder, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_staging(run: Path) -> None:
    """Removes what interrupted saves left behind; a folder that was just being replaced gets its name back."""
    for before in run.glob(f".*{BEFORE}"):
        name = before.name.removeprefix(".").removesuffix(BEFORE)
        if not os.path.lexists(run / name):
            before.rename(run / name)
    for path in run.glob(".*.partial"):
        remove(path)
