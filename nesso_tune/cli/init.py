"""`nesso-tune init`: writes a first recipe from a base and data files; `--list` shows the shipped recipes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from nesso_tune.chat.base_template import DEFAULT, own_template_of
from nesso_tune.data.detect import DetectedSource, detect_source
from nesso_tune.data.files import expand, is_local, looks_like_data
from nesso_tune.errors import DataError, ModelError, RecipeError, RunEnvironmentError, closest
from nesso_tune.hub import check_at_hand, has_weights, unknown_base
from nesso_tune.logs import print_lines, print_notes, print_text
from nesso_tune.planning.plan import in_short
from nesso_tune.planning.shapes import find_shape
from nesso_tune.recipe_draft import Base, brings_template, draft, languages_of, share_too_long, usable_note
from nesso_tune.recipes.builtin import catalogue, flag_path, is_result, local_path
from nesso_tune.recipes.json_schema import FILE, recipe_schema
from nesso_tune.recipes.load import load_recipe
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import ModelSection

DEFAULT_BASE = "mii-llm/zagreus-0.4B-ita"


def init(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="NAME.yaml is written; my-sft or my-dpo if left out.")
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
        print_text("\n\n".join(_entry_lines()) + "\n")
        return
    positional = names or []
    # `--data a.jsonl b.jsonl`: what looks like data is data
    data = [*data, *(word for word in positional if looks_like_data(word))]
    own = [word for word in positional if not looks_like_data(word)]
    if len(own) > 1:
        raise RecipeError("init", f"takes one NAME, not {', '.join(own)}", "name data files with --data")
    data = [flag_path(path) for path in dict.fromkeys(data) if path.strip()]
    if not data:
        raise DataError("init", "no data is named", "add --data FILE (jsonl, json, parquet, a folder or a hub id)")
    found = [part for path in data for part in _detected(path)]
    kind = _method(method, found)
    file = Path(flag_path(own[0]) if own else f"my-{kind}")
    file = file if file.suffix in (".yaml", ".yml") else file.with_name(f"{file.name}.yaml")
    if file.exists():
        raise RunEnvironmentError(str(file), "is there already", "give another NAME, or remove it")
    base = flag_path(base.strip()) if base else _default_base(kind)
    parent = _recipe_that_makes(base, file.parent)
    start = _look_at(base) if parent is None else Base(base, find_shape(parent[1].model), None)
    text = draft(file.stem, str(file), start, kind, found)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    schema = json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
    (file.parent / FILE).write_text(schema, encoding="utf-8")
    print_lines(*_summary(file, kind, start, found))
    if (lost := share_too_long(kind, found, start.shape)) >= 0.05:
        longest = "the longest that the base can read" if start.shape else "sequence_len"
        print_lines(f"note: about {lost:.0%} of the rows are longer than {longest}, and are dropped")
    if kind == "dpo" and start.template is not None:
        print_lines(f"note: {base} was not trained on conversations here; DPO usually starts from the result of SFT")
    if parent is not None:
        both = f"{shlex.quote(str(parent[0]))} {shlex.quote(str(file))}"
        print_lines(f"later: nesso-tune train {both}, one after the other")


def _detected(path: str) -> list[DetectedSource]:
    """What a path holds: one source, or one for each file where the files of a folder or pattern are not alike."""
    files = expand(path) if is_local(path) else []
    if len(files) < 2:
        return [detect_source(path)]
    parts = [detect_source(str(file)) for file in files]
    alike = {(part.method, part.format, str(part.fields), part.language) for part in parts}
    return [detect_source(path)] if len(alike) == 1 else parts


def _method(said: str | None, found: Sequence[DetectedSource]) -> str:
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
    print_notes(f"no --base: {DEFAULT_BASE}")
    return DEFAULT_BASE


def _look_at(base: str) -> Base:
    """What can be known of a base without fetching it.

    Raises:
        ModelError: for a path that is no model folder.
    """
    model = ModelSection(base=base, random_init=True)  # `draft` says so where there are no weights
    check_at_hand(model)
    shape = find_shape(model)
    config = local_path(base) / "tokenizer_config.json"
    if is_result(base) and not local_path(base).exists():
        return Base(base, shape, None)  # a run will make it
    if config.is_file() and brings_template(config):
        return Base(base, shape, None)
    if shape is None and (note := unknown_base(base)):
        print_notes(note)
    without_weights = local_path(base).is_dir() and not has_weights(local_path(base))
    own = None if without_weights else own_template_of(model)
    if own is None:
        return Base(base, shape, "llama3" if base.startswith("meta-llama/Llama-3") else DEFAULT, without_weights)
    if own.spec is None:
        print_notes(f"chat.template: {DEFAULT} replaces the base's own: {own.difference}")
    return Base(base, shape, own.spec or DEFAULT, replaces=own.difference)


def _recipe_that_makes(base: str, folder: Path) -> tuple[Path, Recipe] | None:
    """The recipe beside the new one whose result the base is, if the base is not there yet."""
    if not is_result(base) or local_path(base).exists() or not folder.is_dir():
        return None
    for file in sorted(folder.glob("*.yaml")):
        try:
            recipe = load_recipe(file)
        except RecipeError:  # not a recipe, or one that is being written
            continue
        if (Path(recipe.output_dir) / "final").resolve() == Path(base).resolve():
            return file, recipe
    return None


def _summary(file: Path, method: str, base: Base, found: Sequence[DetectedSource]) -> list[str]:
    size = f" ({in_short(base.shape.parameters)} parameters)" if base.shape else ""
    lines = [f"{file}: {method} from {base.name}{size}"]
    for part in found:
        rows = f"{part.rows:,} rows, " if part.rows is not None else ""
        tools = f", {part.tools:.0%} with tools" if part.tools else ""
        columns = "".join(f", {key} {_shown(value)}" for key, value in part.fields.items())
        lines.append(f"  {part.path}: {rows}format {part.format}{columns}; {languages_of(part)}{tools}")
        lines += [f"  note: {note}" for note in [usable_note(part)] if note]
        lines += [f"  not used: {', '.join(part.unused)}"] if part.unused else []
    return [*lines, f"  {file.parent / FILE}: for editors, which then complete and check the recipe",
            f"next: nesso-tune check {shlex.quote(str(file))}"]  # fmt: skip


def _shown(value: object) -> str:
    return ", ".join(f"{a} = {b}" for a, b in value.items()) if isinstance(value, dict) else str(value)


def _entry_lines() -> list[str]:
    return [
        f"{entry.name}\n  {entry.title}\n  hardware  {entry.hardware}\n  cost      {entry.cost}\n"
        f"  command   {entry.command}"
        for entry in catalogue()
    ]
