"""The whole way of a run: recipe, data, plan, model, training, `final/`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from nesso_tune.data.prepare import PreparedData, prepare_data, unpacked
from nesso_tune.distributed.preemption import StopRequest
from nesso_tune.distributed.process_group import (
    check_launcher,
    check_shared,
    come_together,
    contact,
    from_first,
    idle_gpus,
    is_first,
    part,
    wait_for_all,
    world,
)
from nesso_tune.errors import RecipeError
from nesso_tune.export.card import model_card
from nesso_tune.export.final_folder import final_bytes, save_final, whole_model
from nesso_tune.model.adapters import check_adapter
from nesso_tune.model.attention import kernel_in_words
from nesso_tune.model.lm_head import Figures, ForwardPath, forward_path
from nesso_tune.model.loading import can_compile, load_model
from nesso_tune.planning.advice import more_epochs
from nesso_tune.planning.plan import Plan
from nesso_tune.planning.planner import make_plan
from nesso_tune.recipes.schema import Recipe, SFTRecipe
from nesso_tune.reports.data_report import write_data_report
from nesso_tune.reports.run_report import write_report
from nesso_tune.runs.checkpoint import MANIFEST, checkpoints, read_json
from nesso_tune.runs.disk_space import DiskSpace
from nesso_tune.runs.metrics_log import last_metrics
from nesso_tune.runs.provenance import check_same_run, moved_in_words, other_environment, run_facts
from nesso_tune.runs.run_directory import RunDir, open_run, write_end, write_start
from nesso_tune.training.evaluation import in_words
from nesso_tune.training.fit import check_trackers, fit
from nesso_tune.training.numerical_checks import check_final

TINY = 20_000_000  # parameters below which several CPU threads cost more than they give


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        model_dir: the finished model, `final/`.
        metrics: the last value of every metric; where `train.best_metric` took earlier weights, up to their step.
        notes: what was found on opening the run directory.
        trained: False if the run had been finished before.
        asked_to_stop: a signal came so late that the run ended first; nothing more should be begun.
    """

    model_dir: Path
    metrics: dict[str, Any]
    notes: tuple[str, ...] = ()
    trained: bool = True
    asked_to_stop: bool = False


def train(
    recipe: Recipe,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    allow_changes: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda text: None,
) -> TrainResult:
    """Runs a recipe, or continues it where it stopped.

    Args:
        recipe: what to do.
        resume: `auto` continues an unfinished run, `never` refuses to, a path continues from that checkpoint.
        overwrite: replaces an earlier run in `output_dir`: it is deleted at the first checkpoint of this one, and put
            back if none comes.
        allow_changes: dotted recipe keys whose change is accepted when a run continues.
        say: gets what a person should know on the way (what is continued, what was set aside).

    Raises:
        NessoError: the kind says what is wrong; nothing that was finished before is harmed.
        Preempted: among them, if a signal asked to stop; the same call continues.
    """
    check_trackers(recipe)
    check_adapter(recipe.model.adapter)
    with StopRequest() as request:
        opened = (
            open_run(recipe, resume=resume, overwrite=overwrite, allowed=allow_changes, say=say) if is_first() else None
        )
        try:
            if opened is not None:
                for text in _opening(opened, recipe):
                    say(text)
            data = prepare_data(recipe)
            if opened is not None and not opened.finished and opened.checkpoint is None:
                for text in _about_data(data.report):
                    say(text)
            come_together(recipe.distributed.timeout_s)
            with contact():
                run: RunDir = from_first(None if opened is None else opened.shared())
                check_shared(run.path)
                return _finished(recipe, run, data) if run.finished else _train(recipe, run, data, request, say)
        finally:
            part()
            for text in [] if opened is None else _closing(opened, overwrite and resume == "auto"):
                say(text)


def _about_data(report: dict[str, Any]) -> list[str]:
    """What was dropped, what an epoch is made of, and what is suspicious."""
    lines = []
    if report["dropped"]:
        lost = ", ".join(f"{n:,} {reason}" for reason, n in report["dropped"].items())
        lines.append(f"{report['rows_kept']:,} of {report['rows_read']:,} rows kept; dropped: {lost}")
    if len(report["mixture"]) > 1:
        shares = ", ".join(f"{group['name']} {group['share_of_tokens']:.1%}" for group in report["mixture"])
        lines.append(f"an epoch's tokens: {shares}")
    return [*lines, *report["warnings"]]


def _opening(run: RunDir, recipe: Recipe) -> list[str]:
    lines = list(run.notes)
    if run.checkpoint is not None:
        lines.append(f"an unfinished run: it continues from {run.checkpoint.name}")
    if not run.finished and (idle := idle_gpus()):
        lines.append(
            f"{idle} GPUs of this machine are idle: `nesso-tune launch` uses all, CUDA_VISIBLE_DEVICES hides some"
        )
    if not run.finished and recipe.model.dtype == "bfloat16" and not torch.cuda.is_available():
        lines.append("bfloat16 is slow on a CPU: model.dtype: float32 is faster here")
    return lines


def _closing(run: RunDir, overwrites: bool) -> list[str]:
    lines = run.close()
    if overwrites and not lines and checkpoints(run.path) and not run.final.exists():
        lines.append("continue this run without --overwrite, which would start it again")
    return lines


def _finished(recipe: Recipe, run: RunDir, data: PreparedData) -> TrainResult:
    noted = read_json(run.path, MANIFEST)
    if noted.get("unpacked"):
        data = unpacked(data, recipe)
    plan = make_plan(recipe, world(), data.volume)
    check_same_run(run.path, noted, run_facts(recipe, data, plan), True, run.moved)
    return TrainResult(run.final, last_metrics(run.metrics), ("this run is finished",), trained=False)


def _train(
    recipe: Recipe, run: RunDir, data: PreparedData, request: StopRequest, say: Callable[[str], None]
) -> TrainResult:
    plan = make_plan(recipe, world(), data.volume)
    check_launcher(recipe, plan, os.environ)
    if plan.processes == 1:  # nothing to share, whatever a launcher's configuration says
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    model = load_model(recipe.model, data.chat, recipe.seed)
    _choose_threads(model.num_parameters())
    kernel, path, given = kernel_in_words(model, recipe.model.dtype), forward_path(model), recipe
    for text in _about_path(path, recipe, plan, kernel):
        say(text)
    if isinstance(recipe, SFTRecipe) and recipe.data.packing and not path.keeps_documents_apart:
        recipe, data, plan = _without_packing(recipe, data, plan, path, say)
    _check_positions(path, recipe, data, plan)
    if plan.torch_compile and recipe.train.torch_compile == "auto" and not can_compile():
        say("torch_compile: there is no C++ compiler here, so layers are not compiled")
        plan = replace(plan, torch_compile=False)
    facts = run_facts(given, data, plan, kernel)
    run = _compared(run, facts, say)
    _check_end(run, recipe, plan)
    whole = final_bytes(model, "float32")
    saved = 3 * whole if recipe.model.adapter is None else plan.checkpoint_bytes or 0  # with two moments each
    room = DiskSpace(run.path, saved, final_bytes(model, recipe.model.dtype))
    with room.full_disk_errors(remove_partial=is_first()):
        if is_first():
            room.check_run(plan, run.step, recipe.checkpoint.keep, best=recipe.train.best_metric is not None)
            if run.checkpoint is None:
                run.metrics.unlink(missing_ok=True)
                for text in more_epochs(recipe, plan):
                    say(text)
            write_start(run, given, facts)
            write_data_report(run.path, recipe, data)
        wait_for_all()
        trainer = fit(model, data, recipe, plan, run, facts, room, request)
        bare = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        model, state = whole_model(trainer.model_wrapped, bare, recipe.model, data.chat, recipe.seed)
        metrics, best = last_metrics(run.metrics), trainer.track.best
        chosen = [] if best is None else in_words(best, trainer.state.global_step, plan.steps)
        for text in chosen:
            say(text)
        if is_first():
            check_final(state, recipe.model.dtype, trainer.state.global_step)
            trained = plan.trained(ended := trainer.state.global_step, trainer.track.epochs_at(ended))
            card = model_card(recipe, trained, data.report, metrics, chosen)
            save_final(state, model, data.chat, card, run.final, recipe.model.dtype)
            write_report(run.path, recipe, trained, data.report)
            write_end(run, {} if best is None else {"best": best.state()})
    asked = any(gather_object([request.asked]))  # which also waits for all
    return TrainResult(run.final, metrics, run.notes, asked_to_stop=asked)


def _without_packing(
    recipe: SFTRecipe, data: PreparedData, plan: Plan, path: ForwardPath, say: Callable[[str], None]
) -> tuple[SFTRecipe, PreparedData, Plan]:
    """Recipe, data and plan of the same run with one conversation a row, which is said."""
    own = recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": False})})
    rows, data = len(data.train), unpacked(data, recipe)
    steps, plan = plan.steps, make_plan(own, world(), data.volume)
    say(
        f"data.packing: this base does not keep packed documents apart{_figures(path.packing_figures, 'packed')}: "
        f"it trains on one conversation a row, {len(data.train):,} rows an epoch instead of {rows:,}, "
        f"{plan.steps:,} steps instead of {steps:,}"
    )
    return own, data, plan


def _about_path(path: ForwardPath, recipe: Recipe, plan: Plan, kernel: str) -> list[str]:
    """What is slower with this base than with others.

    Raises:
        RecipeError: if it cannot be sharded.
    """
    lines = []
    if not path.by_document and recipe.model.attention != "eager":
        lines.append(f"attention: {kernel}: this base takes no rows without padding, so batches are padded")
    if path.head == "own":
        figures = _figures(path.head_figures, "by the head alone")
        lines.append(f"head: this base computes more than its head{figures}: it trains with its own forward (slower)")
    if recipe.evaluation is not None and path.generation != "batch":
        cache = " and without a cache" if path.generation == "uncached" else ""
        lines.append(f"evaluation: padding changes what this base answers: it answers one prompt at a time{cache}")
    if path.padding == "alone" and recipe.distributed.shards(plan.processes):
        raise RecipeError(
            "distributed.fsdp", "this base computes one row at a time, and ranks with fewer rows would not take part",
            "set distributed.fsdp: none",
        )  # fmt: skip
    return lines


def _figures(figures: Figures | None, tried: str) -> str:
    return f" (loss of some tokens {figures[0]:.5f} {tried}, {figures[1]:.5f} by its own forward)" if figures else ""


def _check_positions(path: ForwardPath, recipe: Recipe, data: PreparedData, plan: Plan) -> None:
    """Raises RecipeError if a document is longer than the positions that the base has learned."""
    if path.positions is None:
        return
    longest = max(
        int(rows.documents.spans[rows.documents.kept].max(initial=0)) for rows in (data.train, data.validation)
    )
    if plan.torch_compile:  # rows are filled up, with one document more
        longest = max(longest, recipe.data.sequence_len)
    if longest > path.positions:
        raise RecipeError(
            "data.sequence_len", f"a document has {longest:,} tokens, the base positions for {path.positions:,}",
            f"set it to {path.positions} or less (data.too_long says what happens to longer documents)",
        )  # fmt: skip


def _compared(run: RunDir, facts: dict[str, Any], say: Callable[[str], None]) -> RunDir:
    """The run, compared with what its checkpoint notes: refused, or continued in another environment, which is said."""
    if run.checkpoint is None and not run.moved:
        return run
    noted = read_json(run.checkpoint or run.path, MANIFEST)
    check_same_run(run.path, noted, facts, False, run.moved)
    for text in moved_in_words(run.moved):
        say(text)
    if run.checkpoint is None:
        return run
    environment = other_environment(noted, facts)
    if environment:
        changes = ", ".join(f"{what} {before} -> {now}" for what, (before, now) in environment.items())
        say(f"not where {run.checkpoint.name} was written ({changes}): it goes on, but it may round otherwise")
    return replace(run, environment=environment)


def _check_end(run: RunDir, recipe: Recipe, plan: Plan) -> None:
    """Raises RecipeError if a changed recipe ends before the step that the run continues from."""
    if run.checkpoint is None or run.step <= plan.steps:
        return
    key = "train.num_epochs" if recipe.train.max_steps is None else "train.max_steps"
    raise RecipeError(
        key, f"the run ends at step {plan.steps:,} now, but {run.checkpoint.name} is later",
        f"raise it, or name a checkpoint up to step {plan.steps:,} with --resume",
    )  # fmt: skip


def _choose_threads(parameters: int) -> None:
    """One CPU thread for tiny models: with more, the threads wait for each other longer than they compute."""
    if not torch.cuda.is_available() and parameters < TINY and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
