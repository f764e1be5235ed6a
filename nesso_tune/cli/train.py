"""`nesso-tune train`: trains recipes in order, each to its `final/`."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from nesso_tune.cli.options import (
    SetOption,
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
from nesso_tune.logs import logger, message_prefix
from nesso_tune.recipes.builtin import flag_path
from nesso_tune.recipes.schema import Recipe


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
    allow_changes: Annotated[
        str, typer.Option(metavar="KEY,...", help="Recipe keys that may differ from the resumed run.")
    ] = "",
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Test all stages in about a minute: tiny model, first rows, few steps.")
    ] = False,
) -> None:
    """Train. Several recipes run in order (SFT, then DPO); all are checked before the first starts."""
    num_processes = world_size_from_environment()
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
    _skip_bitsandbytes(loaded)
    with prepare_in_background(prepare_data, loaded[0]) if _is_first() else nullcontext():
        from nesso_tune.cli.main import end_process
        from nesso_tune.distributed.process_group import on_lost_rank
        from nesso_tune.run import train as run_one

        on_lost_rank(end_process)
        allowed = tuple(key.strip() for key in allow_changes.split(",") if key.strip())
        for i, (name, recipe) in enumerate(zip(recipes, loaded, strict=True)):
            with message_prefix(name):
                try:
                    result = run_one(
                        recipe,
                        resume=resume if resume == "never" or is_checkpoint_of(resume, recipe) else "auto",
                        overwrite=overwrite,
                        allow_changes=allowed,
                    )
                except KeyboardInterrupt:
                    raise Preempted(
                        name, "interrupted", "run the same command to continue from its last checkpoint"
                    ) from None
                done = "" if result.trained else "this run is finished (--overwrite trains it again): "
                logger.info(f"{done}model in {result.model_dir}")
                logger.info(f"metrics in {Path(recipe.output_dir) / 'metrics.jsonl'}")
            if result.asked_to_stop and i + 1 < len(recipes):
                raise Preempted(recipes[i + 1], "stopped before it started", "run the same command to continue with it")
    _log_next(recipes, result.model_dir, smoke)


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


def _skip_bitsandbytes(recipes: list[Recipe]) -> None:
    """Hides bitsandbytes from this process if no recipe needs it: peft would import it, which takes a second."""
    needed = any(recipe.needs_bitsandbytes for recipe in recipes)
    if not needed and "torch" not in sys.modules:  # otherwise other code of this process may need it
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"
