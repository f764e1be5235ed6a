"""Files on the disk: synced, and identified by their content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock

from nesso_tune.errors import RunEnvironmentError


def fsync(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power cut."""
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
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def format_bytes(count: int) -> str:
    """Bytes in the unit that reads well, e.g. `5.25 GB`."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def acquire_lock(file: Path, instead: str, timeout: float = -1) -> AcquireReturnProxy[FileLock]:
    """Takes a lock, and releases it at the end of a `with`.

    Args:
        file: the lock file.
        instead: where the user can put what is locked, if this file system has no locks.
        timeout: seconds to wait for another process; without limit by default.

    Raises:
        filelock.Timeout: if another process holds it.
        RunEnvironmentError: if the file system does not support locks.
    """
    try:
        return FileLock(file).acquire(timeout=timeout)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
            raise
        raise RunEnvironmentError(
            str(file), f"this file system does not support file locks ({error})",
            f"mount it with locks (Lustre: `-o flock`; NFS: with a lock manager, not `-o nolock`), or {instead}",
        ) from None  # fmt: skip
