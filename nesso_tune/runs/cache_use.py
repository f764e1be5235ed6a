"""What the cache holds, which runs use it, and the removal of what is not needed.

Each run notes its directory beside the prepared data that it uses, in `KEY.runs`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from nesso_tune.cache import cache_root
from nesso_tune.files import acquire_lock, remove_folder
from nesso_tune.runs.layout import FINAL

DAY_S = 86_400
RUNS_SUFFIX = ".runs"
# Kinds of results, in words
KINDS = {
    "documents": "prepared data", "reference": "reference log-probabilities", "remote": "downloaded files",
    "standins": "tiny models of --smoke", "evaluations": "answers of evaluations", "judgements": "judgements",
    "punkt": "sentence splitter",
}  # fmt: skip


@dataclass(frozen=True)
class CachedResult:
    """A result in the cache.

    Attributes:
        folder: its folder; the name is the key.
        size: bytes of its files.
        used: when it was made, or last used by a run, in seconds since 1970.
        runs: run directories that used it and exist.
    """

    folder: Path
    size: int
    used: float
    runs: tuple[Path, ...]

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return KINDS.get(self.folder.parent.name, self.folder.parent.name)

    @property
    def unfinished_runs(self) -> list[Path]:
        """Runs without a final model: they read it again when they resume."""
        return [run for run in self.runs if not (run / FINAL).is_dir()]

    def days(self, now: float | None = None) -> float:
        """Days since it was used."""
        return max(0.0, (time.time() if now is None else now) - self.used) / DAY_S


def record_use(kind: str, key: str, run: Path) -> None:
    """Notes that a run uses a result. A cache that cannot be written is no error here."""
    with suppress(OSError), _runs_file(cache_root() / kind / key).open("a", encoding="utf-8") as lines:
        lines.write(f"{run.absolute()}\n")


def cached_results() -> list[CachedResult]:
    """All complete results, the largest first."""
    return sorted(_results(), key=lambda result: -result.size)


def unneeded(results: Sequence[CachedResult], older_than_days: float) -> list[CachedResult]:
    """The results that no run has used for some days, and that no unfinished run needs."""
    return [result for result in results if result.days() >= older_than_days and not result.unfinished_runs]


def remove_result(result: CachedResult) -> bool:
    """Removes a result; False if another process builds or reads it at this moment."""
    try:
        with acquire_lock(result.folder.with_name(f"{result.folder.name}.lock"), "try again later", timeout=0):
            remove_folder(result.folder)
            _runs_file(result.folder).unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def _results() -> Iterator[CachedResult]:
    root = cache_root()
    for folder in sorted(root.glob("*/*")) if root.is_dir() else ():
        if not folder.is_dir() or ".partial" in folder.name:
            continue
        files = [file.stat() for file in folder.rglob("*") if file.is_file()]
        if not files:
            continue
        marker, used = _runs_file(folder), max(file.st_mtime for file in files)
        runs: tuple[Path, ...] = ()
        with suppress(OSError):
            used = max(used, marker.stat().st_mtime)
            lines = dict.fromkeys(marker.read_text(encoding="utf-8").splitlines())
            runs = tuple(Path(line) for line in lines if Path(line).is_dir())
        yield CachedResult(folder, sum(file.st_size for file in files), used, runs)


def _runs_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{RUNS_SUFFIX}")
