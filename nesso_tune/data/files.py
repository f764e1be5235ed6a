"""Data files: the files that a path, folder or pattern means, their splits, and a hash of their content."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path

from nesso_tune.errors import DataError, closest, shortened
from nesso_tune.recipes.builtin import local_path

ALL_SPLITS = "all"  # value of `split` that reads every file
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4")
TABLE_SUFFIXES = (".csv", ".tsv", ".tab")
_DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".arrow", ".feather", *TABLE_SUFFIXES,
                  ".xlsx", ".xls", ".xlsb", ".ods")  # fmt: skip
_OTHER_SUFFIXES = (*COMPRESSED_SUFFIXES, ".txt", ".zip", ".yaml", ".tar")
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json")
_NOT_DATA = ("__MACOSX",)  # folders that macOS adds to archives
_OFFICE_LOCK = "~$"  # prefix of the lock file of an open document
_GLOB_CHARACTERS = frozenset("*?[")
# Words in the names of files and folders, as in `datasets`
_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
FileStamp = tuple[int, int, int, int]  # size, times of modification and of change in ns, inode
FileHash = tuple[FileStamp, bytes]  # SHA-256 of a file that had this stamp before it was read
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}\b.*")  # of a data set on the hub

_hashed: dict[str, FileHash] = {}  # by this process: path -> hash
_trusted: dict[str, FileHash] = {}  # by another one, for this process


@dataclass(frozen=True)
class SelectedFiles:
    """The files that a path means.

    Attributes:
        files: the files of the chosen split, in a fixed order.
        split: the chosen split; None if the names carry no splits.
        splits: all splits that the names carry.
        skipped: names of hidden files and folders, metadata, and files of other types.
    """

    files: list[Path]
    split: str | None = None
    splits: tuple[str, ...] = ()
    skipped: tuple[str, ...] = field(default=(), repr=False)


def is_remote(path: str) -> bool:
    """Whether a path is a URL, e.g. `s3://bucket/rows.jsonl`."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", path) is not None


def is_local(path: str) -> bool:
    """Whether the path of a source means local files, not a URL or a data set on the hub."""
    if is_remote(path):
        return False
    try:
        return local_path(path).exists() or is_glob(path) or _looks_like_file(path)
    except OSError:  # longer than a file name can be
        return True


def is_glob(path: str) -> bool:
    """Whether a path is a pattern for several files."""
    return bool(_GLOB_CHARACTERS & set(path))


def looks_like_data(path: str) -> bool:
    """Whether a command-line argument can only mean data: a data file, a URL, or a glob."""
    return is_remote(path) or is_glob(path) or _has_data_suffix(path)


def expand(path: str, split: str = ALL_SPLITS) -> list[Path]:
    """The files that a path, folder or glob means, in a fixed order.

    Args:
        path: as in a recipe.
        split: the split to choose where the names of several files carry splits.

    Raises:
        DataError: if there are none, or not of this split.
    """
    return select_files(path, split).files


def select_files(path: str, split: str = ALL_SPLITS) -> SelectedFiles:
    """As `expand`, with the splits that were found, and what was skipped."""
    try:
        return _select(path, split)
    except (OSError, ValueError) as error:  # ValueError: an invalid pattern, or a null character
        reason = error.strerror or "" if isinstance(error, OSError) else str(error)
        raise DataError(path, f"cannot be read ({reason.lower()})", "check the path and its permissions") from None


def split_name(name: str) -> str | None:
    """The split in the name of a file, of a folder, or of a list of rows; None if it names none.

    `train-00000-of-00002.parquet` and `my_train.jsonl` are of split train, `train_sft-00000-of-00001.parquet` of
    train_sft, `dev.jsonl` of validation.
    """
    kind, shard = split_kind(name), _SHARD.fullmatch(name)
    return kind if kind is None or shard is None else _SPLIT_WORDS.get(shard[1].lower(), shard[1])


def split_kind(split: str) -> str | None:
    """What a split is for, `train`, `validation` or `test`, by the last word of its name that says so."""
    words = [word for word in re.split(r"[^a-z]+", split.lower()) if word in _SPLIT_WORDS]
    return _SPLIT_WORDS[words[-1]] if words else None


def no_split(where: str, split: str, found: Iterable[str]) -> DataError:
    """The error for a file or folder without the requested split."""
    names = sorted(found)
    return DataError(
        where, f"contains the splits {', '.join(map(shortened, names))}, not {split}",
        f"set split: {names[0]}, or split: {ALL_SPLITS} to read them all",
    )  # fmt: skip


def choose_split(path: str, names: Sequence[str], split: str, is_dict: bool = False) -> tuple[list[int], str | None]:
    """The files of a split. One split alone is read whatever its name, since nothing is mixed.

    Args:
        path: folder or pattern, for messages.
        names: the files, relative to it.
        split: the split to choose.
        is_dict: whether each folder is a split, as `DatasetDict.save_to_disk` writes them.

    Returns:
        The indices of the files, and their split; None if all files are read.

    Raises:
        DataError: if several splits would be mixed.
    """
    split = _SPLIT_WORDS.get(split, split)
    by_split: dict[str | None, list[int]] = {}
    for i, name in enumerate(names):
        by_split.setdefault(_split_of(name, is_dict), []).append(i)
    unnamed, found = by_split.pop(None, []), sorted(name for name in by_split if name is not None)
    every = list(range(len(names)))
    if split == ALL_SPLITS or not found or (unnamed and found == ["train"] == [split]):
        return every, None
    if unnamed:
        shown = ", ".join(names[i] for i in unnamed[:3]) + (" …" if len(unnamed) > 3 else "")
        raise DataError(
            path, f"mixes the splits {', '.join(map(shortened, found))} with files of none ({shown})",
            f"name the files of one split, or a glob, or set split: {ALL_SPLITS} to read them all",
        )  # fmt: skip
    if split in by_split:
        return by_split[split], split
    if len(found) == 1 and split == "train":
        return every, found[0]
    raise no_split(path, split, found)


def is_data_name(name: str) -> bool:
    """Whether a file in a folder is read: by its suffix, and if it is not hidden and no metadata."""
    parts = name.split("/")
    return not _is_hidden(parts) and parts[-1] not in _METADATA and _has_data_suffix(parts[-1])


def files_under(path: str) -> list[Path]:
    """The files that a path means, as `expand` does, but all files of a folder, whatever their suffix.

    Raises:
        DataError: if there are none.
    """
    root = local_path(path)
    return sorted(file for file in _walk(root) if file.is_file()) if root.is_dir() else expand(path)


def could_match(path: str, *files: Path) -> bool:
    """Whether a folder or glob would include one of these files if it existed. Symbolic links are followed.

    Args:
        path: folder or glob, as in a recipe.
        files: absolute paths without symbolic links.
    """
    root = local_path(path)
    fixed = root.parts if root.is_dir() else tuple(takewhile(lambda part: not is_glob(part), root.parts))
    folder, pattern = Path(*fixed), root.parts[len(fixed) :] or ("**", "*")
    resolved = folder.resolve()
    if any(resolved in file.parents and _matches(pattern, file.relative_to(resolved).parts) for file in files):
        return True
    try:
        return any(_link_leads_to(link, rest, files) for link, rest in _links(folder, pattern))
    except (OSError, ValueError):  # an invalid pattern: `expand` reports it
        return False


def content_hash(files: list[Path]) -> str:
    """SHA-256 over the bytes of all files in order; independent of their names and times.

    Files are read, unless another process on this machine has hashed them for this one (`trust_hashes`).
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                name, stamp = os.path.abspath(file), _stamp(os.fstat(stream.fileno()))
                known = _trusted.get(name)
                if known is None or known[0] != stamp:
                    known = _hashed[name] = stamp, hashlib.file_digest(stream, "sha256").digest()
                digest.update(known[1])
        except OSError as error:
            raise unreadable(file, error) from None
    return digest.hexdigest()


def hashed_files() -> dict[str, FileHash]:
    """The files that this process has hashed, for `trust_hashes` of another one on the same machine."""
    return {**_trusted, **_hashed}


def trust_hashes(others: Mapping[str, FileHash]) -> None:
    """Takes over what another process has hashed a moment ago: files with the same stamp are not read again."""
    _trusted.update(others)


def _stamp(status: os.stat_result) -> FileStamp:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _looks_like_file(path: str) -> bool:
    has_suffix = path.lower().endswith((*_DATA_SUFFIXES, *_OTHER_SUFFIXES))
    return has_suffix or path.startswith(("/", "./", "../", "~")) or path.count("/") != 1


def _has_data_suffix(name: str) -> bool:
    """Whether a file is data by its name; archives count, so that they are reported instead of ignored."""
    stem = name.lower()
    for suffix in (*COMPRESSED_SUFFIXES, ".zip"):
        stem = stem.removesuffix(suffix)
    return stem.endswith(_DATA_SUFFIXES)


def _select(path: str, split: str) -> SelectedFiles:
    root = local_path(path)
    if root.is_dir():
        files, skipped = _files_of_folder(root)
        if not files:
            shown = f"only {', '.join(skipped[:5])}{' …' if len(skipped) > 5 else ''}" if skipped else "it is empty"
            raise DataError(path, f"the folder contains no data file (.jsonl, .json, .csv, .parquet, .arrow); {shown}",
                            "name the files, or a glob")  # fmt: skip
        return _selected(path, root, files, split, skipped)
    if root.exists():
        return SelectedFiles([root])
    if is_glob(path):
        fixed = Path(*takewhile(lambda part: not is_glob(part), root.parts))
        pattern = root.relative_to(fixed)
        hidden = any(part.startswith(".") for part in pattern.parts)
        found = sorted(file for file in fixed.glob(str(pattern)) if not file.is_dir())
        kept = [file for file in found if hidden or not _is_hidden(file.relative_to(fixed).parts)]
        for file in kept:
            _check_link(file)
        if kept:
            skipped = tuple(str(file.relative_to(fixed)) for file in found if file not in kept)
            return _selected(path, fixed, kept, split, skipped)
        raise DataError(path, "matches no file", "check the pattern; it is relative to the working directory")
    raise _no_such_file(path, root)


def _selected(path: str, root: Path, files: list[Path], split: str, skipped: tuple[str, ...]) -> SelectedFiles:
    names, is_dict = [file.relative_to(root).as_posix() for file in files], (root / "dataset_dict.json").is_file()
    indices, chosen = choose_split(path, names, split, is_dict)
    splits = sorted({name for name in (_split_of(name, is_dict) for name in names) if name is not None})
    return SelectedFiles([files[i] for i in indices], chosen, tuple(splits), skipped)


def _split_of(name: str, is_dict: bool) -> str | None:
    """The split of a file by its name, or by that of the nearest folder in its relative path."""
    parts = name.split("/")
    if is_dict and len(parts) > 1:
        return _SPLIT_WORDS.get(parts[0], parts[0])
    return next((split for part in reversed(parts) if (split := split_name(part)) is not None), None)


def _files_of_folder(root: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The data files in a folder, and the names of what is skipped."""
    files: list[Path] = []
    skipped: dict[str, None] = {}
    saved: dict[Path, list[str] | None] = {}
    for file in sorted(_walk(root)):
        parts = file.relative_to(root).parts
        if _is_hidden(parts):
            hidden = next(i for i in range(len(parts)) if _is_hidden(parts[i : i + 1]))
            skipped["/".join(parts[: hidden + 1])] = None
            continue
        folder = file.parent
        if folder not in saved:
            saved[folder] = _saved_files(folder)
        of_data_set = saved[folder]
        is_data = _has_data_suffix(file.name) if of_data_set is None else file.name in of_data_set
        if is_data and file.name not in _METADATA:
            _check_link(file)
            files.append(file)
        else:
            skipped["/".join(parts)] = None
    return files, tuple(skipped)


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files under a folder and under the folders that it links to; each folder under it once."""
    above = (*above, os.path.realpath(folder))
    for entry in folder.iterdir():
        if not entry.is_dir():
            yield entry
        elif not entry.is_symlink() or not _is_walked(f"{os.path.realpath(entry)}/", above):
            yield from _walk(entry, above)


def _is_walked(folder: str, above: Sequence[str]) -> bool:
    """Whether a folder that is linked to is inside the first of the folders above the link, or contains one of them."""
    return folder.startswith(f"{above[0]}/") or any(f"{other}/".startswith(folder) for other in above)


def _check_link(file: Path) -> None:
    """Raises DataError for a link to a file that does not exist."""
    if file.is_symlink() and not file.exists():
        what = f"is a link to {os.readlink(file)}, which does not exist"
        raise DataError(str(file), what, "restore that file, or remove the link")


def _saved_files(folder: Path) -> list[str] | None:
    """Names of the files of a data set that `datasets` saved to a folder; None if the folder is not one."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [str(part["filename"]) for part in state["_data_files"]]
    return None


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith((".", _OFFICE_LOCK)) or part in _NOT_DATA for part in parts)


def unreadable(file: Path, error: OSError) -> DataError:
    """The error for a file that cannot be opened."""
    return DataError(str(file), f"cannot be read ({error.strerror})", "check its permissions")


def _no_such_file(path: str, root: Path) -> DataError:
    _check_link(root)
    near = sorted(p.name for p in root.parent.glob("*") if _has_data_suffix(p.name)) if root.parent.is_dir() else []
    if guess := closest(root.name, near):
        remedy = f"did you mean {root.parent / guess}?"
    elif near:
        remedy = f"{root.parent} contains {', '.join(near[:5])}{' …' if len(near) > 5 else ''}"
    else:
        remedy = "check the path; it is relative to the working directory"
    return DataError(path, "no such file", remedy)


def _links(folder: Path, pattern: tuple[str, ...]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The symbolic links that match the beginning of a pattern, each with the rest of the pattern."""
    for end in range(1, len(pattern) + 1):
        found = folder.glob("/".join(pattern[:end]))
        yield from ((entry, pattern[end:]) for entry in found if entry.is_symlink())


def _link_leads_to(link: Path, pattern: tuple[str, ...], files: Sequence[Path]) -> bool:
    target = Path(os.path.realpath(link))
    return any(target in (file, *file.parents) and _matches(pattern, file.relative_to(target).parts) for file in files)


def _matches(pattern: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    if not pattern or not parts:
        return not pattern and not parts
    if pattern[0] == "**":
        return _matches(pattern[1:], parts) or _matches(pattern, parts[1:])
    return fnmatchcase(parts[0], pattern[0]) and _matches(pattern[1:], parts[1:])
