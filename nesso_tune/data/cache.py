"""The cache: results in folders named by a hash of everything that decides them, complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import Timeout
from platformdirs import user_cache_dir

from nesso_tune.data.locks import acquire
from nesso_tune.errors import RunEnvironmentError, is_full
from nesso_tune.recipes.describe import size

Opened = TypeVar("Opened")
DONE = "done.json"  # written last: a folder without it is not trusted
ELSEWHERE = "name a folder on another disk in NESSO_TUNE_CACHE"


def cache_root() -> Path:
    """`$NESSO_TUNE_CACHE`, or the platform's user cache folder."""
    return Path(os.environ.get("NESSO_TUNE_CACHE") or user_cache_dir("nesso-tune"))


def key_of(parts: Any) -> str:
    """Hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class Damaged(Exception):
    """A finished result whose files do not fit together."""


def find(kind: str, key: str) -> tuple[Path, dict[str, Any]] | None:
    """The folder of a finished result and what was noted of it, or None."""
    folder = cache_root() / kind / key
    try:
        return folder, json.loads((folder / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def make(
    kind: str, key: str, build: Callable[[Path], dict[str, Any]], opened: Callable[[Path, dict[str, Any]], Opened]
) -> tuple[Opened, dict[str, Any], bool]:
    """A result, built if it is not there or damaged; whoever asks at the same time waits and finds it.

    Args:
        kind: what sort of result.
        key: hash of everything that decides it.
        build: fills an empty folder and returns what is to be noted of it.
        opened: reads the result from its folder and its note; raises `Damaged` if they do not fit together.

    Returns:
        The result, the note, and whether it was there already.
    """
    root = cache_root() / kind
    root.mkdir(parents=True, exist_ok=True)
    with acquire(root / f"{key}.lock", ELSEWHERE):
        found = find(kind, key)
        if found:
            with suppress(Damaged):
                return opened(*found), found[1], True
        staging = root / f"{key}.partial"
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(root / key, ignore_errors=True)  # a folder without its note, or damaged
        _sweep(root)
        staging.mkdir()
        try:
            note = build(staging)
            text = json.dumps(note, indent=2, ensure_ascii=False)
            (staging / DONE).write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be odd
            staging.rename(root / key)
        except Exception as error:
            if not is_full(error):
                raise
            written = sum(file.stat().st_size for file in staging.iterdir())
            shutil.rmtree(staging, ignore_errors=True)
            what = f"the data needs more than {size(written)}, {size(shutil.disk_usage(root).free)} are free"
            raise RunEnvironmentError(
                str(root), f"the disk is full: {what}", f"free some space, or {ELSEWHERE}"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return opened(root / key, note), note, False


def _sweep(root: Path) -> None:
    """Removes what killed builds of other results left: whoever still builds holds the lock."""
    for left in root.glob("*.partial"):
        with suppress(Timeout), acquire(left.with_suffix(".lock"), ELSEWHERE, timeout=0):
            shutil.rmtree(left, ignore_errors=True)
