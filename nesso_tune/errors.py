"""What can go wrong, said in one form: *where: what is wrong; what to do*.

Every error a user can cause is a `NessoError`. Its class fixes the exit code of the command line; its problems
carry the place, the fault and the remedy, so that many mistakes can be reported at once.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nesso_tune.logs import visible


@dataclass(frozen=True)
class Problem:
    """One mistake: the place (`recipes/sft.yaml:12`), the fault, and the remedy."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return visible(f"{_clipped(self.where)}: {_clipped(self.what)}; {_clipped(self.remedy)}")


def _clipped(text: str, max_length: int = 2000) -> str:
    """A text without its middle where it is very long: a row or key of a user's may be of any length."""
    return text if len(text) <= max_length else f"{text[: max_length // 2]} ... {text[-max_length // 2 :]}"


def first_line(error: BaseException) -> str:
    """What an error of others says, short enough for a line of ours; its kind where it says nothing."""
    return (_message_of(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _message_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # of a user's own kind, that cannot even be said
        return ""


class NessoError(Exception):
    """Base of all errors that a user can cause and mend.

    `exit_code` is what the command line ends with. `prints_message` says whether this one of several processes prints the
    message; None leaves it to the command line.
    """

    exit_code = 1
    prints_message: bool | None = None

    def __init__(self, where: str | Iterable[Problem], what: str = "", remedy: str = "") -> None:
        """Takes either one problem as three texts, or the problems themselves."""
        self.problems: tuple[Problem, ...] = (Problem(where, what, remedy),) if isinstance(where, str) else tuple(where)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)  # from one process to another with its problems, not with their text


class RecipeError(NessoError):
    """The recipe is wrong, contradicts itself, or differs from the run it should continue."""

    exit_code = 2


class DataError(NessoError):
    """A data file cannot be read, or nothing usable is in it."""

    exit_code = 3


class ModelError(NessoError):
    """The base model or its tokenizer is missing, damaged, or does not fit."""

    exit_code = 4


class RunEnvironmentError(NessoError):
    """Disk, devices, network, a locked or foreign output folder, no usable checkpoint."""

    exit_code = 5


class NumericalError(NessoError):
    """NaN or infinity in the loss or the gradients, or a reference that is not the policy it starts from."""

    exit_code = 6


class GateRefused(NessoError):
    """The model was measured and did not pass its gate."""

    exit_code = 7


class Preempted(NessoError):
    """The run was asked to stop; a checkpoint is saved and the same command continues it."""

    exit_code = 75


DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
# How libraries that do not raise OSError say the same: safetensors and tokenizers in Rust, torch in a traceback.
DISK_FULL_MESSAGES = (
    "No space left on device",
    "Disk quota exceeded",
    *(f"os error {number})" for number in DISK_FULL_ERRNOS),
)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, says that the disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            return True
        if any(words in _message_of(error) for words in DISK_FULL_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def from_os_error(error: OSError) -> RunEnvironmentError:
    """What the operating system refused, in our form."""
    where = str(error.filename or "disk")
    if error.errno in DISK_FULL_ERRNOS:
        return RunEnvironmentError(where, "the disk is full", "free some space; finished checkpoints are intact")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return RunEnvironmentError(where, "cannot be written", "check its permissions, or set another output_dir")
    if error.errno == errno.ENOLCK:  # of a library's lock; ours say where else to go
        remedy = "mount it with locks, or put output_dir, NESSO_TUNE_CACHE and HF_HOME on another disk"
        return RunEnvironmentError(where, "the file system does not support file locks", remedy)
    if isinstance(error, (IsADirectoryError, NotADirectoryError, FileNotFoundError)):
        return RunEnvironmentError(where, (error.strerror or str(error)).lower(), "check the path")
    if error.errno in (errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY):
        return RunEnvironmentError(where, (error.strerror or str(error)).lower(), "check the path, or set another one")
    return RunEnvironmentError(where, error.strerror or str(error), "see --debug")


MAX_NAME_LENGTH = 200  # characters from which a word is no misspelt name


def closest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice that `word` was most likely meant to be, or None."""
    if len(word) > MAX_NAME_LENGTH:
        return None
    short = [
        choice for choice in choices if len(choice) <= MAX_NAME_LENGTH
    ]  # a comparison's time grows with both lengths
    found = difflib.get_close_matches(word.lower(), short, n=1, cutoff=cutoff)
    return found[0] if found else None


def shortened(text: str, max_length: int = 60) -> str:
    """A name or value as a message shows it: whole, or its beginning and how long it is."""
    return text if len(text) <= max_length else f"{text[: max_length - 20]}... ({len(text):,} characters)"
