"""`--overwrite`: the earlier run is moved aside, and deleted once the new one has its first checkpoint.

Until then it can be put back, whatever ends the new run. The name of the folder that holds it says how far this is:

- `being-overwritten.moving/`: the earlier run's files are on their way in or out, the new run has none yet.
- `being-overwritten/`: it holds the whole earlier run; a run's files beside it are the new run's.

One rename leads from each state to the next, so a process can be killed anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.files import sync
from nesso_tune.training.checkpoint import MANIFEST, checkpoints, discard, remove, remove_staging
from nesso_tune.training.layout import FINAL, METRICS, files_of_run

ASIDE = "being-overwritten"
MOVING = f"{ASIDE}.moving"
FAILED_METRICS = f"failed-{METRICS}"  # of a new run that ended before its first checkpoint


def is_pending(path: Path) -> bool:
    """Whether a run directory holds an earlier run that was moved aside."""
    return (path / MOVING).is_dir() or os.path.lexists(path / ASIDE / MANIFEST)


def move_aside(path: Path) -> None:
    """Moves the run in a folder aside; `settle` must have been called before.

    Raises:
        RunEnvironmentError: if something that is not ours has the name of the folder for it.
    """
    moving, aside = path / MOVING, path / ASIDE
    for taken in (name for name in (moving, aside) if os.path.lexists(name)):
        raise RunEnvironmentError(str(taken), "is where --overwrite keeps the earlier run", "rename or remove it")
    moving.mkdir()
    for file in files_of_run(path):
        file.rename(moving / file.name)
    sync(moving)
    moving.rename(aside)
    sync(path)


def settle(path: Path) -> bool:
    """Ends what an overwrite left: the earlier run goes if the new one has a checkpoint, else it is put back.

    Returns:
        Whether it was put back.
    """
    if (path / MOVING).is_dir():
        _put_back(path)
        return True
    if not is_pending(path):
        return False
    if checkpoints(path) or (path / FINAL).exists():
        delete_earlier(path)
        return False
    remove_staging(path)
    if (path / METRICS).is_file():  # they say what went wrong
        (path / METRICS).replace(path / FAILED_METRICS)
    for file in files_of_run(path):
        remove(file)
    (path / ASIDE).rename(path / MOVING)
    _put_back(path)
    return True


def delete_earlier(path: Path) -> None:
    """Deletes the earlier run, if one was moved aside: the new one has a checkpoint now."""
    if is_pending(path):
        discard(path / ASIDE)
        remove(path / FAILED_METRICS)


def bytes_aside(path: Path) -> int:
    """Size of the earlier run that was moved aside; 0 if none was."""
    if not is_pending(path):
        return 0
    files = (Path(folder) / name for folder, _, names in os.walk(path / ASIDE) for name in names)
    return sum(file.lstat().st_size for file in files)


def _put_back(path: Path) -> None:
    """Moves the earlier run's files back; first what marks the folder as that of a run."""
    moving = path / MOVING
    for file in sorted(moving.iterdir(), key=lambda file: file.name != MANIFEST):
        file.rename(path / file.name)
    sync(path)
    moving.rmdir()
