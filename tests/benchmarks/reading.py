"""Memory and speed of reading the same rows from files of different types. Run by hand:

    python -m tests.benchmarks.reading --data sft.jsonl [--gigabytes 2] [--folder /tmp] [--kinds lines array csv gz]

The rows of the data are repeated, with a number in each, up to the size. Each file is read in a process of its own:
every block is made and parsed, as in preparation with one process. A JSON line each: rows, seconds, peak resident
memory. The files are deleted afterwards.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from tests.benchmarks.memory import resident

NAMES = {"lines": "rows.jsonl", "array": "rows.json", "wrapped": "wrapped.json", "csv": "rows.csv", "gz": "rows.gz"}
AROUND = {"array": ("[", ",", "]"), "wrapped": ('{"data": [', ",", "]}")}  # before, between and after rows


def rows(data: Path, size: int) -> Iterator[dict[str, Any]]:
    """The rows of a file again and again, with a number in each, until their text has this size."""
    first = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    written, number = 0, 0
    while written < size:
        for row in first:
            number += 1
            numbered = {**row, "number": number}
            written += len(json.dumps(numbered, ensure_ascii=False))
            yield numbered


def write(kind: str, file: Path, data: Path, size: int) -> None:
    """Writes the rows as one kind of file."""
    made = rows(data, size)
    with gzip.open(file, "wt", 1, "utf-8") if kind == "gz" else file.open("w", encoding="utf-8", newline="") as out:
        if kind == "csv":
            _write_csv(out, made)
            return
        before, between, after = AROUND.get(kind, ("", "\n", "\n"))
        out.write(before)
        for i, row in enumerate(made):
            out.write((between if i else "") + json.dumps(row, ensure_ascii=False))
        out.write(after)


def _write_csv(out: IO[str], made: Iterator[dict[str, Any]]) -> None:
    writer = None
    for row in made:
        if writer is None:
            writer = csv.DictWriter(out, list(row), delimiter=";", restval="", extrasaction="ignore")
            writer.writeheader()
        writer.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()})


def read(file: Path) -> dict[str, Any]:
    """Reads a file in this process."""
    from nesso_tune.data.sources import source_blocks
    from nesso_tune.recipes.sections import Source

    before, started, count = resident(peak=False), time.perf_counter(), 0
    for block in source_blocks(Source(path=str(file))):
        count += sum(1 for _ in block.numbered_records())
    seconds, size = time.perf_counter() - started, file.stat().st_size
    return {
        "file": file.name, "mb": round(size / 1e6), "rows": count, "seconds": round(seconds, 1),
        "mb_per_s": round(size / 1e6 / seconds, 1), "peak_mb": round(resident(peak=True) / 1e6, 1),
        "before_mb": round(before / 1e6, 1),
    }  # fmt: skip


def main() -> None:
    """Writes, reads and deletes each file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--kinds", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.read is not None:
        print(json.dumps(read(said.read)))
        return
    for kind in said.kinds:
        with TemporaryDirectory(dir=said.folder) as folder:
            file = Path(folder) / NAMES[kind]
            write(kind, file, said.data, int(said.gigabytes * 1e9))
            subprocess.run([sys.executable, "-m", "tests.benchmarks.reading", "--read", str(file)], check=True)


if __name__ == "__main__":
    main()
