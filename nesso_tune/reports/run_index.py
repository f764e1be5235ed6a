"""`index.html`: all runs below a folder on one page, each with a link to its report."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.logs import logger
from nesso_tune.reports.html import render, write_page
from nesso_tune.reports.run_report import write_report
from nesso_tune.runs.layout import COMPARISON, INDEX, METRICS, REPORT, STATUS
from nesso_tune.runs.run_status import RunSummary, find_runs, format_duration, summarize_run

ENDED_BADLY = ("failed", "refused", "gone")


@dataclass(frozen=True)
class IndexRow:
    """A run on the page.

    Attributes:
        summary: its state in figures.
        link: URL of its report, relative to the page; None if there is no report.
    """

    summary: RunSummary
    link: str | None

    @property
    def ended_badly(self) -> bool:
        """Whether somebody should look at it."""
        return self.summary.state in ENDED_BADLY

    @property
    def started(self) -> str:
        """When it was last started, as local time."""
        started = self.summary.started
        return "" if started is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(started))

    @property
    def age(self) -> str:
        """Age of the last line of its metrics when the page was written."""
        return format_duration(self.summary.seconds_since_last_line)


def write_index(folder: Path, output: Path | None = None) -> Path:
    """Writes a page that lists the runs below a folder, and the reports that are missing or older than their run.

    Args:
        folder: contains runs, and is none itself.
        output: file of the page; by default `index.html` in the folder.

    Raises:
        RunEnvironmentError: if the folder contains no run.
    """
    runs = find_runs(folder)
    if not runs:
        what = "is not a run directory and contains none" if folder.is_dir() else "is not a folder"
        raise RunEnvironmentError(str(folder), what, "name the output_dir of a run, or a folder of runs")
    page = folder / INDEX if output is None else output
    rows = [IndexRow(summarize_run(run, folder), _link(_fresh_report(run), page)) for run in runs]
    comparison = folder / COMPARISON  # of a sweep
    content = render(
        "run_index.html.j2",
        name=folder.resolve().name,
        rows=rows,
        comparison=_link(comparison if comparison.is_file() else None, page),
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
    write_page(content, page)
    return page


def _fresh_report(run: Path) -> Path | None:
    """The report of a run, written again if it is older than its metrics or status; None if it cannot be written."""
    report = run / REPORT
    sources = [file.stat().st_mtime for file in (run / METRICS, run / STATUS) if file.is_file()]
    if report.is_file() and report.stat().st_mtime >= max(sources, default=0.0):
        return report
    try:
        return write_report(run)
    except (OSError, RunEnvironmentError) as error:  # e.g. a run of somebody else, or a damaged one
        why = error.strerror if isinstance(error, OSError) else str(error)
        logger.warning(f"{report} is not written ({why})")
        return report if report.is_file() else None


def _link(file: Path | None, page: Path) -> str | None:
    """Relative URL of a file on a page."""
    if file is None:
        return None
    return quote(Path(os.path.relpath(file.resolve(), page.resolve().parent)).as_posix())
