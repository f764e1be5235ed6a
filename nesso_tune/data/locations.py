"""Locations of rows (`FILE:LINE` or `FILE row N`), and their translation to current file names.

The cache is keyed by content, so data may have been prepared when its files had other names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nesso_tune.data.files import expand
from nesso_tune.data.sources import has_files, source_files
from nesso_tune.files import atomic_replace
from nesso_tune.recipes.sections import CleanSection, Source

FileNames = Mapping[str, str]  # old name -> current name
ROW_NUMBER = re.compile(r"(?::| row )\d+")  # follows the file name in a location
_BEFORE_FILE = re.compile(r": of |: |^of ")  # what may precede the file name


def file_names(sources: Sequence[Source], clean: CleanSection) -> list[str]:
    """Names of all files of the sources and of the decontamination texts, in the order in which they are read."""
    names = [
        name
        for source in sources
        for name in ([file.name for file in source_files(source)] if has_files(source) else [source.path])
    ]
    evaluations = clean.decontaminate.files if clean.decontaminate else ()
    return [*names, *(str(file) for path in evaluations for file in expand(path))]


def renamed_files(note: Mapping[str, Any], files: Sequence[str]) -> FileNames:
    """The files whose names changed since they were prepared. Raises ValueError if their number changed."""
    return {old: new for old, new in zip(note["files"], files, strict=True) if old != new}


def with_current_names(note: Mapping[str, Any], files: Sequence[str]) -> Mapping[str, Any]:
    """The note of prepared data, with the current file names in every location and location prefix."""
    names = renamed_files(note, files)
    if not names:
        return note
    prefixes = [rename_locations(f"{prefix}0", names)[:-1] for prefix in note["documents"]["prefixes"]]
    report = _rename_all(note["report"], names)
    return {**note, "report": report, "documents": {**note["documents"], "prefixes": prefixes}}


def copy_with_current_names(dropped: Path, names: FileNames, target: Path) -> None:
    """Copies a list of dropped rows (JSON Lines), with the current file names in its locations."""
    with (
        atomic_replace(target, durable=False) as staging,
        dropped.open(encoding="utf-8") as lines,
        staging.open("w", encoding="utf-8", errors="backslashreplace") as out,
    ):
        out.writelines(json.dumps(_rename_all(json.loads(line), names), ensure_ascii=False) + "\n" for line in lines)


def rename_locations(text: str, names: FileNames) -> str:
    """A text with the file names of its locations replaced."""
    starts = [0, *(before.end() for before in _BEFORE_FILE.finditer(text))]
    out, done = "", 0
    for number in ROW_NUMBER.finditer(text):
        for start in starts:
            if done <= start <= number.start() and (new := names.get(text[start : number.start()])) is not None:
                out, done = f"{out}{text[done:start]}{new}", number.start()
                break
    return out + text[done:]


def _rename_all(value: Any, names: FileNames) -> Any:
    if isinstance(value, dict):
        return {key: _rename_all(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_rename_all(item, names) for item in value]
    return rename_locations(value, names) if isinstance(value, str) else value
