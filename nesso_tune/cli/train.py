"""`nesso-tune train`: trains recipes in order, each to its `final/`."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nesso_tune.cli.options import (
    ChangesOption,
    SetOption,
    VerifyOption,
    check_bases,
    check_before_start,
    check_flags,
    check_folders,
    is_checkpoint_of,
    load_all,
    world_size_from_environment,
)
from nesso_tune.data.prepare import prepare_data
from nesso_tune.data.workers import prepare_in_background
from nesso_tune.errors import Preempted, RecipeError
from nesso_tune.logs import logger, message_prefix, with_figures
from nesso_tune.recipes.builtin import flag_path
from nesso_tune.recipes.schema import Recipe
from nesso_tune.runs.layout import METRICS
from nesso_tune.runs.run_status import format_duration

if TYPE_CHECKING:
    from nesso_tune.reports.result import TrainResult
    from nesso_tune.training.fit import Extensions


def train(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="YAML files, or names of bundled recipes.")],
    settings: SetOption = [],  # noqa: B006 - typer copies it
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            parser=flag_path,
            help="Resume an unfinished run, never resume, or resume from a checkpoint.",
        ),
    ] = "auto",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an existing run; it is kept until the new run has a checkpoint."),
    ] = False,
    changes: ChangesOption = [],  # noqa: B006 - typer copies it
    verify: VerifyOption = "sample",
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Test all stages in about a minute: tiny model, first rows, few steps.")
    ] = False,
) -> None:
    """Train. Several recipes run in order (SFT, then DPO); all are checked before the first starts."""
    num_processes, allow_changes = world_size_from_environment(), ",".join(changes)
    loaded = load_all(recipes, settings)
    check_folders(recipes, loaded)
    check_flags(loaded, resume, allow_changes)
    if smoke:
        _check_smoke_options(resume, overwrite, allow_changes)
        loaded, resume, overwrite = _smoke(loaded), "never", True
    check_bases(loaded)
    check_before_start(loaded, num_processes)
    logger.info("loading the libraries")
    warnings.filterwarnings("ignore", category=FutureWarning)  # users cannot act on those between libraries
    skip_bitsandbytes(loaded)
    with prepare_first(loaded[0]):
        allowed = tuple(key.strip() for key in allow_changes.split(",") if key.strip())
        model_dir = _run_all(recipes, loaded, resume, smoke, overwrite=overwrite, allow_changes=allowed, verify=verify)
    _log_next(recipes, model_dir, smoke)


def _run_all(names: list[str], recipes: list[Recipe], resume: str, smoke: bool, **options: Any) -> Path:
    """Runs the recipes in order, with the options of `run_recipe`; returns the model of the last one."""
    from nesso_tune.cli.main import end_process
    from nesso_tune.distributed.process_group import on_lost_rank
    from nesso_tune.training.fit import Extensions

    on_lost_rank(end_process)
    extensions = Extensions.of(alarms=not smoke)
    for i, (name, recipe) in enumerate(zip(names, recipes, strict=True)):
        own = resume if resume == "never" or is_checkpoint_of(resume, recipe) else "auto"
        result = run_one(name, recipe, extensions, several=len(recipes) > 1, resume=own, **options)
        if result.asked_to_stop and i + 1 < len(recipes):
            raise Preempted(names[i + 1], "stopped before it started", "run the same command to continue with it")
    return result.model_dir


def run_one(
    name: str,
    recipe: Recipe,
    extensions: Extensions,
    *,
    several: bool,
    hint: str = " (--overwrite trains it again)",
    **options: Any,
) -> TrainResult:
    """Runs one recipe of a command with the options of `run_recipe`, and logs how it ended.

    Args:
        name: before each message, if the command has `several` runs.
        recipe: the recipe.
        extensions: of the run.
        several: whether the command has several runs.
        hint: for a run that was finished before.
        options: of `run_recipe`.

    Returns:
        The result without its trainer, whose memory the next run needs.

    Raises:
        Preempted: if the run is interrupted.
    """
    from nesso_tune.run import run_recipe

    with message_prefix(name) if several else nullcontext():
        try:
            result = run_recipe(recipe, extensions, **options)
        except KeyboardInterrupt:
            raise Preempted(name, "interrupted", "run the same command to continue from its last checkpoint") from None
        result = replace(result, trainer=None)
        _log_summary(result, hint)
    return result


def _log_summary(result: TrainResult, hint: str) -> None:
    """How a run ended, how long it trained, and where its files are."""
    metrics, where = result.metrics, {"model": str(result.model_dir)}
    where |= {"report": str(result.report), "metrics": str(result.run_dir / METRICS)}
    if result.trained:
        took = format_duration(metrics.get("seconds"))
        shown = ", ".join(f"{name} {value:.4g}" for name, value in result.main_metrics.items())
        line = f"finished: {metrics.get('step', 0):,} steps in {took}{'; ' if shown else ''}{shown}"
        logger.info(line, extra=with_figures({**metrics, **where}))
    done = "" if result.trained else f"this run is finished{hint}: "
    for name, path in where.items():
        logger.info(f"{done if name == 'model' else ''}{name} in {path}")


def _log_next(recipes: list[str], model_dir: Path, smoke: bool) -> None:
    if smoke:
        logger.info(
            f"smoke: passed; the weights are random, so answers of `nesso-tune chat {model_dir}` are meaningless"
        )
        logger.info(f"next: nesso-tune train {' '.join(map(shlex.quote, recipes))}")
    else:
        logger.info(f"next: nesso-tune chat {shlex.quote(str(model_dir))}")


def _check_smoke_options(resume: str, overwrite: bool, allow_changes: str) -> None:
    given = {"--resume": resume != "auto", "--overwrite": overwrite, "--allow-changes": bool(allow_changes)}
    for option in (name for name, is_given in given.items() if is_given):
        raise RecipeError(option, "has no effect with --smoke, which always starts a new run", "remove one of the two")


def _smoke(recipes: list[Recipe]) -> list[Recipe]:
    """The recipes reduced for a smoke run; bases that an earlier recipe creates refer to its reduced run."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's libraries are imported; nothing is downloaded
    from nesso_tune.smoke import smoke_recipe

    outputs: dict[str, str] = {}
    return [smoke_recipe(recipe, outputs) for recipe in recipes]


def skip_bitsandbytes(recipes: list[Recipe]) -> None:
    """Hides bitsandbytes from this process if no recipe needs it: peft would import it, which takes a second."""
    needed = any(recipe.needs_bitsandbytes for recipe in recipes)
    if not needed and "torch" not in sys.modules:  # otherwise other code of this process may need it
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def prepare_first(recipe: Recipe) -> AbstractContextManager[None]:
    """Prepares the data of the first recipe while the `with` block loads the libraries; on rank 0 only."""
    is_first = os.environ.get("RANK", "0") == "0"
    return prepare_in_background(prepare_data, recipe) if is_first else nullcontext()
