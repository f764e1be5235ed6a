"""Content-keyed cache: each result is a folder, named by a hash of everything that decides it.

A folder is complete or absent: it is built under another name, synced to disk and renamed. When a process first uses
it, its files are compared with their SHA-256; a damaged result is reported and built again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import Timeout
from platformdirs import user_cache_dir

from nesso_tune.errors import RunEnvironmentError, is_disk_full
from nesso_tune.files import acquire_lock, format_bytes, fsync, json_sha256, sha256
from nesso_tune.logs import EVERY_RANK, logger
from nesso_tune.recipes.builtin import environment_path

Opened = TypeVar("Opened")
Stamp = tuple[int, int, int]  # of a file: size, modification time in ns, inode
DONE_FILE = "done.json"  # written last: a folder without it is incomplete
_MOVE_REMEDY = "set NESSO_TUNE_CACHE to a folder on another disk"

# Files that this process has compared with their hashes: path -> stamp at that time.
_verified: dict[str, Stamp] = {}


class Damaged(Exception):
    """A cached result differs from what was written; the message names the file."""


def cache_root() -> Path:
    """`$NESSO_TUNE_CACHE`, or the platform's user cache folder, as an absolute path."""
    return Path(os.path.abspath(environment_path("NESSO_TUNE_CACHE") or user_cache_dir("nesso-tune")))


def key_of(parts: Any) -> str:
    """Hash of JSON-serialisable data: 24 hexadecimal digits."""
    return json_sha256(parts)[:24]


def get_or_build(
    kind: str,
    key: str,
    build: Callable[[Path], dict[str, Any]],
    loader: Callable[[Path, dict[str, Any]], Opened],
    label: str | None = None,
) -> tuple[Opened, dict[str, Any], bool]:
    """Loads a result, after building it if it is absent or damaged. Concurrent callers wait and share one build.

    Args:
        kind: kind of result, a folder of the cache.
        key: hash of everything that decides the result.
        build: fills an empty folder; returns a note, plain data that is stored with the result.
        loader: loads the result from its folder and its note; raises `Damaged` if they are inconsistent.
        label: name of the result in messages; `kind` by default.

    Returns:
        The result, its note, and whether it was in the cache.

    Raises:
        RunEnvironmentError: if the disk is full.
    """
    root = cache_root() / kind
    root.mkdir(parents=True, exist_ok=True)
    while True:
        exists = (root / key).exists()
        if exists:
            with suppress(Damaged):  # outside the lock, so that several processes read at once
                _verify(root / key, _read(root / key)["files"])
        with acquire_lock(root / f"{key}.lock", _MOVE_REMEDY):
            if not exists and (root / key).exists():
                continue  # another process has built it in the meantime
            if (found := _load_or_remove(root / key, loader, label or kind)) is not None:
                return *found, True
            note = _build(root, key, build)
            return loader(root / key, note), note, False


def load(
    kind: str, key: str, loader: Callable[[Path, dict[str, Any]], Opened], label: str | None = None
) -> Opened | None:
    """Loads a result; None if it is absent, or damaged and therefore removed. Arguments as for `get_or_build`."""
    root = cache_root() / kind
    if not (root / key).exists():
        return None
    with acquire_lock(root / f"{key}.lock", _MOVE_REMEDY):
        found = _load_or_remove(root / key, loader, label or kind)
    return None if found is None else found[0]


def find(kind: str, key: str) -> tuple[Path, dict[str, Any]] | None:
    """The folder of a result and its note, or None if it is absent. The other files are not verified."""
    folder = cache_root() / kind / key
    try:
        note: dict[str, Any] = _read(folder)["note"]
    except Damaged:
        return None
    return folder, note


def file_hashes(kind: str, key: str) -> dict[str, str]:
    """SHA-256 of every file of a result, as it was written. Raises `Damaged` if they cannot be read."""
    return {name: digest for name, (_, digest) in _read(cache_root() / kind / key)["files"].items()}


def verified_files() -> dict[str, Stamp]:
    """The files that this process has compared with their hashes; for another process's `trust_verified`."""
    return dict(_verified)


def trust_verified(others: Mapping[str, Stamp]) -> None:
    """Takes over what another process has verified: files with the same stamp are not read again."""
    _verified.update(others)


def _build(root: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Builds a result in a staging folder, seals it and renames it; returns its note."""
    staging = root / f"{key}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    _remove_abandoned_builds(root)
    staging.mkdir()
    try:
        note = build(staging)
        files = _seal(staging, note)
        staging.rename(root / key)
        _sync_folder(root)
    except Exception as error:
        if not is_disk_full(error):
            raise
        written = sum(file.stat().st_size for file in staging.iterdir())
        shutil.rmtree(staging, ignore_errors=True)
        what = (
            f"the data needs more than {format_bytes(written)}, {format_bytes(shutil.disk_usage(root).free)} are free"
        )
        remedy = f"free some space, or {_MOVE_REMEDY}"
        raise RunEnvironmentError(str(root), f"the disk is full: {what}", remedy) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for name in files:
        _verified[str(root / key / name)] = _stamp(root / key / name)  # it was hashed a moment ago
    return note


def _seal(folder: Path, note: dict[str, Any]) -> list[str]:
    """Writes the note with the size and hash of every file, and its own hash, and syncs it all; returns the files."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[str(file.relative_to(folder))] = [file.stat().st_size, sha256(file)]
        fsync(file)
    record = json.loads(json.dumps({"note": note, "files": files}))  # as it will be read
    record["sha256"] = json_sha256(record)
    text = json.dumps(record, indent=2, ensure_ascii=False)
    # File names may contain surrogates, which UTF-8 cannot encode.
    (folder / DONE_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")
    fsync(folder / DONE_FILE)
    _sync_folder(folder)
    return list(files)


def _load_or_remove(
    folder: Path, loader: Callable[[Path, dict[str, Any]], Opened], label: str
) -> tuple[Opened, dict[str, Any]] | None:
    """A result and its note; None if it is absent, or damaged and therefore removed."""
    if not folder.exists():
        return None
    try:
        record = _read(folder)
        _verify(folder, record["files"])
        return loader(folder, record["note"]), record["note"]
    except Damaged as why:
        logger.warning(f"{label} in {folder} is damaged ({why}): building it again", extra=EVERY_RANK)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _read(folder: Path) -> dict[str, Any]:
    """`note` and `files` of a result. Raises `Damaged` if they are missing or differ from what was written."""
    try:
        record: dict[str, Any] = json.loads((folder / DONE_FILE).read_text(encoding="utf-8"))
        if record.pop("sha256") == json_sha256(record):
            return record
    except OSError as error:
        raise Damaged(f"{DONE_FILE}: {(error.strerror or 'cannot be read').lower()}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise Damaged(DONE_FILE)


def _verify(folder: Path, files: Mapping[str, tuple[int, str]]) -> None:
    """Raises `Damaged` for a file that differs from its hash. Each file is read once per process, at about 1 GB/s."""
    for name, (length, digest) in files.items():
        file = folder / name
        try:
            stamp = _stamp(file)
            if _verified.get(str(file)) != stamp and (stamp[0] != length or sha256(file) != digest):
                raise Damaged(name)
        except OSError as error:
            raise Damaged(f"{name}: {(error.strerror or 'cannot be read').lower()}") from None
        _verified[str(file)] = stamp


def _stamp(file: Path) -> Stamp:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _sync_folder(folder: Path) -> None:
    """Syncs a folder's entries, where the file system supports it."""
    with suppress(OSError):
        fsync(folder)


def _remove_abandoned_builds(root: Path) -> None:
    """Removes staging folders of killed processes: a build that still runs holds its lock."""
    for staging in root.glob("*.partial"):
        with suppress(Timeout), acquire_lock(staging.with_suffix(".lock"), _MOVE_REMEDY, timeout=0):
            shutil.rmtree(staging, ignore_errors=True)
