"""The cache: results in folders named by a hash of everything that decides them.

A folder is complete or absent, is on the disk before it has its name, and is compared with the hashes of its files when
a process first uses it: what was damaged since is named and made again.
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

from nesso_tune.errors import RunEnvironmentError, is_full
from nesso_tune.files import acquire_lock, format_bytes, fsync, hash_of, sha256
from nesso_tune.logs import print_notes
from nesso_tune.recipes.builtin import environment_path

Opened = TypeVar("Opened")
DONE = "done.json"  # written last: a folder without it is not trusted
ELSEWHERE = "name a folder on another disk in NESSO_TUNE_CACHE"
Stamp = tuple[int, int, int]  # of a file: size, time of the last change, inode

# Files that this process has compared with their hashes, by path, as they were then.
_checked: dict[str, Stamp] = {}


def cache_root() -> Path:
    """`$NESSO_TUNE_CACHE`, or the platform's user cache folder, as an absolute path."""
    return Path(os.path.abspath(environment_path("NESSO_TUNE_CACHE") or user_cache_dir("nesso-tune")))


def key_of(parts: Any) -> str:
    """Hash of plain data."""
    return hash_of(parts)[:24]


class Damaged(Exception):
    """A finished result that is not as it was written; says which file."""


def find(kind: str, key: str) -> tuple[Path, dict[str, Any]] | None:
    """The folder of a finished result and what was noted of it, or None. Its other files are not looked at."""
    folder = cache_root() / kind / key
    try:
        note: dict[str, Any] = _read(folder)["note"]
    except Damaged:
        return None
    return folder, note


def digests(kind: str, key: str) -> dict[str, str]:
    """SHA-256 of every file of a finished result, as it was written. Raises Damaged if its note is."""
    return {name: digest for name, (_, digest) in _read(cache_root() / kind / key)["files"].items()}


def look_up(
    kind: str, key: str, opened: Callable[[Path, dict[str, Any]], Opened], called: str | None = None
) -> Opened | None:
    """A finished result, or None if it is not there or damaged; then it is removed. Arguments as of `make`."""
    root = cache_root() / kind
    if not (root / key).exists():
        return None
    with acquire_lock(root / f"{key}.lock", ELSEWHERE):
        found = _usable(root / key, opened, called or kind)
    return None if found is None else found[0]


def make(
    kind: str,
    key: str,
    build: Callable[[Path], dict[str, Any]],
    opened: Callable[[Path, dict[str, Any]], Opened],
    called: str | None = None,
) -> tuple[Opened, dict[str, Any], bool]:
    """A result, built if it is not there or damaged; whoever asks at the same time waits and finds it.

    Args:
        kind: what sort of result.
        key: hash of everything that decides it.
        build: fills an empty folder and returns what is to be noted of it.
        opened: reads the result from its folder and its note; raises `Damaged` if they do not fit together.
        called: what messages call it; its kind by default.

    Returns:
        The result, the note, and whether it was there already.
    """
    root = cache_root() / kind
    root.mkdir(parents=True, exist_ok=True)
    while True:
        there = (root / key).exists()
        if there:
            with suppress(Damaged):  # outside the lock, so that several processes read at once
                _check(root / key, _read(root / key)["files"])
        with acquire_lock(root / f"{key}.lock", ELSEWHERE):
            if not there and (root / key).exists():
                continue  # another process has made it meanwhile
            if (found := _usable(root / key, opened, called or kind)) is not None:
                return *found, True
            note = _built(root, key, build)
            return opened(root / key, note), note, False


def _built(root: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Makes a result under another name, seals it and gives it its own; returns its note."""
    staging = root / f"{key}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    _sweep(root)
    staging.mkdir()
    try:
        note = build(staging)
        files = _seal(staging, note)
        staging.rename(root / key)
        _sync_names(root)
    except Exception as error:
        if not is_full(error):
            raise
        written = sum(file.stat().st_size for file in staging.iterdir())
        shutil.rmtree(staging, ignore_errors=True)
        free = shutil.disk_usage(root).free
        what = f"the data needs more than {format_bytes(written)}, {format_bytes(free)} are free"
        remedy = f"free some space, or {ELSEWHERE}"
        raise RunEnvironmentError(str(root), f"the disk is full: {what}", remedy) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for name in files:
        _checked[str(root / key / name)] = _stamp(root / key / name)  # it was hashed a moment ago
    return note


def checked() -> dict[str, Stamp]:
    """What this process has compared with its hashes, for another one to `trust`."""
    return dict(_checked)


def trust(others: Mapping[str, Stamp]) -> None:
    """Takes over what another process has compared: files that are still the same are not read again."""
    _checked.update(others)


def _usable(
    folder: Path, opened: Callable[[Path, dict[str, Any]], Opened], called: str
) -> tuple[Opened, dict[str, Any]] | None:
    """A result and its note, or None if there is none; one that is damaged is named and removed."""
    if not folder.exists():
        return None
    try:
        record = _read(folder)
        _check(folder, record["files"])
        return opened(folder, record["note"]), record["note"]
    except Damaged as why:
        print_notes(f"{called} in {folder} was damaged ({why}): making it again")
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _seal(folder: Path, note: dict[str, Any]) -> list[str]:
    """Writes the note, with size and hash of every file and of itself, and syncs all of it; returns the files."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[str(file.relative_to(folder))] = [file.stat().st_size, sha256(file)]
        fsync(file)
    record = json.loads(json.dumps({"note": note, "files": files}))  # as it will be read
    record["sha256"] = hash_of(record)
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (folder / DONE).write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be odd
    fsync(folder / DONE)
    _sync_names(folder)
    return list(files)


def _read(folder: Path) -> dict[str, Any]:
    """`note` and `files` of a finished result. Raises Damaged if they are missing or not as they were written."""
    try:
        record: dict[str, Any] = json.loads((folder / DONE).read_text(encoding="utf-8"))
        if record.pop("sha256") == hash_of(record):
            return record
    except OSError as error:
        raise Damaged(f"{DONE}: {(error.strerror or 'cannot be read').lower()}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise Damaged(DONE)


def _check(folder: Path, files: Mapping[str, tuple[int, str]]) -> None:
    """Raises Damaged for a file that is not as it was written. Each is read once a process: about 1 GB a second."""
    for name, (length, digest) in files.items():
        file = folder / name
        try:
            stamp = _stamp(file)
            if _checked.get(str(file)) != stamp and (stamp[0] != length or sha256(file) != digest):
                raise Damaged(name)
        except OSError as error:
            raise Damaged(f"{name}: {(error.strerror or 'cannot be read').lower()}") from None
        _checked[str(file)] = stamp


def _stamp(file: Path) -> Stamp:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _sync_names(folder: Path) -> None:
    """Syncs the names in a folder, where the file system can do that."""
    with suppress(OSError):
        fsync(folder)


def _sweep(root: Path) -> None:
    """Removes what killed builds of other results left: whoever still builds holds the lock."""
    for left in root.glob("*.partial"):
        with suppress(Timeout), acquire_lock(left.with_suffix(".lock"), ELSEWHERE, timeout=0):
            shutil.rmtree(left, ignore_errors=True)
