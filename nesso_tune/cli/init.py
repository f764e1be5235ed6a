"""`nesso-tune init`: writes a first recipe from a base and data files; `--list` shows the shipped recipes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from nesso_tune.chat.files import base_folder, is_hub_id
from nesso_tune.data.detect import Detected, detect
from nesso_tune.data.files import looks_like_data
from nesso_tune.draft import draft, languages_of, own_template, usable_note
from nesso_tune.errors import DataError, ModelError, RecipeError, RunEnvironmentError
from nesso_tune.recipes.bases import TABLE
from nesso_tune.recipes.json_schema import FILE, recipe_schema
from nesso_tune.recipes.load import load_recipe
from nesso_tune.recipes.names import closest
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import ModelSection
from nesso_tune.recipes.shape import ModelShape, find_shape
from nesso_tune.recipes.shipped import catalogue, local_path

DEFAULT_BASE = "mii-llm/zagreus-0.4B-ita"


def init(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]", help="Name of the recipe: NAME.yaml is written.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="ID|FOLDER", help="Base model; for DPO the result of SFT.")
    ] = None,
    data: Annotated[
        list[str], typer.Option(metavar="FILE...", help="Data files, folders, globs or hub ids; several may follow.")
    ] = [],  # noqa: B006 - typer copies it
    method: Annotated[str | None, typer.Option(metavar="sft|dpo", help="Told by the data if it is left out.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the shipped recipes with their commands.")] = False,
) -> None:
    """Write a first recipe for your base and your data, or list the shipped ones."""
    if listed:
        print("\n\n".join(_entry_lines()))
        return
    positional = names or []
    # `--data a.jsonl b.jsonl`: what looks like data is data
    data = [*data, *(word for word in positional if looks_like_data(word))]
    own = [word for word in positional if not looks_like_data(word)]
    if len(own) > 1:
        raise RecipeError("init", f"takes one NAME, not {', '.join(own)}", "name data files with --data")
    if not data:
        raise DataError("init", "no data is named", "add --data FILE (jsonl, json, parquet, a folder or a hub id)")
    found = [detect(path) for path in dict.fromkeys(data)]
    kind = _method(method, found)
    file = Path(own[0] if own else kind)
    file = file if file.suffix in (".yaml", ".yml") else file.with_name(f"{file.name}.yaml")
    if file.exists():
        raise RunEnvironmentError(str(file), "is there already", "give another NAME, or remove it")
    base = base or _default_base(kind)
    parent = _recipe_that_makes(base, file.parent)
    shape, chat = _look_at(base) if parent is None else (find_shape(parent[1].model), None)
    text = draft(file.stem, str(file), base, kind, found, shape, chat)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    schema = json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
    (file.parent / FILE).write_text(schema, encoding="utf-8")
    print("\n".join(_summary(file, kind, base, shape, found)))
    if parent is not None:
        print(f"later: nesso-tune train {parent[0]} {file}, one after the other")


def _method(said: str | None, found: Sequence[Detected]) -> str:
    """The method that all data is for.

    Raises:
        RecipeError, DataError: if the data is of another kind, or of both.
    """
    if said not in (None, "sft", "dpo"):
        guess = closest(str(said), ("sft", "dpo"))
        raise RecipeError("--method", f"`{said}` is not offered", f"did you mean `{guess}`?" if guess else "sft or dpo")
    kinds = {"sft": [d.path for d in found if d.method == "sft"], "dpo": [d.path for d in found if d.method == "dpo"]}
    if kinds["sft"] and kinds["dpo"]:
        raise DataError(
            ", ".join(kinds["dpo"]), f"holds preference pairs, {', '.join(kinds['sft'])} conversations",
            "make a recipe for each: first one of SFT, then one of DPO from its result",
        )  # fmt: skip
    told = "sft" if kinds["sft"] else "dpo"
    if said is not None and said != told:
        what, other = ("conversations", "dpo") if told == "sft" else ("preference pairs", "sft")
        needs = "DPO needs a chosen and a rejected answer" if other == "dpo" else "SFT learns from conversations"
        raise DataError(", ".join(kinds[told]), f"holds {what}, but {needs}", f"use --method {told}, or other data")
    return told


def _default_base(method: str) -> str:
    if method == "dpo":
        raise ModelError(
            "init", "DPO starts from the result of SFT, and none is named",
            "add --base outputs/NAME/final, where NAME is your SFT recipe",
        )  # fmt: skip
    print(f"no --base: {DEFAULT_BASE}", file=sys.stderr)
    return DEFAULT_BASE


def _look_at(base: str) -> tuple[ModelShape | None, str | None]:
    """The shape of a base, if it is known, and the name of a template for it, unless it brings its own.

    Raises:
        ModelError: for a path that is no model folder.
    """
    folder = local_path(base)
    shape = find_shape(ModelSection(base=base))
    if folder.exists() or not (is_hub_id(base) or base.endswith("/final")):
        folder = base_folder(base)
        if not (folder / "config.json").is_file():
            raise ModelError(f"--base {base}", "has no config.json", "name a folder that holds a whole model")
        config = folder / "tokenizer_config.json"
        if config.is_file() and own_template(json.loads(config.read_text(encoding="utf-8"))):
            return shape, None
    elif base.endswith("/final"):
        return shape, None  # a run will make it
    elif shape is None:
        guess = closest(base, TABLE, 0.8)
        near = f"; did you mean {guess}?" if guess else ""
        print(f"{base}: not fetched yet and not in the table of known bases: its size is open{near}", file=sys.stderr)
    return shape, "llama3" if base.startswith("meta-llama/Llama-3") else "chatml"


def _recipe_that_makes(base: str, folder: Path) -> tuple[Path, Recipe] | None:
    """The recipe beside the new one whose result the base is, if the base is not there yet."""
    if not base.endswith("/final") or local_path(base).exists() or not folder.is_dir():
        return None
    for file in sorted(folder.glob("*.yaml")):
        try:
            recipe = load_recipe(file)
        except RecipeError:  # not a recipe, or one that is being written
            continue
        if (Path(recipe.output_dir) / "final").resolve() == Path(base).resolve():
            return file, recipe
    return None


def _summary(file: Path, method: str, base: str, shape: ModelShape | None, found: Sequence[Detected]) -> list[str]:
    size = f" ({shape.parameters / 1e6:,.1f} M parameters)" if shape else ""
    lines = [f"{file}: {method} from {base}{size}"]
    for part in found:
        rows = f"{part.rows:,} rows, " if part.rows is not None else ""
        tools = f", {part.tools:.0%} with tools" if part.tools else ""
        columns = "".join(f", {key} {value}" for key, value in part.fields.items())
        lines.append(f"  {part.path}: {rows}format {part.format}{columns}; {languages_of(part)}{tools}")
        lines += [f"  note: {note}" for note in [usable_note(part)] if note]
    return [*lines, f"  {file.parent / FILE}: for editors, which then complete and check the recipe",
            f"next: nesso-tune check {file}"]  # fmt: skip


def _entry_lines() -> list[str]:
    return [
        f"{entry.name}\n  {entry.title}\n  hardware  {entry.hardware}\n  cost      {entry.cost}\n"
        f"  command   {entry.command}"
        for entry in catalogue()
    ]
