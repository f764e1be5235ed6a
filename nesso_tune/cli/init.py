"""`nesso-tune init`: writes a first recipe for a base model and data files; `--list` shows the bundled recipes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from nesso_tune.chat.base_template import DEFAULT_TEMPLATE, local_base_template
from nesso_tune.data.detect import DetectedSource, detect_source
from nesso_tune.data.files import expand, is_local, looks_like_data
from nesso_tune.errors import DataError, ModelError, RecipeError, RunEnvironmentError, closest
from nesso_tune.hub import check_local_base, has_weights, missing_base_note
from nesso_tune.logs import logger, print_lines, print_text
from nesso_tune.planning.plan import in_short
from nesso_tune.planning.shapes import find_shape
from nesso_tune.recipe_draft import (
    BaseModelInfo,
    has_nesso_template,
    languages_of,
    recipe_text,
    too_long_share,
    unusable_note,
)
from nesso_tune.recipes.builtin import flag_path, is_run_output, local_path, recipe_summaries
from nesso_tune.recipes.json_schema import SCHEMA_FILE, recipe_schema
from nesso_tune.recipes.load import load_recipe
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import ModelSection

DEFAULT_BASE = "mii-llm/zagreus-0.4B-ita"


def init(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Writes NAME.yaml; by default my-sft or my-dpo.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="ID|FOLDER", help="Base model; for DPO the result of SFT.")
    ] = None,
    data: Annotated[
        list[str], typer.Option(metavar="FILE...", help="One or more data files, folders, globs or hub ids.")
    ] = [],  # noqa: B006 - typer copies it
    method: Annotated[str | None, typer.Option(metavar="sft|dpo", help="By default detected from the data.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the bundled recipes with their commands.")] = False,
) -> None:
    """Write a first recipe for your base and your data, or list the bundled ones."""
    if listed:
        print_text("\n\n".join(_entry_lines()) + "\n")
        return
    positional = names or []
    # in `--data a.jsonl b.jsonl`, the second file is positional
    data = [*data, *(word for word in positional if looks_like_data(word))]
    own = [word for word in positional if not looks_like_data(word)]
    if len(own) > 1:
        raise RecipeError("init", f"takes one NAME, not {', '.join(own)}", "name data files with --data")
    data = [flag_path(path) for path in dict.fromkeys(data) if path.strip()]
    if not data:
        raise DataError("init", "no data given", "add --data FILE (jsonl, json, parquet, a folder or a hub id)")
    found = [part for path in data for part in _detected(path)]
    kind = _method(method, found)
    file = Path(flag_path(own[0]) if own else f"my-{kind}")
    file = file if file.suffix in (".yaml", ".yml") else file.with_name(f"{file.name}.yaml")
    if file.exists():
        raise RunEnvironmentError(str(file), "already exists", "give another NAME, or remove it")
    base = flag_path(base.strip()) if base else _default_base(kind)
    parent = _recipe_that_creates(base, file.parent)
    start = _inspect_base(base) if parent is None else BaseModelInfo(base, find_shape(parent[1].model), None)
    text = recipe_text(file.stem, str(file), start, kind, found)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    schema = json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
    (file.parent / SCHEMA_FILE).write_text(schema, encoding="utf-8")
    print_lines(*_summary(file, kind, start, found))
    if (dropped := too_long_share(kind, found, start.shape)) >= 0.05:
        limit = "the context of the base" if start.shape else "sequence_len"
        print_lines(f"note: about {dropped:.0%} of the rows are longer than {limit}, and are dropped")
    if kind == "dpo" and start.template is not None:
        print_lines(f"note: {base} was not trained on conversations here; DPO usually starts from the result of SFT")
    if parent is not None:
        both = f"{shlex.quote(str(parent[0]))} {shlex.quote(str(file))}"
        print_lines(f"later: nesso-tune train {both}, one after the other")


def _detected(path: str) -> list[DetectedSource]:
    """The data at a path: one source, or one per file if the files of a folder or pattern have different formats."""
    files = expand(path) if is_local(path) else []
    if len(files) < 2:
        return [detect_source(path)]
    parts = [detect_source(str(file)) for file in files]
    formats = {(part.method, part.format, str(part.fields), part.language) for part in parts}
    return [detect_source(path)] if len(formats) == 1 else parts


def _method(requested: str | None, found: Sequence[DetectedSource]) -> str:
    """The method for which all data is suitable.

    Raises:
        RecipeError: if `requested` is not a method.
        DataError: if the data is for another method, or for both.
    """
    if requested not in (None, "sft", "dpo"):
        guess = closest(str(requested), ("sft", "dpo"))
        raise RecipeError(
            "--method", f"`{requested}` is not a method", f"did you mean `{guess}`?" if guess else "sft or dpo"
        )
    kinds = {"sft": [d.path for d in found if d.method == "sft"], "dpo": [d.path for d in found if d.method == "dpo"]}
    if kinds["sft"] and kinds["dpo"]:
        raise DataError(
            ", ".join(kinds["dpo"]), f"contains preference pairs, {', '.join(kinds['sft'])} conversations",
            "create one recipe for each: first SFT, then DPO from its result",
        )  # fmt: skip
    detected = "sft" if kinds["sft"] else "dpo"
    if requested is not None and requested != detected:
        what, other = ("conversations", "dpo") if detected == "sft" else ("preference pairs", "sft")
        needs = "DPO needs a chosen and a rejected answer" if other == "dpo" else "SFT needs conversations"
        raise DataError(
            ", ".join(kinds[detected]), f"contains {what}, but {needs}", f"use --method {detected}, or other data"
        )
    return detected


def _default_base(method: str) -> str:
    if method == "dpo":
        raise ModelError(
            "init", "DPO starts from the result of SFT, and no base is given",
            "add --base outputs/NAME/final, where NAME is your SFT recipe",
        )  # fmt: skip
    logger.info(f"no --base given, using {DEFAULT_BASE}")
    return DEFAULT_BASE


def _inspect_base(base: str) -> BaseModelInfo:
    """Inspects a base model without downloading it.

    Raises:
        ModelError: if a path is not a model folder.
    """
    model = ModelSection(base=base, random_init=True)  # a folder may lack weights: `recipe_text` sets random_init
    check_local_base(model)
    shape = find_shape(model)
    config = local_path(base) / "tokenizer_config.json"
    if is_run_output(base) and not local_path(base).exists():
        return BaseModelInfo(base, shape, None)  # a run will create it
    if config.is_file() and has_nesso_template(config):
        return BaseModelInfo(base, shape, None)
    if shape is None and (note := missing_base_note(base)):
        logger.warning(note)
    without_weights = local_path(base).is_dir() and not has_weights(local_path(base))
    own = None if without_weights else local_base_template(model)
    if own is None:
        return BaseModelInfo(
            base, shape, "llama3" if base.startswith("meta-llama/Llama-3") else DEFAULT_TEMPLATE, without_weights
        )
    if own.spec is None:
        logger.warning(f"chat.template: {DEFAULT_TEMPLATE} replaces the base's own: {own.difference}")
    return BaseModelInfo(base, shape, own.spec or DEFAULT_TEMPLATE, replaces=own.difference)


def _recipe_that_creates(base: str, folder: Path) -> tuple[Path, Recipe] | None:
    """The recipe in the same folder that creates the base, if the base does not exist yet."""
    if not is_run_output(base) or local_path(base).exists() or not folder.is_dir():
        return None
    for file in sorted(folder.glob("*.yaml")):
        try:
            recipe = load_recipe(file)
        except RecipeError:  # not a valid recipe
            continue
        if (Path(recipe.output_dir) / "final").resolve() == Path(base).resolve():
            return file, recipe
    return None


def _summary(file: Path, method: str, base: BaseModelInfo, found: Sequence[DetectedSource]) -> list[str]:
    size = f" ({in_short(base.shape.parameters)} parameters)" if base.shape else ""
    lines = [f"{file}: {method} from {base.name}{size}"]
    for part in found:
        rows = f"{part.rows:,} rows, " if part.rows is not None else ""
        tools = f", {part.tools:.0%} with tools" if part.tools else ""
        columns = "".join(f", {key} {_format_field(value)}" for key, value in part.fields.items())
        lines.append(f"  {part.path}: {rows}format {part.format}{columns}; {languages_of(part)}{tools}")
        lines += [f"  note: {note}" for note in [unusable_note(part)] if note]
        lines += [f"  unused columns: {', '.join(part.unused)}"] if part.unused else []
    return [*lines, f"  {file.parent / SCHEMA_FILE}: JSON Schema for completion and validation in editors",
            f"next: nesso-tune check {shlex.quote(str(file))}"]  # fmt: skip


def _format_field(value: object) -> str:
    return ", ".join(f"{a} = {b}" for a, b in value.items()) if isinstance(value, dict) else str(value)


def _entry_lines() -> list[str]:
    return [
        f"{entry.name}\n  {entry.title}\n  hardware  {entry.hardware}\n  cost      {entry.cost}\n"
        f"  command   {entry.command}"
        for entry in recipe_summaries()
    ]
