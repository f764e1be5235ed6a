"""Exceptions with exit codes, and helpers for error messages.

Every error that a user can cause is a `NessoError`. Its class sets the exit code of the command line. It holds one or
more problems, each printed as *where: what is wrong; what to do*.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from nesso_tune.logs import visible

DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
# Messages of libraries that do not raise OSError: safetensors and tokenizers (Rust), torch.
DISK_FULL_MESSAGES = (
    "No space left on device",
    "Disk quota exceeded",
    *(f"os error {number})" for number in DISK_FULL_ERRNOS),
)
# Messages of torch, CUDA's libraries and NCCL in errors that are no `torch.OutOfMemoryError`.
OUT_OF_MEMORY_MESSAGES = (
    "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory",
    "not enough memory",
)  # fmt: skip
MAX_NAME_LENGTH = 200  # longer texts are not matched: they are not misspelled names


@dataclass(frozen=True)
class Problem:
    """One problem: its location (`recipes/sft.yaml:12`), what is wrong, and what to do."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return visible(f"{_clipped(self.where)}: {_clipped(self.what)}; {_clipped(self.remedy)}")


class NessoError(Exception):
    """Base class of all errors that a user can cause and fix.

    Attributes:
        exit_code: exit code of the command line.
        prints_message: whether this rank prints the message; if None, the command line decides.
        same_on_ranks: what messages of several ranks have in common, so that one of them is printed; None if all of it.
        on_all_ranks: whether every rank raises it at the same point, so that no rank waits for another one.
        problems: all problems of the error.
    """

    exit_code = 1
    prints_message: bool | None = None
    same_on_ranks: str | None = None
    on_all_ranks = False

    def __init__(self, where: str | Iterable[Problem], what: str = "", remedy: str = "") -> None:
        """Takes one problem as three strings, or an iterable of problems."""
        self.problems: tuple[Problem, ...] = (Problem(where, what, remedy),) if isinstance(where, str) else tuple(where)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)  # pickles the problems, not only their text


class RecipeError(NessoError):
    """The recipe is invalid, contradictory, or differs from that of the run to resume."""

    exit_code = 2


class DataError(NessoError):
    """A data file cannot be read, or has no usable records."""

    exit_code = 3


class ModelError(NessoError):
    """The base model or its tokenizer is missing, corrupt or incompatible."""

    exit_code = 4


class RunEnvironmentError(NessoError):
    """Disk, device or network error, locked or unrelated output folder, or no usable checkpoint."""

    exit_code = 5


class NumericalError(NessoError):
    """NaN or infinity in the loss or the gradients, or a reference that differs from the initial policy."""

    exit_code = 6


class GateRefused(NessoError):
    """The evaluated model did not pass its gate."""

    exit_code = 7


class Preempted(NessoError):
    """The run received a stop signal and saved a checkpoint; the same command resumes it."""

    exit_code = 75


def from_os_error(error: OSError) -> RunEnvironmentError:
    """Converts an OSError to a RunEnvironmentError."""
    where = str(error.filename or "disk")
    if error.errno in DISK_FULL_ERRNOS:
        return RunEnvironmentError(where, "the disk is full", "free some space; finished checkpoints are intact")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return RunEnvironmentError(where, "cannot be written", "check its permissions, or write to another folder")
    if error.errno == errno.ENOLCK:  # from a library's lock; our own locks raise a more specific error
        remedy = "mount it with locks, or put output_dir, NESSO_TUNE_CACHE and HF_HOME on another disk"
        return RunEnvironmentError(where, "the file system does not support file locks", remedy)
    if isinstance(error, (IsADirectoryError, NotADirectoryError, FileNotFoundError)):
        return RunEnvironmentError(where, (error.strerror or str(error)).lower(), "check the path")
    if error.errno in (errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY):
        return RunEnvironmentError(where, (error.strerror or str(error)).lower(), "check the path, or set another one")
    return RunEnvironmentError(where, error.strerror or str(error), "see --debug")


def exit_code_of(error: BaseException) -> int:
    """The exit code of the command line for any error."""
    if isinstance(error, NessoError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return Preempted.exit_code
    own = isinstance(error, (OSError, MemoryError)) or is_out_of_memory(error)
    return RunEnvironmentError.exit_code if own else NessoError.exit_code


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or any error in its chain, is that a device has not enough memory."""
    while error is not None and not isinstance(error, NessoError):
        if type(error).__name__ == "OutOfMemoryError":  # torch.OutOfMemoryError; this module does not import torch
            return True
        if isinstance(error, RuntimeError) and any(words in _message_of(error) for words in OUT_OF_MEMORY_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def from_out_of_memory(error: BaseException) -> RunEnvironmentError:
    """Converts an out-of-memory error of a device, where no plan says what to expect."""
    remedy = "use a GPU with more memory, or free it: `nvidia-smi` shows what uses it"
    return RunEnvironmentError("memory", first_line(error), remedy)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or any error in its chain, reports a full disk or an exceeded quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            return True
        if any(words in _message_of(error) for words in DISK_FULL_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """First line of a third-party error message, at most 200 characters; the class name if the message is empty."""
    return (_message_of(error).strip().splitlines() or [type(error).__name__])[0][:200]


def closest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice most similar to `word` (difflib ratio of at least `cutoff`), or None."""
    if len(word) > MAX_NAME_LENGTH:
        return None
    short = [choice for choice in choices if len(choice) <= MAX_NAME_LENGTH]  # cost grows with both lengths
    found = difflib.get_close_matches(word.lower(), short, n=1, cutoff=cutoff)
    return found[0] if found else None


def check_instance(name: str, value: object, kind: type, example: str) -> None:
    """Raises RecipeError for an argument of another class than `kind`."""
    if not isinstance(value, kind):
        raise RecipeError(
            name, f"must be of class {kind.__name__}, not {type(value).__name__}", f"write {name}={example}"
        )


def check_whole(name: str, value: object, least: int) -> None:
    """Raises RecipeError for an argument that is not a whole number of at least `least`."""
    if not isinstance(value, Integral) or value < least:
        raise RecipeError(name, f"must be a whole number of at least {least}, not {value!r}", "correct it")


def shortened(text: str, max_length: int = 60) -> str:
    """Shortens a name or value for a message: its beginning and its length."""
    return text if len(text) <= max_length else f"{text[: max_length - 20]}... ({len(text):,} characters)"


def cut_in_the_middle(name: str, max_length: int) -> str:
    """A name of at most `max_length` characters: paths and metrics often differ in their ends."""
    end = max_length * 2 // 3
    return name if len(name) <= max_length else f"{name[: max_length - end - 1]}…{name[-end:]}"


def _message_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # `__str__` of a user-defined exception can raise
        return ""


def _clipped(text: str, max_length: int = 2000) -> str:
    """Removes the middle of a very long text: user data and keys have no length limit."""
    return text if len(text) <= max_length else f"{text[: max_length // 2]} ... {text[-max_length // 2 :]}"
