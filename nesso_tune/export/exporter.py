"""Exports a finished run to another format, checked against the run's own model before the folder gets its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedModel

from nesso_tune.errors import ModelError, RecipeError, RunEnvironmentError
from nesso_tune.export.card import CARD, model_card
from nesso_tune.export.final_folder import finish_folder
from nesso_tune.export.parity import Parity, Runtime, compare, end_ids, reference_answers, rounding_error
from nesso_tune.export.stages import read_stages, with_card, without_private, write_stages
from nesso_tune.export.weights import FinishedRun, Part, average, load_checkpoint, load_final
from nesso_tune.files import format_bytes, make_staging_folder, remove, staging_folder
from nesso_tune.logs import logger
from nesso_tune.model.loading import TINY_MODEL
from nesso_tune.runs.checkpoint import MANIFEST
from nesso_tune.runs.layout import EXPORT, is_run_file

FormatName = Literal["hf", "adapter", "gguf", "mlx"]
BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "q8_0": 8.5}
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # in safetensors files
SHORT_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
MARK = ".nesso-export"  # in every folder that an export may replace


@dataclass(frozen=True)
class Format:
    """A format of exports.

    Attributes:
        name: as in `--to`.
        dtypes: precisions that it can hold; empty if it has its own.
        check: raises if a run cannot be exported to it.
        write: writes (run, model, folder, dtype) into an existing folder.
        round: rounds a model in place as the runtime computes with a dtype.
        runtime: opens (run, folder) in the program that serves it.
        context: tokens over which the runtime computes a configuration; None without a limit.
        copies: how often the weights are on the disk while it writes.
    """

    name: FormatName
    dtypes: tuple[str, ...]
    check: Callable[[FinishedRun], None]
    write: Callable[[FinishedRun, PreTrainedModel, Path, str], None]
    round: Callable[[PreTrainedModel, str], None]
    runtime: Callable[[FinishedRun, Path], Runtime]
    context: Callable[[Any], int | None] = lambda config: getattr(config, "max_position_embeddings", None)
    copies: int = 1


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        folder: where it is.
        dtype: precision of its weights.
        parts: names of the averaged models; empty without an average.
        parity: the comparison with the run's model; None if it was not checked.
    """

    folder: Path
    dtype: str
    parts: list[str]
    parity: Parity | None


def export(
    run: FinishedRun,
    format: Format,
    dtype: str | None = None,
    averaged: str | None = None,
    folder: Path | None = None,
    checked: bool = True,
) -> Export:
    """Writes a finished run in another format.

    Args:
        run: the run.
        format: the format.
        dtype: precision of the weights; by default that of `final/`.
        averaged: models to average instead of `final/`, see `weights.average`.
        folder: where to write it; by default `RUN/export/FORMAT`. An earlier export there is replaced.
        checked: compare the answers in the runtime of the format.

    Raises:
        RecipeError: for options that contradict each other.
        ModelError: if the format does not support the model, or answers differently.
        RunEnvironmentError: if the folder is in use for something else, or the disk is too small.
    """
    dtype = _chosen_dtype(run, format, dtype, averaged)
    folder = run.path / EXPORT / format.name if folder is None else folder
    if folder.is_symlink() or folder.name in ("", ".."):  # the folder itself, not the link, is replaced
        folder = folder.resolve()
    _check_folder(run, folder)
    format.check(run)
    _check_space(run, folder, format, dtype)
    if averaged is not None:
        model, parts = average(run, averaged)
    elif format.name == "adapter" or (dtype == "float32" and final_dtype(run) != "float32"):
        model, parts = load_checkpoint(run, run.final_checkpoint), []
    else:
        model, parts = load_final(run.final), []
    if model.num_parameters() < TINY_MODEL:
        torch.set_num_threads(1)
    with _staged(folder) as staging:
        parity = _written(run, format, model, staging, dtype, checked)
        how: dict[str, Any] = {"to": format.name, "dtype": dtype, "checked": None if parity is None else str(parity)}
        how["average"] = ["/".join(Path(part.name).parts[-2:]) for part in parts]
        how["others"] = _stages_of_others(run, parts)
        _describe(run, staging, how)
        finish_folder(staging, folder)
    return Export(folder, dtype, [part.name for part in parts], parity)


def _written(
    run: FinishedRun, format: Format, model: PreTrainedModel, folder: Path, dtype: str, checked: bool
) -> Parity | None:
    """Writes the files, and compares them with the model. The model is rounded to measure what rounding changes."""
    tokenizer, ends = AutoTokenizer.from_pretrained(run.final), end_ids(model)
    if checked:
        logger.info("export: answering the prompts of the check")
    answers = reference_answers(model, tokenizer, format.context(model.config)) if checked else []
    if dtype == "float16":
        _check_range(model, format)
    logger.info(f"export: writing {format.name}, {dtype}")
    format.write(run, model, folder, dtype)
    (folder / MARK).touch()
    if not checked:
        logger.warning("export: not checked (--unchecked)")
        return None
    if dtype != "float32":
        format.round(model, dtype)
    logger.info("export: measuring the error of rounding")
    error = rounding_error(model, answers)
    del model
    runtime = format.runtime(run, folder)
    logger.info(f"export: checking {len(answers)} prompts and answers in {runtime.name}")
    parity = compare(runtime, answers, ends, error, f"--to {format.name}")
    logger.info(f"export: {parity}")
    return parity


def _stages_of_others(run: FinishedRun, parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The stages of averaged models that are none of the run's own, for the card."""
    own, others = read_stages(run.final), []
    for stage in (stage for part in parts for stage in without_private(read_stages(part.folder), run.recipe)):
        if stage not in own and stage not in others:
            others.append(stage)
    return [asdict(stage) for stage in others]


def _check_range(model: PreTrainedModel, format: Format) -> None:
    """Raises ModelError if a weight is too large for float16, where it would be infinite."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight.detach().half()).all():
            raise ModelError(f"--to {format.name}", f"{name} does not fit into float16", "use --dtype bf16")


def _describe(run: FinishedRun, folder: Path, how: dict[str, Any]) -> None:
    """Writes provenance and card. The card section of the run's recipe.yaml replaces the one that it trained with.

    A model that was trained before provenance files existed keeps its card.
    """
    stages = read_stages(run.final)
    if not stages:
        shutil.copyfile(run.final / CARD, folder / CARD)
        return
    stages = with_card(stages, run.recipe)
    file = next(folder.glob("*.gguf"), None)
    write_stages(folder, stages, how | ({} if file is None else {"file": file.name}))
    (folder / CARD).write_text(model_card(folder, run.final), encoding="utf-8")


def final_dtype(run: FinishedRun) -> str:
    """Precision of the weights in `final/`."""
    with safe_open(next(run.final.glob("*.safetensors")), "pt") as weights:
        return DTYPES[weights.get_slice(next(iter(weights.keys()))).get_dtype()]


def _chosen_dtype(run: FinishedRun, format: Format, dtype: str | None, averaged: str | None) -> str:
    if not format.dtypes:
        for option in (name for name, given in {"--dtype": dtype, "--average": averaged}.items() if given is not None):
            raise RecipeError(option, f"has no effect on --to {format.name}", "remove it, or use --to hf")
        return "float32"
    chosen = final_dtype(run) if dtype is None else SHORT_NAMES.get(dtype, dtype)
    if chosen not in format.dtypes:
        raise RecipeError(
            "--dtype", f"{dtype} is not a precision of --to {format.name}", f"use one of {', '.join(format.dtypes)}"
        )
    return chosen


def _check_folder(run: FinishedRun, folder: Path) -> None:
    """Raises RunEnvironmentError if a folder contains anything but an earlier export, or is one of the run's own."""
    resolved, own = folder.resolve(), run.path.resolve()
    inside = [resolved.relative_to(parent).parts for parent in resolved.parents if (parent / MANIFEST).is_file()]
    if resolved in (own, *own.parents) or any(is_run_file(parts[0]) and parts[0] != EXPORT for parts in inside):
        raise RunEnvironmentError(f"-o {folder}", "is a folder of the run", "name another one")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise RunEnvironmentError(f"-o {folder}", "is not empty and contains no export", "name another folder")
    if folder.exists() and not folder.is_dir():
        raise RunEnvironmentError(f"-o {folder}", "is a file", "name a folder")


def _check_space(run: FinishedRun, folder: Path, format: Format, dtype: str) -> None:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    weights = sum(file.stat().st_size for file in run.final.glob("*.safetensors"))
    needed = round(format.copies * weights * BITS[dtype] / BITS[final_dtype(run)])
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise RunEnvironmentError(
            str(folder), f"the export needs {format_bytes(needed)}, {format_bytes(free)} are free",
            "free some space, or name a folder on another disk with -o",
        )  # fmt: skip


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A staging folder that is deleted unless it was renamed."""
    created = [parent for parent in folder.parents if not parent.exists()]
    try:
        try:
            staging = make_staging_folder(folder)
        except OSError as error:
            what = f"cannot be created ({error.strerror})"
            raise RunEnvironmentError(str(folder), what, "name a folder that you can write to with -o FOLDER") from None
        yield staging
    except BaseException:
        remove(staging_folder(folder))
        for parent in created:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def copy_tokenizer(run: FinishedRun, folder: Path) -> None:
    """Copies tokenizer, chat template and generation config of `final/`."""
    for pattern in ("tokenizer*", "*.jinja", "generation_config.json"):
        for file in run.final.glob(pattern):
            shutil.copyfile(file, folder / file.name)
