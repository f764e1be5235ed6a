"""Jinja environment of the HTML reports. Text is escaped by default and invisible characters are made visible."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.files import atomic_replace

PLOTLY = "<!-- plotly.js -->"  # replaced in the file: it is too large to be worth rendering


def render(template: str, **values: Any) -> str:
    """Renders a template of `reports/templates`.

    Every string passes through `escape_invisible` and HTML escaping, so values need no preparation.
    """
    return _environment.get_template(template).render(values)


def write_page(page: str, file: Path) -> None:
    """Writes a page in a folder that need not exist, with Plotly in it if it has charts: it opens without a network.

    Raises:
        RunEnvironmentError: if the file is a folder.
    """
    if file.is_dir():
        raise RunEnvironmentError(str(file), "is a folder", "name a file, e.g. page.html")
    file.parent.mkdir(parents=True, exist_ok=True)
    before, found, after = page.partition(PLOTLY)
    library = plotly_library() if found else b""
    with atomic_replace(file, durable=False) as staging, staging.open("wb") as stream:
        stream.writelines((before.encode(), library, after.encode()))


def plotly_library() -> bytes:
    """Plotly's code, as it stands in a page."""
    code = files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    # The label of a button that reports do not have: a search of the page for private words must not find it
    return code.replace(b'"PRIVATE"', b'"Private"')


def escape_invisible(text: str) -> str:
    """Replaces non-printable characters by Python escapes, except line breaks.

    Stricter than `logs.visible`: a reader of training data also needs to see no-break spaces.
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def percent(share: float) -> str:
    """A fraction as a percentage; only 0 reads as `0.0%` and only 1 as `100.0%`."""
    if 0 < share < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


def words(name: str) -> str:
    """A snake_case name as words."""
    return name.replace("_", " ")


def _finalize(value: Any) -> Any:
    """Applied by Jinja to every printed expression, before escaping."""
    is_markup = hasattr(value, "__html__")  # output of a macro
    return escape_invisible(value) if isinstance(value, str) and not is_markup else value


def _build_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nesso_tune.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(percent=percent, thousands="{:,}".format, fixed="{:.1f}".format)
    return environment


_environment = _build_environment()
