"""Names of files in what is cached: data is its content, so it may have been prepared under other names than today's.

A place is `FILE:LINE`, `FILE row N`, or such a one with words around it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nesso_tune.data.files import expand
from nesso_tune.data.sources import is_here
from nesso_tune.recipes.data import CleanSection, Source

Names = Mapping[str, str]  # of files, as they were called and as they are called
NUMBER = re.compile(r"(?::| row )\d+")  # ends the name of a file in a place
BEFORE = re.compile(r": of |: |^of ")  # what may stand before it


def file_names(sources: Sequence[Source], clean: CleanSection) -> list[str]:
    """What the files of sources and of evaluation texts are called, in the order in which they are read."""
    names = [
        name for source in sources for name in (map(str, expand(source.path)) if is_here(source) else [source.path])
    ]
    evaluations = clean.decontaminate.files if clean.decontaminate else ()
    return [*names, *(str(file) for path in evaluations for file in expand(path))]


def renamed(text: str, names: Names) -> str:
    """A text with the names of files in its places replaced."""
    starts = [0, *(before.end() for before in BEFORE.finditer(text))]
    out, done = "", 0
    for number in NUMBER.finditer(text):
        for start in starts:
            if done <= start <= number.start() and (new := names.get(text[start : number.start()])) is not None:
                out, done = f"{out}{text[done:start]}{new}", number.start()
                break
    return out + text[done:]


def other_names(note: Mapping[str, Any], files: Sequence[str]) -> Names:
    """Which files of prepared data are called otherwise today. Raises ValueError if their number is another."""
    return {old: new for old, new in zip(note["files"], files, strict=True) if old != new}


def renamed_note(note: Mapping[str, Any], files: Sequence[str]) -> Mapping[str, Any]:
    """What is noted of prepared data, with every place in it and every prefix of places under today's names."""
    names = other_names(note, files)
    if not names:
        return note
    prefixes = [renamed(f"{prefix}0", names)[:-1] for prefix in note["documents"]["prefixes"]]
    report = _each(note["report"], names)
    return {**note, "report": report, "documents": {**note["documents"], "prefixes": prefixes}}


def _each(value: Any, names: Names) -> Any:
    if isinstance(value, dict):
        return {key: _each(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_each(item, names) for item in value]
    return renamed(value, names) if isinstance(value, str) else value


def write_renamed(lines: Path, names: Names, file: Path) -> None:
    """Copies a list of dropped rows, with their places under today's names."""
    staging = file.with_name(f"{file.name}.partial")
    with lines.open(encoding="utf-8") as listed, staging.open("w", encoding="utf-8", errors="backslashreplace") as out:
        out.writelines(json.dumps(_each(json.loads(line), names), ensure_ascii=False) + "\n" for line in listed)
    staging.replace(file)
