"""Where the recipes and templates that come with the package are found."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def shipped(kind: str) -> Path:
    """The folder of shipped `recipes` or `data_templates`: inside an installed package, beside it in a checkout."""
    inside = PACKAGE / "shipped" / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def find_recipe(name: str | Path) -> Path:
    """The file a recipe name means: a path as it is, or a shipped recipe by its name (`quickstart/sft`)."""
    path = Path(name)
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return path
    return next((p for p in (shipped("recipes") / f"{name}.yaml",) if p.is_file()), path)


def shipped_recipes() -> list[str]:
    """The names of all shipped recipes."""
    root = shipped("recipes")
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))
