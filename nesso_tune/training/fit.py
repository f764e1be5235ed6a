"""Training a model by a recipe and a plan: builds the trainer, trains, and loads the best weights at the end."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from nesso_tune.data.prepare import PreparedData
from nesso_tune.data.privacy import Privacy
from nesso_tune.distributed.preemption import PreemptionCallback, StopRequest
from nesso_tune.errors import Preempted, RunEnvironmentError
from nesso_tune.logs import logger
from nesso_tune.model.adapters import adapt
from nesso_tune.model.lm_head import attach_supervised_head, forward_path
from nesso_tune.model.loading import compile_layers
from nesso_tune.planning.advice import MEMORY_SAFE_SHARE
from nesso_tune.planning.memory import CUDA_CONTEXT_BYTES
from nesso_tune.planning.plan import Plan
from nesso_tune.recipes.schema import DPORecipe, Recipe
from nesso_tune.runs.disk_space import DiskSpace
from nesso_tune.runs.metrics_log import MetricsLog
from nesso_tune.runs.provenance import RunFacts
from nesso_tune.runs.run_directory import RunDir
from nesso_tune.training.alarms import Alarms
from nesso_tune.training.callbacks import IntervalCallback, ProfilerCallback, ProgressBar
from nesso_tune.training.checkpoint import Checkpointer
from nesso_tune.training.dataset import RunDataset
from nesso_tune.training.dpo import PairTrainer
from nesso_tune.training.evaluator import Evaluator, best_checkpoint_for, load_best_weights
from nesso_tune.training.fsdp import check_sharded
from nesso_tune.training.grouped_metrics import GroupedMetrics, Groups
from nesso_tune.training.method import Method, method_of
from nesso_tune.training.numerical_checks import SpikeGuard
from nesso_tune.training.reference import prepare_reference
from nesso_tune.training.run_state import RunState
from nesso_tune.training.sft import ConversationTrainer
from nesso_tune.training.throughput import Throughput, TrainingFlops

Trainer = ConversationTrainer | PairTrainer


def fit(
    model: PreTrainedModel,
    data: PreparedData,
    recipe: Recipe,
    plan: Plan,
    run: RunDir,
    facts: RunFacts,
    room: DiskSpace,
    request: StopRequest,
) -> Trainer:
    """Trains `model` and writes metrics and checkpoints into the run directory.

    Args:
        model: float32 weights; trained in place.
        data: prepared rows.
        recipe: the settings.
        plan: steps, batch sizes and intervals.
        run: the open run directory; training resumes from its `checkpoint`.
        facts: provenance of the run, written into the manifest of every checkpoint.
        room: checks the disk space before each checkpoint.
        request: records signals that ask the run to stop.

    Returns:
        The trainer. Its `model_wrapped` has the last weights, or the best ones with `train.best_metric`.

    Raises:
        NumericalError: if loss, gradient, weights or evaluation are not finite; for a spike with
            `train.on_spike: stop`; or if the DPO reference differs from the initial policy.
        Preempted: if the run was asked to stop; a checkpoint is saved.
        RecipeError, RunEnvironmentError: if `train.best_metric` is not measured, or the best checkpoint is damaged.
    """
    pad_id = model.config.pad_token_id
    trainer = _make_trainer(model, data, recipe, plan, run, facts, room)
    trainer.add_callback(_StartCallback(trainer, data, run, facts, recipe))
    if recipe.train.profile:
        trainer.add_callback(ProfilerCallback(run.path, plan.steps, trainer.throughput))
    _train(trainer, plan, run, request)
    model.config.pad_token_id = pad_id  # transformers replaces it by the tokenizer's
    return trainer


def check_trackers(recipe: Recipe) -> None:
    """Raises RunEnvironmentError if a tracker of `logging.report_to` is not installed."""
    for tracker in recipe.logging.report_to:
        if find_spec(tracker) is None:
            raise RunEnvironmentError("logging.report_to", f"{tracker} is not installed", f"pip install {tracker}")


def _make_trainer(
    model: PreTrainedModel,
    data: PreparedData,
    recipe: Recipe,
    plan: Plan,
    run: RunDir,
    facts: RunFacts,
    room: DiskSpace,
) -> Trainer:
    """The trainer of the recipe's method, set up; arguments as of `fit`."""
    method, groups = method_of(recipe), Groups.of(data.stream.documents)
    length = recipe.data.sequence_len if plan.torch_compile else None  # compiled layers need a fixed shape
    collator = method.collator(forward_path(model), data.chat.pad_id, groups, length)
    best = best_checkpoint_for(recipe, method.metrics, data.validation)
    flops = _add_adapter(model, recipe, data.chat.new_ids, facts)
    config = model.config.get_text_config()
    router_aux_loss_coef = getattr(config, "router_aux_loss_coef", None)
    trainer: Trainer = method.trainer(
        model=model,
        args=method.arguments(plan, model),
        data_collator=collator,
        # TRL's constructors inspect the first row; training uses `run_dataset`
        train_dataset=datasets.Dataset.from_list([data.train[0]]),
        processing_class=data.tokenizer,
        callbacks=[IntervalCallback(plan), ProgressBar(Path(recipe.output_dir).name)],
    )
    if router_aux_loss_coef is not None:  # TRL overwrites it with the one of its arguments
        config.router_aux_loss_coef = router_aux_loss_coef
    trainer.remove_callback(PrinterCallback)  # replaced by `ProgressBar`
    attach_supervised_head(model)
    if plan.torch_compile:
        compile_layers(model)
    is_main = trainer.is_world_process_zero()
    log, dataset = MetricsLog(run.metrics, is_main), RunDataset(data.stream, plan.rows_seen)
    metrics = GroupedMetrics(method.metrics, groups, trainer.args.device)
    state = RunState(metrics, SpikeGuard(recipe.train.on_spike, dataset, log), best)
    trainer.set_up(
        plan=plan,
        run_dataset=dataset,
        run_state=state,
        metrics_log=log,
        alarms=Alarms(log, recipe.method, plan.steps, enabled=is_main),
        evaluator=_make_evaluator(model, recipe, data, plan, method, log),
        throughput=Throughput(flops, trainer.accelerator, state),
        checkpointer=Checkpointer(room, recipe.checkpoint.keep, recipe.in_shards(plan.processes), facts),
    )
    return trainer


def _add_adapter(model: PreTrainedModel, recipe: Recipe, new_ids: list[int], facts: RunFacts) -> TrainingFlops:
    """Adds the recipe's adapter, if any, to the model, and returns the FLOPs of training."""
    flops = TrainingFlops.of(model)
    if recipe.model.adapter is None:
        return flops
    adapt(model, recipe.model, new_ids, recipe.seed, frozen=facts.frozen_weights)
    return flops.under_adapter(sum(p.numel() for p in model.parameters() if p.requires_grad))


def _make_evaluator(
    model: PreTrainedModel, recipe: Recipe, data: PreparedData, plan: Plan, method: Method, log: MetricsLog
) -> Evaluator | None:
    if recipe.evaluation is None:
        return None
    documents = data.validation.documents if len(data.validation) else data.train.documents
    groups = Groups.of(documents)
    return Evaluator(
        section=recipe.evaluation,
        rows=data.validation,
        train_rows=data.train,
        collate=method.collator(forward_path(model), data.chat.pad_id, groups, None),
        micro_batch=plan.micro_batch,
        evaluate_loss=method.evaluate_loss,
        tokenizer=data.tokenizer,
        log=log,
        total_steps=plan.steps,
        sources=documents.source_names if len(groups.sources) > 1 else (),
        shares_prompts=_shares_prompts(recipe, plan),
    )


def _shares_prompts(recipe: Recipe, plan: Plan) -> bool:
    """Whether each process has the whole weights while prompts are answered: if they fit beside the sharded state."""
    if plan.gpu is None or not recipe.shards(plan.processes):
        return True
    if plan.memory is not None and plan.shape is not None:
        weights = plan.shape.parameters * (2 if recipe.model.dtype == "bfloat16" else 4)
        if plan.memory.state + weights + CUDA_CONTEXT_BYTES <= MEMORY_SAFE_SHARE * plan.gpu.memory:
            return True
    logger.warning(
        "evaluation: the whole weights may not fit on one GPU: every rank answers all prompts, and gathers each layer "
        "for each token (slow); lower evaluation.samples if this takes too long"
    )
    return False


def _train(trainer: Trainer, plan: Plan, run: RunDir, request: StopRequest) -> None:
    """Trains to the end of the plan and loads the best weights if the recipe wants them.

    Raises:
        Preempted: if a signal asked to stop; a checkpoint of that step is saved.
    """
    trainer.add_callback(stop := PreemptionCallback(trainer, request, plan.steps))
    request.begin_training()
    trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    best = trainer.run_state.best
    stopped_early = best is not None and best.out_of_patience  # possibly at the same step as the stop request
    if stop.stopped_at is not None and not stopped_early:
        trainer.metrics_log.write({"step": stop.stopped_at, "event": "preempted"})
        saved = f"asked to stop; saved at step {stop.stopped_at}"
        preempted = Preempted(str(run.path), saved, "the same command continues")
        preempted.on_all_ranks = True
        raise preempted
    if best is not None:
        load_best_weights(trainer, best, trainer.metrics_log)


class _StartCallback(TrainerCallback):
    """Prepares a session after the weights are loaded and before its first step.

    Checks the sharding, truncates the metrics to the checkpoint, prepares the DPO reference and the parent's metrics,
    replays the alarms and starts the throughput measurement.
    """

    def __init__(self, trainer: Trainer, data: PreparedData, run: RunDir, facts: RunFacts, recipe: Recipe) -> None:
        self._trainer, self._data, self._run, self._facts, self._recipe = trainer, data, run, facts, recipe

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer."""
        trainer, recipe, run = self._trainer, self._recipe, self._run
        if recipe.shards(trainer.plan.processes):
            check_sharded(trainer.model_wrapped)
        if run.checkpoint is not None:
            trainer.metrics_log.truncate_after(state.global_step)
            trainer.metrics_log.write({"step": state.global_step, "event": "resumed", **self._changes()})
        if isinstance(trainer, PairTrainer) and isinstance(recipe, DPORecipe):
            trainer.reference = prepare_reference(trainer, self._data, recipe, run, self._facts)
            if trainer.evaluator is not None:
                trainer.evaluator.load_parent_metrics(trainer, generate=run.checkpoint is None)
        trainer.alarms.replay(run.metrics)
        trainer.throughput.start()

    def _changes(self) -> dict[str, Any]:
        """Changes of recipe and environment since the checkpoint."""
        changed = Privacy(self._recipe.data).shown_changes(self._run.changed)
        environment = self._run.environment
        return {**({"changed": changed} if changed else {}), **({"environment": environment} if environment else {})}
