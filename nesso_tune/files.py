"""Files and folders on disk: written completely or not at all, hashed, and locked.

A file or folder is first written under a staging name (`.NAME.partial`), then renamed, so a killed process or a full
disk never leaves half of one under its final name. `remove_staging` removes what an interrupted write left behind.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock

from nesso_tune.errors import RunEnvironmentError

_STAGING = ".partial"
_REPLACED = f".before{_STAGING}"  # suffix of a folder while its replacement is renamed into place
_REMOVED = f".going{_STAGING}"  # suffix of a folder while it is being deleted
_LOCKS_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def atomic_write(
    file: Path, text: str, *, errors: str = "strict", durable: bool = True, staging: Path | None = None
) -> None:
    """Writes a UTF-8 text file atomically; `errors` is passed to `open`, the others to `atomic_replace`."""
    with atomic_replace(file, durable=durable, staging=staging) as path:
        path.write_text(text, encoding="utf-8", errors=errors)


@contextmanager
def atomic_replace(file: Path, *, durable: bool = True, staging: Path | None = None) -> Iterator[Path]:
    """Yields a staging path to write to, and renames it to `file` at the end; after an error it is deleted instead.

    Args:
        file: the file to create or replace.
        durable: fsync the content before the rename, so that it survives a power cut.
        staging: another staging path in the same folder, for processes that may write the same file at once.
    """
    staging = staging or file.with_name(f".{file.name}{_STAGING}")
    try:
        yield staging
        if durable:
            fsync(staging)
        staging.replace(file)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def staging_folder(folder: Path) -> Path:
    """The path under which the content of `folder` is written before `replace_folder`; it is not created."""
    return folder.with_name(f".{folder.name}{_STAGING}")


def make_staging_folder(folder: Path) -> Path:
    """Creates an empty staging folder for `folder`, and its parents; returns its path."""
    staging = staging_folder(folder)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def replace_folder(staging: Path, folder: Path) -> None:
    """Renames a staging folder to `folder`, replacing an existing one; the files in it must have been fsynced."""
    fsync(staging)
    replaced = folder.with_name(f".{folder.name}{_REPLACED}")
    if os.path.lexists(folder):
        remove(replaced)
        folder.rename(replaced)
    staging.rename(folder)
    fsync(folder.parent)
    remove(replaced)


def remove_folder(folder: Path) -> None:
    """Deletes a folder; it is renamed first, so a half-deleted one never has its name."""
    removed = folder.with_name(f".{folder.name}{_REMOVED}")
    remove(removed)
    folder.rename(removed)
    remove(removed)


def remove(path: Path) -> None:
    """Deletes a folder, a file or a link, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_staging(parent: Path) -> None:
    """Deletes staging files and folders in `parent`; a folder that was just being replaced gets its name back."""
    for replaced in parent.glob(f".*{_REPLACED}"):
        name = replaced.name.removeprefix(".").removesuffix(_REPLACED)
        if not os.path.lexists(parent / name):
            replaced.rename(parent / name)
    for path in parent.glob(f".*{_STAGING}"):
        remove(path)


def fsync(path: Path) -> None:
    """Flushes a file, or the directory entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def apply_umask(path: Path) -> None:
    """Gives a file the permissions of the user's umask; safetensors writes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_sha256(data: Any) -> str:
    """SHA-256 of JSON data, in hexadecimal; independent of the order of keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def format_bytes(count: int) -> str:
    """A number of bytes in a readable unit, e.g. `5.25 GB`."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def acquire_lock(file: Path, alternative: str, timeout: float = -1) -> AcquireReturnProxy[FileLock]:
    """Acquires a lock file; as a context manager, releases it at the end.

    Args:
        file: the lock file.
        alternative: what the user can do if this file system does not support locks; ends the error message.
        timeout: seconds to wait for another process; unlimited by default.

    Raises:
        filelock.Timeout: if another process holds the lock.
        RunEnvironmentError: if the file system does not support locks.
    """
    try:
        return FileLock(file).acquire(timeout=timeout)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _LOCKS_UNSUPPORTED:
            raise
        raise RunEnvironmentError(
            str(file), f"this file system does not support file locks ({error})",
            f"mount it with locks (Lustre: `-o flock`; NFS: with a lock manager, not `-o nolock`), or {alternative}",
        ) from None  # fmt: skip
