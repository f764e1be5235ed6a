"""Where the recipes and templates that come with the package are found."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path

from nesso_tune.recipes.paths import flag_path

PACKAGE = Path(__file__).resolve().parent.parent
BUNDLED_TOKENS = 2


def shipped(kind: str) -> Path:
    """The folder of shipped `recipes` or `data_templates`: inside an installed package, beside it in a checkout."""
    inside = PACKAGE / "shipped" / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


@cache
def template_names(kind: str) -> tuple[str, ...]:
    """The names of the shipped files of data_templates/KIND/."""
    return tuple(sorted(file.stem for file in (shipped("data_templates") / kind).glob("*.yaml")))


def bundled_base() -> str:
    """The quickstart's base, whose small tokenizer stands in for one that is not at hand.

    It makes about twice as many tokens of a text as one with a large vocabulary: `BUNDLED_TOKENS`.
    """
    return str(shipped("recipes") / "quickstart" / "base")


def local_path(text: str) -> Path:
    """The path that a recipe means: relative to the working directory, or, for `recipes/…`, a file that is shipped.

    So the quickstart runs from any folder, installed or not.
    """
    path = Path(text)
    inside = shipped("recipes") / path.relative_to("recipes") if path.parts[:1] == ("recipes",) else None
    return inside if inside is not None and not path.exists() and inside.exists() else path


def is_result(base: str) -> bool:
    """Whether a base is named as what a run makes: `OUTPUT_DIR/final`, which may not exist yet."""
    return base.rstrip("/").endswith("/final")


def find_recipe(name: str | Path) -> Path:
    """The file a recipe name means: a path as it is, or a shipped recipe by its name (`quickstart/sft`)."""
    path = Path(flag_path(str(name)))
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return local_path(str(path))
    return next((p for p in (shipped("recipes") / f"{name}.yaml",) if p.is_file()), path)


@dataclass(frozen=True)
class Entry:
    """What the head of a shipped recipe says: its title, the command that runs it, the hardware, and what it costs."""

    name: str
    title: str
    command: str
    hardware: str
    cost: str


def catalogue() -> list[Entry]:
    """All shipped recipes, by what their first comment says."""
    entries = []
    for name in shipped_recipes():
        text = (shipped("recipes") / f"{name}.yaml").read_text(encoding="utf-8")
        head = [line[1:].rstrip() for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
        said = [line.strip() for line in head if not line.strip().startswith("yaml-language-server")]
        command = next(line.strip() for line in head if line.startswith("   "))
        facts = dict(line.split(": ", 1) for line in said if line.startswith(("Hardware: ", "Cost: ")))
        entries.append(Entry(name, said[0].rstrip("."), command, facts["Hardware"], facts["Cost"]))
    return entries


def shipped_recipes() -> list[str]:
    """The names of all shipped recipes."""
    root = shipped("recipes")
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))
