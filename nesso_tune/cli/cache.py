"""`nesso-tune cache` lists what the cache holds, and removes what no run needs."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from nesso_tune.cache import cache_root
from nesso_tune.cli.options import JsonOption
from nesso_tune.errors import RecipeError
from nesso_tune.files import format_bytes
from nesso_tune.logs import print_lines, print_text
from nesso_tune.runs.cache_use import CachedResult, cached_results, remove_result, unneeded

OLD_DAYS = 30.0


def cache(
    action: Annotated[str, typer.Argument(metavar="list|prune", help="Show what the cache holds, or remove of it.")],
    older_than: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help=f"prune: days without use [default: {OLD_DAYS:g}].")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="prune: remove; without it, only say what.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the results in the cache with the runs that use them, or remove those that no run needs."""
    results = cached_results()
    if _action(action) == "list":
        if older_than is not None or yes:
            raise RecipeError("cache list", "removes nothing", "use `nesso-tune cache prune`")
        _show(results, as_json)
        return
    chosen = unneeded(results, OLD_DAYS if older_than is None else older_than)
    if not yes:
        _show(chosen, as_json)
        if chosen and not as_json:
            print_lines("nothing is removed yet: add --yes")
        return
    removed = [result for result in chosen if remove_result(result)]
    _show(removed, as_json)
    if busy := len(chosen) - len(removed):
        print_lines(f"{busy} in use, not removed")


def _action(text: str) -> Literal["list", "prune"]:
    if text == "list":
        return "list"
    if text == "prune":
        return "prune"
    raise RecipeError("cache", f"`{text}` is not an action", "use list or prune")


def _show(results: list[CachedResult], as_json: bool) -> None:
    if as_json:
        rows = [
            {"kind": result.folder.parent.name, "key": result.folder.name, "bytes": result.size,
             "used": round(result.used), "runs": [str(run) for run in result.runs]} for result in results
        ]  # fmt: skip
        print_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        return
    for result in results:
        print_lines(
            f"{format_bytes(result.size):>8}  {result.kind:<28}{result.folder.name:<26}{result.days():>5.0f} days  "
            f"{', '.join(str(run) for run in result.runs) or 'no run'}"
        )
    total = format_bytes(sum(result.size for result in results))
    print_lines(f"{total} in {len(results)} results of {cache_root()}")
