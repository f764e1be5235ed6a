"""Locks on files. The operating system holds them, so that they end with their process, however it ends."""

from __future__ import annotations

import errno
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock

from nesso_tune.errors import RunEnvironmentError

UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def acquire(file: Path, instead: str, timeout: float = -1) -> AcquireReturnProxy[FileLock]:
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
