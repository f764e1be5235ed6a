"""`nesso-tune prepare`: fetches base and data, encodes and caches them, prints the data report."""

from __future__ import annotations

import json
from typing import Any

from nesso_tune.cli.options import JsonOption, RecipeArgument, SetOption, load_all


def prepare(
    recipe: RecipeArgument,
    settings: SetOption = [],  # noqa: B006 - typer copies it
    as_json: JsonOption = False,
) -> None:
    """Fetch, read, encode and cache the data, on the CPU, and report what is in it."""
    from nesso_tune.chat.files import base_folder
    from nesso_tune.data.prepare import prepare_data

    (loaded,) = load_all([recipe], settings)
    data = prepare_data(loaded)
    base_folder(loaded.model.base, loaded.model.revision, weights=True)  # so that compute nodes may be offline
    print(json.dumps(data.report, indent=2, ensure_ascii=False) if as_json else "\n".join(tables(data.report)))


def tables(report: dict[str, Any]) -> list[str]:
    """The report as lines for a terminal."""
    dropped = report["dropped"]
    lost = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items()) or "none"
    lines = [
        f"rows      {report['rows_read']:,} read, {report['rows_kept']:,} kept; dropped: {lost}",
        f"packing   {report['packing']['rows']:,} rows an epoch, {report['packing']['fill']:.1%} full",
        f"cache     {'found' if report['cache_hit'] else 'made'}, fingerprint {report['fingerprint']}",
        *(f"          {reason}, e.g. {where}" for reason, where in report["examples_of_dropped"].items()),
        "",
        f"{'':<28}{'rows':>12}{'tokens':>14}{'supervised':>14}",
    ]
    groups = [
        *((f"language {code}", counts) for code, counts in report["languages"].items()),
        *((f"source {_short(counts['path'])}", counts) for counts in report["sources"]),
        ("an epoch trains on", report["train"]),
        ("held out", report["validation"]),
    ]
    lines += [
        f"{name:<28}{counts['rows']:>12,}{counts['tokens']:>14,}{counts['supervised_tokens']:>14,}"
        for name, counts in groups
    ]
    return lines


def _short(path: str) -> str:
    return path if len(path) <= 18 else f"…{path[-17:]}"
