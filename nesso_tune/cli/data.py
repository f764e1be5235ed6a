"""`nesso-tune prepare` encodes and caches the data and prints a report; `nesso-tune preview` shows encoded rows."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nesso_tune.cli.options import JsonOption, RecipeArgument, SetOption, file_path, load_all
from nesso_tune.data.report import WholeRows, listed_keys
from nesso_tune.errors import RecipeError, cut_in_the_middle
from nesso_tune.logs import logger, print_lines, print_text
from nesso_tune.recipes import Recipe
from nesso_tune.recipes.builtin import is_run_output, local_path

if TYPE_CHECKING:
    from nesso_tune.data.prepare import PreparedData
    from nesso_tune.data.report import Anomaly, DataReport, PersonalData, SourceReport, TokenCounts


def prepare(
    recipe: RecipeArgument,
    settings: SetOption = [],  # noqa: B006 - typer copies it
    as_json: JsonOption = False,
    fetch_only: Annotated[
        bool, typer.Option("--fetch-only", help="Only download the base and the data, e.g. on a login node.")
    ] = False,
) -> None:
    """Download, read, encode and cache the data on the CPU, and report on it."""
    from nesso_tune.data.prepare import dropped_file, prepare_data
    from nesso_tune.data.sources import check_output
    from nesso_tune.hub import base_folder

    (loaded,) = load_all([recipe], settings)
    check_output(loaded)
    if fetch_only:
        _fetch(loaded, as_json)
        return
    data = prepare_data(loaded)
    base_folder(loaded.model.base, loaded.model.revision, weights=True)  # compute nodes may be offline
    page = _write_page(Path(loaded.output_dir), loaded, data)
    if as_json:
        print_text(json.dumps(data.report, indent=2, ensure_ascii=False) + "\n")
        return
    print_lines(*tables(data.summary))
    if data.summary.dropped:
        print_lines("", f"all dropped rows   {dropped_file(data)}")
    if page is not None:
        print_lines(f"report             {page}")


def _fetch(recipe: Recipe, as_json: bool) -> None:
    """Downloads the base with its weights and all sources, and reads none of them."""
    from nesso_tune.data.privacy import Privacy
    from nesso_tune.data.sources import fetch
    from nesso_tune.hub import base_folder

    if as_json:
        raise RecipeError("--json", "has no effect with --fetch-only, which makes no report", "remove one of the two")
    base = recipe.model.base
    if is_run_output(base) and not local_path(base).exists():
        print_lines(f"base    {base}: an earlier recipe creates it")
    else:
        folder = base_folder(base, recipe.model.revision, weights=not recipe.model.random_init)
        print_lines(f"base    {base}: {folder}")
    privacy = Privacy(recipe.data)
    names = (*privacy.source_names(), *privacy.source_names(validation=True))
    for name, source in zip(names, (*recipe.data.sources, *recipe.data.validation_sources), strict=True):
        fetch(source)
        print_lines(f"source  {name}: complete")


def tables(report: DataReport) -> list[str]:
    """The data report as lines of text."""
    dropped = report.dropped
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items()) or "none"
    lines = [
        f"rows      {report.rows_read:,} read, {report.rows_kept:,} kept; dropped: {reasons}",
        *(f"          {reason}, e.g. {where}" for reason, where in report.examples_of_dropped.items()),
        f"lengths   rows that fit: {_whole_rows(report.whole_rows)}",
        f"packing   {report.packing.rows:,} rows per epoch, {report.packing.fill:.1%} full",
        f"cache     {'found' if report.cache_hit else 'made'}, fingerprint {report.fingerprint}",
        *(f"anomaly   {_anomaly(name, anomaly)}" for name, anomaly in report.anomalies.items()),
        *(
            f"not read  {cut_in_the_middle(part.alias or part.path, 60)}: {listed_keys(part.unread)}"
            for part in report.sources
            if part.unread
        ),
        *(f"personal  {_personal_data(kind, found)}" for kind, found in (report.personal_data or {}).items()),
        *(f"warning   {warning}" for warning in report.warnings),
        "",
        f"{'':<28}{'rows':>12}{'tokens':>14}{'supervised':>14}{'share':>9}",
    ]
    groups: list[tuple[str, TokenCounts | SourceReport]] = [
        *((f"language {code}", counts) for code, counts in report.languages.items()),
        *((f"source {cut_in_the_middle(source.alias or source.path, 20)}", source) for source in report.sources),
        ("validation", report.validation),
        ("train, per epoch", report.train),
    ]
    lines += [
        f"{name:<28}{counts.rows:>12,}{counts.tokens:>14,}{counts.supervised_tokens:>14,}"
        f"{counts.supervised_tokens / max(1, counts.tokens):>9.1%}"
        for name, counts in groups
    ]
    lines += [
        f"  {cut_in_the_middle(group.name, 26):<26}{group.rows:>12,}{group.tokens:>14,}{group.supervised_tokens:>14,}"
        f"  {group.share_of_tokens:.1%} of its tokens"
        for group in report.mixture
    ]
    return lines


def _whole_rows(whole: Mapping[int, WholeRows]) -> str:
    """The share of rows that fit into each sequence length, e.g. `81.2% into 512, all into 1,024 tokens`."""
    total = max(of.rows for of in whole.values())
    shown = {f"{limit:,}": of.rows / total for limit, of in whole.items() if of.rows}
    shares = [f"{'all' if share == 1 else f'{min(share, 0.999):.1%}'} into {limit}" for limit, share in shown.items()]
    return f"{', '.join(shares)} tokens"


def _personal_data(kind: str, found: PersonalData) -> str:
    rows = "1 row" if found.rows == 1 else f"{found.rows:,} rows"
    return f"{found.values:,} {kind.replace('_', ' ')} in {rows}, e.g. {found.example}"


def _anomaly(name: str, anomaly: Anomaly) -> str:
    return f"{anomaly.rows:,} rows: {name.replace('_', ' ')}, e.g. {anomaly.example}"


def _write_page(folder: Path, recipe: Recipe, data: PreparedData) -> Path | None:
    """Writes data_report.html into the run directory; None if it is not writable."""
    from nesso_tune.reports.data_report import write_data_report

    try:
        return write_data_report(folder, recipe, data)
    except OSError as error:
        logger.warning(f"no data_report.html: {folder} cannot be written ({error.strerror})")
        return None


def preview(
    recipe: RecipeArgument,
    settings: SetOption = [],  # noqa: B006 - typer copies it
    count: Annotated[int, typer.Option("-n", "--rows", min=1, help="Number of rows.")] = 2,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=file_path, help="Write an HTML page with all tokens instead.")
    ] = None,
) -> None:
    """Show rows as the model receives them. Marks supervised tokens, control tokens and document boundaries."""
    from nesso_tune.reports.preview import preview as load_preview

    (loaded,) = load_all([recipe], settings)
    view = load_preview(loaded, count)
    if html is not None:
        from nesso_tune.reports.html import write_page

        write_page(view.to_html(), html)
        print_lines(f"{html}: {len(view.rows)} rows; open it in a browser")
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print_text(view.to_text(shutil.get_terminal_size().columns, colour) + "\n", coloured=colour)
    print_lines("", f"next: nesso-tune train {shlex.quote(recipe)} --smoke")
