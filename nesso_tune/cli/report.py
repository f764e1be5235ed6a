"""`nesso-tune report` writes the report of a run or compares runs; `nesso-tune status` lists the runs of a folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.logs import aligned, print_lines, print_text
from nesso_tune.recipes.builtin import flag_path
from nesso_tune.runs.checkpoint import MANIFEST
from nesso_tune.runs.layout import COMPARISON


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories, or one folder of them.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="File of a comparison [comparison.html] or list [FOLDER/index.html]."),
    ] = None,
    follow: Annotated[
        float | None, typer.Option("--follow", min=1, metavar="SECONDS", help="Write it again at this interval.")
    ] = None,
) -> None:
    """Write the report of a run, a page that compares several runs, or a page that lists the runs of a folder."""
    folders = [Path(flag_path(run)) for run in runs]
    file = None if output is None else Path(flag_path(output))
    while True:
        lines = _write_pages(folders, file)
        if follow is None:
            print_lines(*lines)
            return
        time.sleep(follow)


def _write_pages(folders: list[Path], file: Path | None) -> list[str]:
    """Writes the page of a command; returns what is printed about it."""
    from nesso_tune.reports.comparison import write_comparison
    from nesso_tune.reports.run_index import write_index
    from nesso_tune.reports.run_report import write_report

    if len(folders) > 1:
        file = file or Path(COMPARISON)
        return [*write_comparison(folders, file).lines(), f"report  {file}"]
    if not (folders[0] / MANIFEST).is_file():
        return [f"report  {write_index(folders[0], file)}"]
    if file is not None:
        raise RunEnvironmentError("-o", "the report of one run is report.html in its folder", "remove -o")
    return [f"report  {write_report(folders[0])}"]


def status(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A run directory, or a folder of them.")] = "outputs",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the runs below a folder: state, step, loss, speed, time left and age of the last line."""
    from nesso_tune.runs.run_status import find_runs, summarize_run

    root = Path(flag_path(folder))
    found = [summarize_run(run, root) for run in find_runs(root)]
    if not found:
        raise RunEnvironmentError(str(root), "contains no run directory", "name the folder of your runs")
    if as_json:
        print_text(json.dumps([run.to_dict() for run in found], indent=2, ensure_ascii=False) + "\n")
        return
    header = ("run", "state", "step", "loss", "tokens/s", "left", "last line")
    rows = [header, *(run.cells() for run in found)]
    print_lines(*aligned(rows))
