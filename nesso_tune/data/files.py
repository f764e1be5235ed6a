"""Which local files a path means, of what kind they are, and a hash of what is in them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path

from nesso_tune.errors import DataError, closest
from nesso_tune.recipes.shipped import local_path

SUFFIXES = (".jsonl", ".json", ".parquet", ".ndjson")
TABLES = (".csv", ".tsv", ".xlsx", ".xls", ".ods")
GLOB = frozenset("*?[")
BOM = b"\xef\xbb\xbf"


def is_local(path: str) -> bool:
    """Whether a source's path means files here, not a data set on the hub."""
    try:
        return local_path(path).exists() or bool(GLOB & set(path)) or _looks_like_a_file(path)
    except OSError:  # a name longer than a file's may be
        return True


def looks_like_data(path: str) -> bool:
    """Whether a word on the command line can only mean data: a file of rows, or a pattern."""
    return bool(GLOB & set(path)) or _holds_rows(path) or path.lower().endswith(TABLES)


def _looks_like_a_file(path: str) -> bool:
    named = path.lower().endswith((*SUFFIXES, ".gz", ".csv", ".tsv", ".txt", ".zst", ".zip", ".yaml", ".arrow"))
    return named or path.startswith(("/", "./", "../", "~")) or path.count("/") != 1


def _holds_rows(name: str) -> bool:
    """Whether a file in a folder is data; compressed data is too, so that it is not passed over in silence."""
    name = name.lower()
    return name.removesuffix(".gz").removesuffix(".zst").removesuffix(".zip").endswith(SUFFIXES)


def expand(path: str) -> list[Path]:
    """The files that a path, folder or glob means, in a fixed order.

    Raises:
        DataError: if there are none.
    """
    try:
        return _expanded(path)
    except (OSError, ValueError) as error:  # ValueError: a pattern that is none, or a null character
        what = error.strerror or "" if isinstance(error, OSError) else str(error)
        raise DataError(path, f"cannot be read ({what.lower()})", "check the path and its permissions") from None


def _expanded(path: str) -> list[Path]:
    root = local_path(path)
    if root.is_dir():
        files = sorted(p for p in root.rglob("*") if p.is_file() and _holds_rows(p.name))
        if not files:
            raise DataError(path, "the folder holds no .jsonl, .json or .parquet file", "name the files, or a glob")
        return files
    if root.exists():
        return [root]
    if GLOB & set(path):
        base = Path(root.anchor) if root.is_absolute() else Path()
        files = sorted(p for p in base.glob(str(root.relative_to(root.anchor) if root.anchor else root)) if p.is_file())
        if files:
            return files
        raise DataError(path, "matches no file", "check the pattern; it is relative to the working directory")
    near = sorted(p.name for p in root.parent.glob("*") if p.suffix in SUFFIXES) if root.parent.is_dir() else []
    if guess := closest(root.name, near):
        remedy = f"did you mean {root.parent / guess}?"
    elif near:
        remedy = f"{root.parent} has {', '.join(near[:5])}{' …' if len(near) > 5 else ''}"
    else:
        remedy = "check the path; it is relative to the working directory"
    raise DataError(path, "no such file", remedy)


def could_match(path: str, *files: Path) -> bool:
    """Whether a folder or glob would mean one of these files if it were there. Links are followed.

    Args:
        path: as a recipe names it.
        files: their whole paths, without links.
    """
    root = local_path(path)
    fixed = root.parts if root.is_dir() else tuple(takewhile(lambda part: not GLOB & set(part), root.parts))
    folder, pattern = Path(*fixed), root.parts[len(fixed) :] or ("**", "*")
    whole = folder.resolve()
    if any(whole in file.parents and _matches(pattern, file.relative_to(whole).parts) for file in files):
        return True
    try:
        return any(_leads_to(link, rest, files) for link, rest in _links(folder, pattern))
    except (OSError, ValueError):  # a pattern that is none: `expand` says so
        return False


def _links(folder: Path, pattern: tuple[str, ...]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The links that a pattern may pass or end at, each with the rest of the pattern."""
    for end in range(1, len(pattern) + 1):
        found = folder.glob("/".join(pattern[:end]))
        yield from ((entry, pattern[end:]) for entry in found if entry.is_symlink())


def _leads_to(link: Path, pattern: tuple[str, ...], files: Sequence[Path]) -> bool:
    target = Path(os.path.realpath(link))
    return any(target in (file, *file.parents) and _matches(pattern, file.relative_to(target).parts) for file in files)


def _matches(pattern: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    if not pattern or not parts:
        return not pattern and not parts
    if pattern[0] == "**":
        return _matches(pattern[1:], parts) or _matches(pattern, parts[1:])
    return fnmatchcase(parts[0], pattern[0]) and _matches(pattern[1:], parts[1:])


def files_under(path: str) -> list[Path]:
    """The files that a path means as `expand` has them, of a folder all, whatever they are called.

    Raises:
        DataError: if there are none.
    """
    root = local_path(path)
    return sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else expand(path)


def content_hash(files: list[Path]) -> str:
    """SHA-256 over the bytes of all files in order. Neither names nor times count."""
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise DataError(str(file), f"cannot be read ({error.strerror})", "check its permissions") from None
    return digest.hexdigest()


def is_lines(file: Path) -> bool:
    """Whether a file is named as JSON lines."""
    return file.suffix.lower() in (".jsonl", ".ndjson")


def count_lines(files: list[Path]) -> int:
    """Lines of all files that are not blank."""
    count = 0
    for file in files:
        with file.open("rb") as stream:
            count += sum(1 for line in stream if not line.isspace())
    return count


def is_array(file: Path) -> bool:
    """Whether a file holds one JSON array, whatever its name says."""
    return beginning(file).startswith(b"[")


def beginning(file: Path) -> bytes:
    """The first bytes of a file that are not blank, without a byte order mark; none if there are none."""
    with file.open("rb") as stream:
        head = stream.read(4096).removeprefix(BOM).lstrip()
        while not head and (piece := stream.read(1 << 20)):
            head = piece.lstrip()
    return head[:4096]
