"""A training run from recipe to `final/`: run directory, data, plan, model, training, export."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from nesso_tune.data.prepare import PreparedData, prepare_data, unpacked
from nesso_tune.data.report import DataReport
from nesso_tune.distributed.launcher_config import check_launcher_config
from nesso_tune.distributed.preemption import StopRequest
from nesso_tune.distributed.process_group import (
    barrier,
    broadcast_from_rank0,
    check_shared_folder,
    detect_world,
    idle_gpus,
    init_process_group,
    is_main_process,
    process_group_of_run,
    report_lost_ranks,
)
from nesso_tune.errors import RecipeError
from nesso_tune.export.card import model_card
from nesso_tune.export.final_folder import final_bytes, gather_final_model, save_final
from nesso_tune.logs import logger
from nesso_tune.model.adapters import check_adapter
from nesso_tune.model.attention import attention_description, choose_attention, uses_document_attention
from nesso_tune.model.cuda import deterministic_algorithms, use_expandable_segments
from nesso_tune.model.flash import AttentionShape
from nesso_tune.model.lm_head import ForwardPath, LossPair, forward_path
from nesso_tune.model.loading import base_hash, can_compile, load_model
from nesso_tune.planning.advice import epochs_rounded_up
from nesso_tune.planning.hardware import NO_MPS, has_apple_gpu
from nesso_tune.planning.memory import MOMENT_BYTES
from nesso_tune.planning.plan import Plan
from nesso_tune.planning.planner import make_plan
from nesso_tune.recipes.schema import Recipe, SFTRecipe
from nesso_tune.reports.data_report import write_data_report
from nesso_tune.reports.run_report import write_report
from nesso_tune.runs.checkpoint import MANIFEST, checkpoints, read_json
from nesso_tune.runs.disk_space import DiskSpace
from nesso_tune.runs.metrics_log import last_metrics
from nesso_tune.runs.provenance import RunFacts
from nesso_tune.runs.resume import confirm_resume
from nesso_tune.runs.run_directory import RunDir, open_run, write_end, write_start
from nesso_tune.training.eight_bit import check_optimizer
from nesso_tune.training.evaluator import best_summary
from nesso_tune.training.fit import Trainer, check_trackers, fit
from nesso_tune.training.numerical_checks import check_final
from nesso_tune.training.out_of_memory import out_of_memory_errors

TINY_MODEL = 20_000_000  # parameters; below, several CPU threads cost more than they gain


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        model_dir: the finished model, `final/`.
        metrics: the last value of every metric; if `train.best_metric` selected earlier weights, up to their step.
        notes: messages from opening the run directory.
        trained: False if the run was already finished.
        asked_to_stop: a signal arrived too late to stop this run; do not start another one.
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
) -> TrainResult:
    """Trains a recipe, or resumes its run where it stopped.

    Args:
        recipe: the recipe.
        resume: `auto` continues an unfinished run, `never` refuses to, a path continues from that checkpoint.
        overwrite: replaces an earlier run in `output_dir`. It is deleted when this one saves its first checkpoint, and
            restored if this one ends before.
        allow_changes: dotted recipe keys whose change is accepted when a run is resumed.

    Raises:
        NessoError: a subclass per kind of error; finished checkpoints and models stay intact. With several ranks it
            does not wait for the others. A rank that waits for one that failed is ended, with its exit code, since
            no exception reaches a thread that waits for a GPU.
        Preempted: one of them, if a signal asked to stop; the same call resumes the run.
    """
    check_trackers(recipe)
    check_adapter(recipe.model.adapter)
    check_optimizer(recipe)
    use_expandable_segments(os.environ)
    with StopRequest() as request, deterministic_algorithms(recipe.train.deterministic):
        opened = None
        try:
            with process_group_of_run():
                if is_main_process():
                    opened = open_run(recipe, resume=resume, overwrite=overwrite, allow_changes=allow_changes)
                    _log_opening(opened, recipe)
                data = prepare_data(recipe)
                if opened is not None and not opened.finished and opened.checkpoint is None:
                    _log_data(data.summary)
                init_process_group(recipe.distributed.timeout_s)
                with report_lost_ranks(), out_of_memory_errors(recipe, data.volume):
                    run: RunDir = broadcast_from_rank0(None if opened is None else opened.without_lock())
                    check_shared_folder(run.path)
                    return _finished(recipe, run, data) if run.finished else _train(recipe, run, data, request)
        finally:
            if opened is not None:
                _close(opened, overwrite and resume == "auto")


def _finished(recipe: Recipe, run: RunDir, data: PreparedData) -> TrainResult:
    """The result of a run that was already finished, after checking that data and base are the same."""
    if read_json(run.path, MANIFEST).get("unpacked"):
        data = unpacked(data, recipe)
    plan = make_plan(recipe, detect_world(), data.volume)
    facts = RunFacts.collect(recipe, data, plan, base_hash(recipe.model))
    confirm_resume(run.decision, run.path, facts).raise_if_refused()
    return TrainResult(run.final, last_metrics(run.metrics), ("this run is finished",), trained=False)


def _train(recipe: Recipe, run: RunDir, data: PreparedData, request: StopRequest) -> TrainResult:
    """Loads the model, confirms that the run may resume, trains, and exports. Called on every rank."""
    plan, opening_notes = make_plan(recipe, detect_world(), data.volume), run.notes
    check_launcher_config(recipe, plan, os.environ)
    if plan.processes == 1:  # a single process is not sharded, whatever accelerate's configuration says
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    model = load_model(recipe.model, data.chat, recipe.seed)
    _set_threads(model.num_parameters())
    kernel, given = attention_description(model), recipe
    _log_attention(model, recipe)
    recipe, data, plan = _adapt_to_model(forward_path(model), kernel, recipe, data, plan)
    facts = RunFacts.collect(given, data, plan, base_hash(given.model), kernel)
    run = _confirm(run, facts)
    if run.checkpoint is not None:
        facts = facts.resumed(read_json(run.checkpoint, MANIFEST))
    _check_end(run, recipe, plan)
    disk = _disk_space(model, recipe, plan, run.path)
    with disk.full_disk_errors(remove_partial=is_main_process()):
        if is_main_process():
            disk.check_run(plan, run.step, recipe.checkpoint.keep, best=recipe.train.best_metric is not None)
            if run.checkpoint is None:
                run.metrics.unlink(missing_ok=True)
                _warn_all(epochs_rounded_up(recipe, plan))
            write_start(run, given, facts)
            write_data_report(run.path, recipe, data)
        barrier()
        trainer = fit(model, data, recipe, plan, run, facts, disk, request)
        metrics = _export(trainer, recipe, data, plan, run)
    stop_requested = any(gather_object([request.signal_name]))  # also a barrier
    return TrainResult(run.final, metrics, opening_notes, asked_to_stop=stop_requested)


def _export(trainer: Trainer, recipe: Recipe, data: PreparedData, plan: Plan, run: RunDir) -> dict[str, Any]:
    """Gathers the weights on rank 0, which writes `final/` and the report; returns the last metrics."""
    bare = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    model, state = gather_final_model(trainer.model_wrapped, bare, recipe.model, data.chat, recipe.seed)
    metrics, best, step = last_metrics(run.metrics), trainer.run_state.best, trainer.state.global_step
    selection = [] if best is None else best_summary(best, step, plan.steps)
    for line in selection:
        logger.info(line)
    if is_main_process():
        check_final(state, recipe.model.dtype, step)
        trained = plan.trained(step, trainer.epochs_at(step))
        card = model_card(recipe, trained, data.summary, metrics, selection)
        save_final(state, model, data.chat, card, run.final, recipe.model.dtype)
        write_report(run.path, recipe, trained, data.summary)
        write_end(run, best=None if best is None else best.state_dict())
    return metrics


def _adapt_to_model(
    path: ForwardPath, kernel: str, recipe: Recipe, data: PreparedData, plan: Plan
) -> tuple[Recipe, PreparedData, Plan]:
    """Recipe, data and plan as this model can train them: unpacked, or without compiled layers, where necessary.

    Raises:
        RecipeError: if the model cannot be sharded, or documents are longer than its position embeddings.
    """
    _warn_all(_forward_notes(path, recipe, plan, kernel))
    if isinstance(recipe, SFTRecipe) and recipe.data.packing and not path.supports_packing:
        recipe, data, plan = _without_packing(recipe, data, plan, path)
    _check_positions(path, recipe, data, plan)
    if plan.torch_compile and recipe.train.torch_compile == "auto" and not can_compile():
        logger.warning("torch_compile: no C++ compiler was found: layers are not compiled")
        plan = replace(plan, torch_compile=False)
    return recipe, data, plan


def _without_packing(
    recipe: SFTRecipe, data: PreparedData, plan: Plan, path: ForwardPath
) -> tuple[SFTRecipe, PreparedData, Plan]:
    """Recipe, data and plan of the same run with one conversation per row."""
    own = recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": False})})
    rows, data = len(data.train), unpacked(data, recipe)
    steps, plan = plan.steps, make_plan(own, detect_world(), data.volume)
    logger.warning(
        f"data.packing: this model does not isolate packed documents{_compared(path.packing_losses, 'packed')}: "
        f"training on one conversation per row, {len(data.train):,} rows per epoch instead of {rows:,}, "
        f"{plan.steps:,} steps instead of {steps:,}"
    )
    return own, data, plan


def _check_positions(path: ForwardPath, recipe: Recipe, data: PreparedData, plan: Plan) -> None:
    """Raises RecipeError if a document is longer than the learned position embeddings of the model."""
    if path.max_positions is None:
        return
    longest = max(
        int(rows.documents.sequence_lengths[rows.documents.kept].max(initial=0))
        for rows in (data.train, data.validation)
    )
    if plan.torch_compile:  # rows are padded to this length, as one more document
        longest = max(longest, recipe.data.sequence_len)
    if longest > path.max_positions:
        raise RecipeError(
            "data.sequence_len", f"a document has {longest:,} tokens, the model has {path.max_positions:,} positions",
            f"set it to {path.max_positions} or less (data.too_long decides what happens to longer documents)",
        )  # fmt: skip


def _confirm(run: RunDir, facts: RunFacts) -> RunDir:
    """The run after comparing data, base and environment with its manifest. Raises RecipeError if it is refused."""
    decision = confirm_resume(run.decision, run.path, facts)
    decision.raise_if_refused()
    _warn_all(decision.notes)
    return replace(run, decision=decision)


def _check_end(run: RunDir, recipe: Recipe, plan: Plan) -> None:
    """Raises RecipeError if the plan ends before the step that the run resumes from."""
    if run.checkpoint is None or run.step <= plan.steps:
        return
    key = "train.num_epochs" if recipe.train.max_steps is None else "train.max_steps"
    raise RecipeError(
        key, f"the run ends at step {plan.steps:,} now, but {run.checkpoint.name} is later",
        f"raise it, or name a checkpoint up to step {plan.steps:,} with --resume",
    )  # fmt: skip


def _disk_space(model: PreTrainedModel, recipe: Recipe, plan: Plan, run: Path) -> DiskSpace:
    """A full checkpoint has float32 weights and two moments; that of an adapter is planned."""
    full = round((1 + MOMENT_BYTES[recipe.train.optimizer] / 4) * final_bytes(model, "float32"))
    checkpoint = full if recipe.model.adapter is None else plan.checkpoint_bytes or 0
    return DiskSpace(run, checkpoint, final_bytes(model, recipe.model.dtype))


def _set_threads(parameters: int) -> None:
    """Uses one CPU thread for tiny models: with more, synchronization takes longer than the computation."""
    if not torch.cuda.is_available() and parameters < TINY_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _log_opening(run: RunDir, recipe: Recipe) -> None:
    """How the run starts, and what is slower on this machine than necessary."""
    _warn_all(run.notes)
    if run.checkpoint is not None:
        logger.info(f"resuming an unfinished run from {run.checkpoint.name}")
    if not run.finished and (idle := idle_gpus()):
        logger.warning(
            f"{idle} GPUs of this machine are idle: train on all with `nesso-tune launch`, or hide them with "
            "CUDA_VISIBLE_DEVICES"
        )
    if not run.finished and has_apple_gpu():
        logger.warning(NO_MPS)
    if not run.finished and recipe.model.dtype == "bfloat16" and not torch.cuda.is_available():
        logger.warning("bfloat16 is slow on a CPU: model.dtype: float32 is faster here")


def _log_attention(model: PreTrainedModel, recipe: Recipe) -> None:
    """On a GPU: the kernel of document attention, and why it is not a faster one."""
    if not torch.cuda.is_available() or not uses_document_attention(model):
        return
    choice = choose_attention(recipe.model.attention, recipe.model.dtype, AttentionShape.of(model.config))
    level = logging.WARNING if choice.kernel == "sdpa" and choice.reason else logging.INFO
    logger.log(level, f"attention: {choice}")


def _log_data(report: DataReport) -> None:
    """Dropped rows, shares of the mixture, and warnings."""
    if report.dropped:
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in report.dropped.items())
        logger.warning(f"{report.rows_kept:,} of {report.rows_read:,} rows kept; dropped: {dropped}")
    if len(report.mixture) > 1:
        shares = ", ".join(f"{group.name} {group.share_of_tokens:.1%}" for group in report.mixture)
        logger.info(f"tokens per epoch: {shares}")
    _warn_all(report.warnings)


def _forward_notes(path: ForwardPath, recipe: Recipe, plan: Plan, kernel: str) -> list[str]:
    """What is slower with this model than with others.

    Raises:
        RecipeError: if it cannot be sharded.
    """
    notes = []
    if not path.padding_free and recipe.model.attention != "eager":
        notes.append(f"attention: {kernel}: this model does not support padding-free batches; using padding")
    if path.head == "own":
        figures = _compared(path.head_losses, "by the LM head alone")
        notes.append(f"head: this model's logits are not only its LM head{figures}: using its own forward (slower)")
    if recipe.evaluation is not None and path.generation != "batch":
        cache = " and without a KV cache" if path.generation == "uncached" else ""
        notes.append(f"evaluation: padding changes this model's answers: generating one prompt at a time{cache}")
    if path.padding == "alone" and recipe.shards(plan.processes):
        raise RecipeError(
            "distributed.fsdp",
            "this model processes one row at a time, so ranks with fewer rows would miss collective operations",
            "set distributed.fsdp: none",
        )
    return notes


def _compared(figures: LossPair | None, method: str) -> str:
    return f" (loss of some tokens {figures[0]:.5f} {method}, {figures[1]:.5f} by its own forward)" if figures else ""


def _close(run: RunDir, overwrites: bool) -> None:
    """Closes the run directory; says how to resume an unfinished run."""
    restored = run.close()
    if overwrites and not restored and checkpoints(run.path) and not run.final.exists():
        logger.info("to resume this run, omit --overwrite, which would start it again")


def _warn_all(texts: Iterable[str]) -> None:
    for text in texts:
        logger.warning(text)
