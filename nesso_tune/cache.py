"""Content-keyed cache: each result is a folder, named by a hash of everything that decides it.

A folder is complete or absent: it is built under a name that no other process has, synced to disk and renamed. When a
process first uses it, its files are compared with their SHA-256; a damaged result is reported and built again.

A lock file lets one process build and the others wait. On some shared file systems locks exclude only processes of one
machine (Lustre with `-o localflock`): then several machines may build the same result, and the first rename wins.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

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
_STAGING = ".partial"
_ABANDONED_S = 24 * 3600  # a staging folder of another machine that was not written to for this long
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
WAIT_MESSAGES_S = (10.0, 60.0)  # of a process that waits: the first one, and between later ones

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
    timeout_s: float | None = None,
) -> tuple[Opened, dict[str, Any], bool]:
    """Loads a result, after building it if it is absent or damaged. Concurrent callers wait and share one build.

    Args:
        kind: kind of result, a folder of the cache.
        key: hash of everything that decides the result.
        build: fills an empty folder; returns a note, plain data that is stored with the result.
        loader: loads the result from its folder and its note; raises `Damaged` if they are inconsistent.
        label: name of the result in messages; `kind` by default.
        timeout_s: seconds to wait for a process that builds it; unlimited by default.

    Returns:
        The result, its note, and whether it was in the cache.

    Raises:
        RunEnvironmentError: if the disk is full, or another process builds the result for longer than `timeout_s`.
    """
    root, label = cache_root() / kind, label or kind
    root.mkdir(parents=True, exist_ok=True)
    while True:
        exists = (root / key).exists()
        if exists:
            with suppress(Damaged):  # outside the lock, so that several processes read at once
                _verify(root / key, _read(root / key)["files"])
        with _locked(root / f"{key}.lock", label, timeout_s):
            if not exists and (root / key).exists():
                continue  # another process has built it in the meantime
            if (found := _load_or_remove(root / key, loader, label)) is not None:
                return *found, True
            if (note := _build(root, key, build)) is not None:
                return loader(root / key, note), note, False


def load(
    kind: str, key: str, loader: Callable[[Path, dict[str, Any]], Opened], label: str | None = None
) -> Opened | None:
    """Loads a result; None if it is absent, or damaged and therefore removed. Arguments as for `get_or_build`."""
    root = cache_root() / kind
    if not (root / key).exists():
        return None
    with _locked(root / f"{key}.lock", label or kind):
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
    """The files that this process has compared with their hashes, for `trust_verified` of one on the same machine."""
    return dict(_verified)


def trust_verified(others: Mapping[str, Stamp]) -> None:
    """Takes over what another process has verified: files with the same stamp are not read again."""
    _verified.update(others)


@contextmanager
def _locked(lock: Path, label: str, timeout_s: float | None = None) -> Iterator[None]:
    """Holds the lock of a result; a process that waits for it says so, and since when.

    Raises:
        RunEnvironmentError: if another process holds it for longer than `timeout_s`.
    """
    started, (pause, interval), host = time.monotonic(), WAIT_MESSAGES_S, socket.gethostname()
    while True:
        left = float("inf") if timeout_s is None else timeout_s + started - time.monotonic()
        try:
            held = acquire_lock(lock, _MOVE_REMEDY, timeout=max(0.0, min(pause, left)))
            break
        except Timeout:
            if left <= pause:
                raise RunEnvironmentError(
                    str(lock), f"{label}: another process on {host} was not done within {timeout_s:g} s",
                    "run `nesso-tune prepare` first, which has the time it needs, or raise distributed.timeout_s",
                ) from None  # fmt: skip
            bound = "" if timeout_s is None else f" (at most {timeout_s:g} s)"
            waited = f"{time.monotonic() - started:.0f} s so far{bound}"
            logger.info(f"{label}: waiting for another process on {host} that builds it, {waited}", extra=EVERY_RANK)
            pause = interval
    with held:
        yield


def _build(root: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any] | None:
    """Builds a result in a staging folder, seals it and renames it.

    Returns:
        Its note; None if another machine has built the same result meanwhile.
    """
    _remove_abandoned_builds(root, key)
    staging = _staging(root / key)
    staging.mkdir()
    try:
        note = build(staging)
        files = _seal(staging, note)
        try:
            staging.rename(root / key)
        except OSError:
            if (root / key / DONE_FILE).exists():
                return None
            raise
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
        removed = _staging(folder)
        with suppress(FileNotFoundError):  # another machine was faster
            folder.rename(removed)  # at once, so that no other machine sees half of it
        shutil.rmtree(removed, ignore_errors=True)
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


def _staging(folder: Path) -> Path:
    """A name for the folder while it is built or removed, which no other process uses."""
    return folder.with_name(f"{folder.name}.{_machine()}-{os.getpid()}-{uuid4().hex[:8]}{_STAGING}")


def _machine() -> str:
    """Identifies the running kernel, whose processes see each other's locks; containers on a machine share it."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip().replace("-", "")[:12]
    except OSError:  # not Linux
        return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12]


def _remove_abandoned_builds(root: Path, locked: str) -> None:
    """Removes staging folders of killed processes.

    A build of this machine that still runs holds the lock of its key; this process holds that of `locked`. The locks of
    another machine may not be visible here, so its builds are judged by the time of their last write.
    """
    for staging in root.glob(f"*{_STAGING}"):
        key, _, builder = staging.name.removesuffix(_STAGING).partition(".")
        if builder and not builder.startswith(f"{_machine()}-"):
            if _seconds_since_write(root, staging) > _ABANDONED_S:
                shutil.rmtree(staging, ignore_errors=True)
        elif key == locked:
            shutil.rmtree(staging, ignore_errors=True)
        else:
            with suppress(Timeout), acquire_lock(root / f"{key}.lock", _MOVE_REMEDY, timeout=0):
                shutil.rmtree(staging, ignore_errors=True)


def _seconds_since_write(root: Path, staging: Path) -> float:
    """Seconds since the last write to a staging folder, by the clock of the file system."""
    with suppress(OSError):
        newest = max(path.stat().st_mtime for path in (staging, *staging.rglob("*")))
        probe = root / f"clock-{uuid4().hex}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - newest
    return 0.0
