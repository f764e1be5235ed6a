"""`nesso-tune init`: writes a first recipe for a base model and data files; `--list` shows the bundled recipes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from nesso_tune.chat.base_template import DEFAULT_TEMPLATE, local_base_template
from nesso_tune.cli.options import check_before_start
from nesso_tune.data.detect import DetectedSource, detect_source
from nesso_tune.data.file_formats import splits_in
from nesso_tune.data.files import expand, is_local, is_remote, looks_like_data, select_files, split_kind
from nesso_tune.data.report import listed_keys, unread_warnings
from nesso_tune.errors import DataError, ModelError, NessoError, RecipeError, RunEnvironmentError, closest
from nesso_tune.hub import check_local_base, has_weights, missing_base_note
from nesso_tune.launch.command import count_local_gpus
from nesso_tune.logs import logger, print_lines, print_text
from nesso_tune.planning.plan import in_short
from nesso_tune.planning.shapes import find_shape
from nesso_tune.recipe_draft import (
    BaseModelInfo,
    DraftSource,
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
from nesso_tune.recipes.sections import ModelSection, Source

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
    data_format: Annotated[
        str | None, typer.Option("--format", metavar="FORMAT", help="Format of the data, by default detected.")
    ] = None,
    fields: Annotated[
        list[str], typer.Option("--field", metavar="NAME=COLUMN", help="A column, e.g. prompt=domanda (repeatable).")
    ] = [],  # noqa: B006
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
    data = _distinct([flag_path(path) for path in data if path.strip()])
    if not data:
        remedy = "add --data FILE (jsonl, json, csv, parquet, a folder, a URL or a hub id)"
        raise DataError("init", "no data given", remedy)
    sources, validation = _sources(data, _given(data_format, fields))
    found = [source.detected for source in sources]
    kind = _method(method, [*found, *(source.detected for source in validation)])
    file = Path(flag_path(own[0]) if own else f"my-{kind}")
    file = file if file.suffix in (".yaml", ".yml") else file.with_name(f"{file.name}.yaml")
    if file.exists():
        raise RunEnvironmentError(str(file), "already exists", "give another NAME, or remove it")
    base = flag_path(base.strip()) if base else _default_base(kind)
    parent = _recipe_that_creates(base, file.parent)
    start = _inspect_base(base) if parent is None else BaseModelInfo(base, find_shape(parent[1].model), None)
    text = recipe_text(file.stem, str(file), start, kind, sources, validation, on_cpu=not count_local_gpus())
    _write(file, text)
    print_lines(*_summary(file, kind, start, sources, validation))
    if (dropped := too_long_share(kind, found, start.shape)) >= 0.05:
        limit = "the context of the base" if start.shape else "sequence_len"
        print_lines(f"note: about {dropped:.0%} of the rows are longer than {limit}, and are dropped")
    if kind == "dpo" and start.template is not None:
        print_lines(f"note: {base} was not trained on conversations here; DPO usually starts from the result of SFT")
    if parent is not None:
        both = f"{shlex.quote(str(parent[0]))} {shlex.quote(str(file))}"
        print_lines(f"later: nesso-tune train {both}, one after the other")


def _distinct(paths: Sequence[str]) -> list[str]:
    """The paths without those that mean the same file as an earlier one."""
    found: dict[Path | str, str] = {}
    for path in paths:
        found.setdefault(local_path(path).resolve() if is_local(path) else path, path)
    return list(found.values())


def _write(file: Path, text: str) -> None:
    """Writes the recipe and the schema beside it, and loads the recipe as `train` does; removes it if that fails."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    try:
        check_before_start([load_recipe(file)], processes=1)
    except RecipeError as error:
        file.unlink()
        raise RecipeError(replace(problem, where="init") for problem in error.problems) from None
    except NessoError:
        file.unlink()
        raise
    schema = json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
    (file.parent / SCHEMA_FILE).write_text(schema, encoding="utf-8")


def _given(data_format: str | None, fields: Sequence[str]) -> dict[str, Any]:
    """The keys of a source that the options set.

    Raises:
        RecipeError: for an unknown key, or one without a column.
    """
    given: dict[str, Any] = {} if data_format is None else {"format": flag_path(data_format)}
    known = [key for key in Source.model_fields if key.endswith(("_field", "_fields")) or key == "labels"]
    for text in fields:
        name, equals, column = text.partition("=")
        key = next((key for key in (name, f"{name}_field", f"{name}_fields") if key in known), None)
        if key is None:
            guess = closest(name, [*known, *(key.removesuffix("_field") for key in known)])
            remedy = f"did you mean `{guess}`?" if guess else f"one of {', '.join(known)}"
            raise RecipeError("--field", f"`{name}` is not a key of a source", remedy)
        if not equals or not column:
            raise RecipeError("--field", f"`{text}` names no column", f"write --field {name}=COLUMN")
        values = tuple(int(part) if part.isdecimal() else part for part in column.split(","))
        given[key] = column if key.endswith("_field") else values
    return given


def _sources(paths: Sequence[str], given: Mapping[str, Any]) -> tuple[list[DraftSource], list[DraftSource]]:
    """The sources for training, and those for validation where the names of files or folders say so.

    Test splits are not used. Of several files, one that cannot be read is reported and left out.

    Raises:
        DataError: if none can be read.
    """
    splits = [(path, split) for path in paths for split in _splits_of(path)]
    kinds = [split_kind(split or _file_name(path)) for path, split in splits]
    mixed = len(splits) > 1 and bool({"train", None} & set(kinds))
    parts: dict[bool, list[DraftSource]] = {False: [], True: []}
    problems: list[DataError] = []
    for (path, split), kind in zip(splits, kinds, strict=True):
        if mixed and kind == "test":
            logger.info(f"{path}: {f'split {split}' if split else 'a test split'} is not used")
            continue
        try:
            parts[mixed and kind == "validation"] += _detected(path, split, given)
        except DataError as error:
            problems.append(error)
    if not parts[False]:
        raise problems[0]
    for problem in problems:
        logger.warning(f"left out: {problem}")
    return parts[False], parts[True]


def _file_name(path: str) -> str:
    """The name of a single file, which may name a split; empty for a folder, a pattern or a hub id."""
    return Path(path).name if is_remote(path) or local_path(path).is_file() else ""


def _splits_of(path: str) -> list[str | None]:
    """The splits of a folder, a pattern or a file that holds several; [None] if there is one at most."""
    if not is_local(path):
        return [None]
    found = select_files(path)
    splits: Sequence[str] = found.splits
    if len(found.files) == 1:
        try:
            splits = splits_in(found.files[0])
        except DataError:  # reported when its rows are read
            return [None]
    return list(splits) if len(splits) > 1 else [None]


def _detected(path: str, split: str | None, given: Mapping[str, Any]) -> list[DraftSource]:
    """The data at a path: one source, or one for each file if their formats differ or one cannot be read."""
    source = Source.model_validate({"path": path, **given, **({"split": split} if split else {})})
    files = expand(path, source.split) if is_local(path) else []
    if len(files) < 2:
        return [DraftSource(detect_source(path, source), source.split)]
    parts, problems = [], list[DataError]()
    for file in files:
        try:
            parts.append(detect_source(str(file), source.model_copy(update={"path": str(file), "split": "train"})))
        except DataError as error:
            problems.append(error)
    if not parts:
        raise problems[0]
    for problem in problems:
        logger.warning(f"left out: {problem}")
    formats = {(part.method, part.format, str(part.fields), part.language) for part in parts}
    if problems or len(formats) > 1:
        return [DraftSource(part) for part in parts]
    return [DraftSource(detect_source(path, source), source.split)]


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


def _summary(
    file: Path, method: str, base: BaseModelInfo, sources: Sequence[DraftSource], validation: Sequence[DraftSource]
) -> list[str]:
    size = f" ({in_short(base.shape.parameters)} parameters)" if base.shape else ""
    lines = [f"{file}: {method} from {base.name}{size}"]
    for source in (*sources, *validation):
        part = source.detected
        use = f" (split {source.split})" if source.split != "train" else ""
        use += ", for validation" if source in validation else ""
        rows = f"{part.rows:,} rows, " if part.rows is not None else ""
        tools = f", {part.tools:.0%} with tools" if part.tools else ""
        columns = "".join(f", {key} {_format_field(value)}" for key, value in part.fields.items())
        lines.append(f"  {part.path}{use}: {rows}format {part.format}{columns}; {languages_of(part)}{tools}")
        lines += [f"  note: {note}" for note in [unusable_note(part)] if note]
        lines += [f"  not read: {listed_keys(part.unread)}"] if part.unread else []
        lines += [f"  warning: {text}" for text in unread_warnings({part.path: part.unread_texts})]
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
