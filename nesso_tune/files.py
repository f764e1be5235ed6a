"""Files on disk: fsync, SHA-256, sizes and locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock

from nesso_tune.errors import RunEnvironmentError

_LOCKS_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def fsync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_sha256(data: Any) -> str:
    """SHA-256 of data as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def format_bytes(count: int) -> str:
    """A number of bytes in a readable unit, e.g. `5.25 GB`."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def acquire_lock(file: Path, instead: str, timeout: float = -1) -> AcquireReturnProxy[FileLock]:
    """Acquires a file lock; as a context manager, it releases it at the end.

    Args:
        file: the lock file.
        instead: remedy in the error if the file system has no locks, e.g. another location.
        timeout: seconds to wait for another process; -1 waits without limit.

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
            f"mount it with locks (Lustre: `-o flock`; NFS: with a lock manager, not `-o nolock`), or {instead}",
        ) from None  # fmt: skip
