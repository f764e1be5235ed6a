"""`nesso-tune preview`: real rows as the model will see them."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from nesso_tune.cli.options import RecipeArgument, SetOption, file_path, load_all
from nesso_tune.errors import RunEnvironmentError
from nesso_tune.terminal import print_lines, print_text


def preview(
    recipe: RecipeArgument,
    settings: SetOption = [],  # noqa: B006 - typer copies it
    count: Annotated[int, typer.Option("-n", "--rows", min=1, help="Rows that are shown.")] = 2,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=file_path, help="Write a page with every token instead.")
    ] = None,
) -> None:
    """Show real rows as the model will see them: what is learned, control tokens, borders in the pack."""
    from nesso_tune.publish.preview import preview as of

    (loaded,) = load_all([recipe], settings)
    view = of(loaded, count)
    if html is not None:
        if html.is_dir():
            raise RunEnvironmentError(str(html), "is a folder", "name a file, e.g. page.html")
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(view.to_html(), encoding="utf-8")
        print_lines(f"{html}: {len(view.rows)} rows; it opens in any browser, offline")
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print_text(view.to_text(shutil.get_terminal_size().columns, colour) + "\n", coloured=colour)
    print_lines("", f"next: nesso-tune train {shlex.quote(recipe)} --smoke")
