"""A training run from recipe to `final/`: run directory, data, plan, model, training, export."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from nesso_tune.cache import cache_root
from nesso_tune.data.cache_key import KIND as PREPARED
from nesso_tune.data.prepare import PreparedData, prepare_data, unpacked
from nesso_tune.data.privacy import Privacy
from nesso_tune.data.report import DataReport, listed_keys
from nesso_tune.data.workers import ReadFiles
from nesso_tune.distributed.preemption import StopRequest
from nesso_tune.distributed.process_group import (
    barrier,
    broadcast_from_rank0,
    broadcast_weights,
    check_shared_folder,
    init_process_group,
    is_main_process,
    join_ranks,
    one_rank_first,
    process_group_of_run,
    report_lost_ranks,
)
from nesso_tune.distributed.world import agreed_world, check_launcher_config, detect_world, idle_gpus
from nesso_tune.errors import RecipeError, RunEnvironmentError, first_line
from nesso_tune.export.final_folder import final_bytes, gather_final_model, save_final
from nesso_tune.export.publish import check_gate, gate_of, model_folder, publish
from nesso_tune.export.stages import Stage, read_stages, without_private
from nesso_tune.export.verify import Amount, Verifier
from nesso_tune.hub import base_folder
from nesso_tune.logs import logger
from nesso_tune.metric_registry import AnswerScore
from nesso_tune.model.adapters import check_adapter
from nesso_tune.model.attention import attention_description, choose_attention, uses_document_attention
from nesso_tune.model.cuda import bind_to_near_cores, deterministic_algorithms, use_expandable_segments
from nesso_tune.model.flash import AttentionShape
from nesso_tune.model.lm_head import forward_path
from nesso_tune.model.loading import TINY_MODEL, SharedWeights, base_hash, fetch_base, load_model
from nesso_tune.model.passed import with_passed
from nesso_tune.planning.advice import epochs_rounded_up
from nesso_tune.planning.hardware import NO_MPS, has_apple_gpu
from nesso_tune.planning.memory import MOMENT_BYTES
from nesso_tune.planning.plan import Plan
from nesso_tune.planning.planner import make_plan
from nesso_tune.recipes.load import RecipeSource, as_recipe
from nesso_tune.recipes.schema import Recipe, dump
from nesso_tune.reports.data_report import write_data_report
from nesso_tune.reports.result import TrainResult
from nesso_tune.reports.run_report import write_report
from nesso_tune.runs.cache_use import record_use
from nesso_tune.runs.checkpoint import MANIFEST, checkpoints, read_json
from nesso_tune.runs.disk_space import DiskSpace
from nesso_tune.runs.metrics_log import last_metrics
from nesso_tune.runs.provenance import RunFacts
from nesso_tune.runs.resume import confirm_resume, recorded_choices
from nesso_tune.runs.run_directory import RunDir, open_run, write_end, write_start
from nesso_tune.runs.run_status import recorded_status
from nesso_tune.training.callbacks import AfterEvaluation
from nesso_tune.training.eight_bit import check_optimizer
from nesso_tune.training.evaluator import best_summary
from nesso_tune.training.fit import Extensions, Trainer, add_adapter, check_trackers, fit
from nesso_tune.training.memory_probe import probe_micro_batch
from nesso_tune.training.model_limits import adapt_to_model
from nesso_tune.training.numerical_checks import check_final
from nesso_tune.training.out_of_memory import out_of_memory_errors


def train(
    recipe: RecipeSource,
    *,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    metrics: Mapping[str, AnswerScore] | None = None,
    resume: str = "auto",
    overwrite: bool = False,
    allow_changes: tuple[str, ...] = (),
    verify: Amount = "sample",
) -> TrainResult:
    """Trains a recipe, or resumes its run where it stopped.

    A model, tokenizer or data set that is passed takes the place of the recipe's. It is written into the cache under a
    hash of its content, and the run records that: it resumes with the same content only, and `nesso-tune train
    OUTPUT_DIR/recipe.yaml` resumes it too. Started by a launcher, every process passes the same.

    Args:
        recipe: a recipe, or what `load_recipe` takes: `train("quickstart/sft")`.
        callbacks: transformers' callbacks, called on every process after those of the trainer. State of an
            `ExportableState` is in checkpoints.
        model: a transformers model to start from, instead of `model.base`. It is loaded from the cache in float32; the
            object is not changed.
        tokenizer: its tokenizer; by default that of `model.base`. The recipe's chat template is added to it.
        train_dataset: rows instead of `data.sources`, read with the keys (`format`, `language` ...) on which these
            sources agree.
        eval_dataset: rows instead of `data.validation_sources`, or instead of the split of the training rows.
        metrics: own metrics of the answers during training, by name: functions of an `Answer`. See `answer_metric`.
        resume: `auto` continues an unfinished run, `never` refuses to, a path continues from that checkpoint.
        overwrite: replaces an earlier run in `output_dir`. It is deleted when this one saves its first checkpoint, and
            restored if this one ends before.
        allow_changes: dotted recipe keys whose change is accepted when a run is resumed.
        verify: validation rows whose loss must be the same with `final/` in plain transformers: `sample`, `all` or
            `none`.

    Raises:
        NessoError: a subclass per kind of error; finished checkpoints and models stay intact. With several ranks it
            does not wait for the others. A rank that waits for one that failed is ended, with its exit code, since
            no exception reaches a thread that waits for a GPU.
        GateRefused: one of them, if the model does not pass `evaluation.gate`; its weights are in `candidate/`.
        Preempted: another one, if a signal asked to stop; the same call resumes the run.
    """
    recipe = with_passed(as_recipe(recipe), model, tokenizer, train_dataset, eval_dataset)
    if metrics and (recipe.evaluation is None or not recipe.evaluation.samples):
        raise RecipeError("metrics", "need answers, and this recipe generates none", "set evaluation.samples above 0")
    if isinstance(allow_changes, str):
        raise RecipeError("allow_changes", "must be a tuple of keys, not text", f"write ({allow_changes!r},)")
    extensions = Extensions.of(callbacks, metrics)
    return run_recipe(
        recipe, extensions, resume=resume, overwrite=overwrite, allow_changes=allow_changes, verify=verify
    )


def run_recipe(
    recipe: Recipe,
    extensions: Extensions,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    allow_changes: tuple[str, ...] = (),
    verify: Amount = "sample",
) -> TrainResult:
    """`train` after its arguments are checked; arguments and errors as there."""
    check_trackers(recipe)
    use_expandable_segments(os.environ)  # before the first allocation on a GPU
    bind_to_near_cores()
    check_adapter(recipe.model.adapter)
    check_optimizer(recipe)
    check_gate(recipe)
    with (
        Verifier(verify) as verifier,
        StopRequest() as request,
        deterministic_algorithms(recipe.train.deterministic),
    ):
        opened = None
        try:
            with process_group_of_run():
                with report_lost_ranks():
                    join_ranks(recipe.distributed.timeout_s)
                    if is_main_process():
                        opened = open_run(recipe, resume=resume, overwrite=overwrite, allow_changes=allow_changes)
                        _log_opening(opened, recipe)
                    data = _prepare(recipe)
                if opened is not None:
                    record_use(PREPARED, data.key, opened.path)
                if opened is not None and not opened.finished and opened.checkpoint is None:
                    _log_data(data.summary)
                init_process_group(recipe.distributed.timeout_s)
                plan_of = partial(make_plan, recipe, volume=data.volume)
                _check_same_on_ranks(recipe)
                with report_lost_ranks(), out_of_memory_errors(recipe, lambda: plan_of(detect_world())):
                    run: RunDir = broadcast_from_rank0(None if opened is None else opened.without_lock())
                    check_shared_folder(run.path)
                    return (
                        _finished(recipe, run, data)
                        if run.finished
                        else _train(recipe, run, data, request, extensions, verifier)
                    )
        finally:
            if opened is not None:
                _close(opened, overwrite and resume == "auto")


def _check_same_on_ranks(recipe: Recipe) -> None:
    """Raises RecipeError if processes were given different recipes, models or data sets. Every rank must call this."""
    own = json.dumps(dump(recipe), sort_keys=True).replace(str(cache_root()), "")  # each machine may have its own cache
    different = [rank for rank, other in enumerate(gather_object([own])) if other != own]
    if different:
        what = f"process {different[0]} was given another recipe, model or data set than this one"
        error = RecipeError("train", what, "pass the same on every process")
        error.on_all_ranks = True
        raise error


def _prepare(recipe: Recipe) -> PreparedData:
    """Prepares the data and fetches the base on rank 0; then one rank of each node asks for them, then the others."""
    timeout_s = recipe.distributed.timeout_s
    with one_rank_first("data and base model", timeout_s, lambda: ReadFiles.of_this_process().to_json()) as read_before:
        if read_before is not None:
            ReadFiles.from_json(read_before).trust()
        data = prepare_data(recipe)
        fetch_base(recipe.model)
    return data


def _finished(recipe: Recipe, run: RunDir, data: PreparedData) -> TrainResult:
    """The result of a run that was already finished, after checking that data and base are the same."""
    if read_json(run.path, MANIFEST).get("unpacked"):
        data = unpacked(data, recipe)
    plan = make_plan(recipe, agreed_world(), data.volume)
    facts = RunFacts.collect(recipe, data, plan, _base_hash(recipe), identity=run.data_identity)
    confirm_resume(run.decision, run.path, facts).raise_if_refused()
    return TrainResult(run.final, last_metrics(run.metrics), ("this run is finished",), trained=False)


def _base_hash(recipe: Recipe) -> str:
    """The hash of the base, whose files only rank 0 reads."""
    found: str = broadcast_from_rank0(base_hash(recipe.model) if is_main_process() else None)
    return found


def _train(
    recipe: Recipe,
    run: RunDir,
    data: PreparedData,
    request: StopRequest,
    extensions: Extensions,
    verifier: Verifier,
) -> TrainResult:
    """Loads the model, confirms that the run may resume, trains, and exports. Called on every rank."""
    recorded, opening_notes = recorded_choices(run.path, run.checkpoint), run.notes
    plan = make_plan(recipe, agreed_world(), data.volume, recorded=recorded)
    check_launcher_config(recipe, plan, os.environ)
    if plan.processes == 1:  # a single process is not sharded, whatever accelerate's configuration says
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    shared = SharedWeights(is_main_process(), broadcast_weights) if plan.processes > 1 else None
    model = load_model(recipe.model, data.chat, recipe.seed, shared)
    earlier = without_private(read_stages(base_folder(recipe.model.base, recipe.model.revision)), recipe)
    _set_threads(model.num_parameters())
    kernel, given = attention_description(model), recipe
    _log_attention(model, recipe)
    recipe, data, plan = adapt_to_model(forward_path(model), kernel, recipe, data, plan, recorded)
    facts = RunFacts.collect(given, data, plan, _base_hash(given), kernel, run.data_identity)
    run = _confirm(run, facts)
    if run.checkpoint is not None:
        facts = facts.resumed(read_json(run.checkpoint, MANIFEST))
    _check_end(run, recipe, plan)
    disk = _disk_space(model, recipe, plan, run.path)
    with disk.full_disk_errors(remove_partial=is_main_process()), out_of_memory_errors(recipe, lambda: plan):
        flops = add_adapter(model, recipe, data.chat.new_ids, facts)
        if recipe.train.micro_batch_size == "auto" and plan.gpu is not None and run.checkpoint is None:
            plan = probe_micro_batch(model, recipe, data, plan)
            facts = facts.trained_by(plan)
        _log_choices(plan)
        if is_main_process():
            disk.check_run(plan, run.step, recipe.checkpoints_kept, best=recipe.train.best_metric is not None)
            if run.checkpoint is None:
                run.metrics.unlink(missing_ok=True)
                _warn_all(epochs_rounded_up(recipe, plan))
            write_start(run, given, facts)
            write_data_report(run.path, recipe, data)
        barrier()
        extensions = replace(
            extensions, callbacks=(AfterEvaluation(partial(_write_report, run.path)), *extensions.callbacks)
        )
        with _reported(run.path, given, plan):
            trainer = fit(model, data, recipe, plan, run, facts, flops, disk, request, extensions)
            metrics, best = _export(trainer, recipe, data, plan, run, earlier, verifier)
            kept = trainer if gate_of(given) is None else None
            del trainer, model  # a gate loads the exported model and its parent
            publish(given, data.chat)
            if is_main_process():
                write_end(run, best, None if verifier.verified is None else asdict(verifier.verified))
    stop_requested = any(gather_object([request.signal_name]))  # also a barrier
    return TrainResult(run.final, metrics, opening_notes, asked_to_stop=stop_requested, trainer=kept)


def _export(
    trainer: Trainer,
    recipe: Recipe,
    data: PreparedData,
    plan: Plan,
    run: RunDir,
    earlier: list[Stage],
    verifier: Verifier,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Gathers the weights on rank 0, which writes and verifies them.

    Returns:
        The last metrics, and the best evaluation if the run kept that.
    """
    bare = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    model, state = gather_final_model(trainer.model_wrapped, bare, recipe.model, data.chat, recipe.seed)
    metrics, best, step = last_metrics(run.metrics), trainer.run_state.best, trainer.state.global_step
    selection = [] if best is None else best_summary(best, step, plan.steps)
    for line in selection:
        logger.info(line)
    if is_main_process():
        check_final(state, recipe.model.dtype, step)
    losses = verifier.losses_in_training(trainer, bare, recipe, data)
    if is_main_process():
        trained = plan.trained(step, trainer.epochs_at(step))
        facts, parameters = trainer.checkpointer.provenance, model.num_parameters()
        stage = Stage.of(recipe, trained, data.summary, facts, metrics, selection, parameters)
        folder, code = model_folder(recipe), recipe.model.trust_remote_code
        verify = partial(verifier.verify, model=model, losses=losses, trust_remote_code=code, name=folder.name)
        save_final(state, model, data.chat, [*earlier, stage], folder, recipe.model.dtype, verify)
    return metrics, None if best is None else best.state_dict()


@contextmanager
def _reported(run: Path, recipe: Recipe, plan: Plan) -> Iterator[None]:
    """On the main process: records how the `with` block ends, and writes the report then."""
    if not is_main_process():
        yield
        return
    try:
        with recorded_status(run, plan, Privacy(recipe.data)):
            yield
    finally:
        _write_report(run)


def _write_report(run: Path) -> None:
    """Writes the report; a full disk is a warning, since the report can be written again from the run's files."""
    try:
        write_report(run)
    except (OSError, RunEnvironmentError) as error:
        logger.warning(f"report.html is not written ({first_line(error)}): `nesso-tune report {run}` writes it later")


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
    if not run.finished and recipe.model.dtype == "bfloat16" and not _multiplies_bfloat16():
        logger.warning("bfloat16 is slow on this CPU: model.dtype: float32 is faster here")


def _multiplies_bfloat16() -> bool:
    """Whether the GPU, or else the CPU, has instructions for it; without them, a CPU takes up to 100 times as long."""
    names = "avx512_bf16", "amx_bf16", "bf16"  # the last is ARM's
    return torch.cuda.is_available() or any(map(torch.cpu.get_capabilities().get, names))


def _log_attention(model: PreTrainedModel, recipe: Recipe) -> None:
    """On a GPU: the kernel of document attention, and why it is not a faster one."""
    if not torch.cuda.is_available() or not uses_document_attention(model):
        return
    choice = choose_attention(recipe.model.attention, recipe.model.dtype, AttentionShape.of(model.config))
    level = logging.WARNING if choice.kernel == "sdpa" and choice.reason else logging.INFO
    logger.log(level, f"attention: {choice}")


def _log_choices(plan: Plan) -> None:
    """What `auto` chose, and why."""
    if plan.micro_batch_reason:
        rows = f"{plan.micro_batch} x {plan.accumulation} rows per process and step"
        logger.info(f"micro batch auto: {rows} ({plan.micro_batch_reason})")
    if plan.sharding_reason:
        how = "sharded (full_shard)" if plan.sharded else "replicated (DDP)"  # auto never takes hybrid_shard
        logger.info(f"fsdp auto: {how}: {plan.sharding_reason}")


def _log_data(report: DataReport) -> None:
    """Dropped rows, columns and message keys that are not read, shares of the mixture, and warnings."""
    if report.dropped:
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in report.dropped.items())
        logger.warning(f"{report.rows_kept:,} of {report.rows_read:,} rows kept; dropped: {dropped}")
    for name, keys in report.unread.items():
        logger.info(f"not read of {name}: {listed_keys(keys)}")
    if len(report.mixture) > 1:
        shares = ", ".join(f"{group.name} {group.share_of_tokens:.1%}" for group in report.mixture)
        logger.info(f"tokens per epoch: {shares}")
    _warn_all(report.warnings)


def _close(run: RunDir, overwrites: bool) -> None:
    """Closes the run directory; says how to resume an unfinished run."""
    restored = run.close()
    if overwrites and not restored and checkpoints(run.path) and not run.final.exists():
        logger.info("to resume this run, omit --overwrite, which would start it again")


def _warn_all(texts: Iterable[str]) -> None:
    for text in texts:
        logger.warning(text)
