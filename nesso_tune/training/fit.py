"""Training a model by a recipe and a plan: builds the trainer, trains, and loads the best weights at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from nesso_tune.data.prepare import PreparedData
from nesso_tune.data.privacy import Privacy
from nesso_tune.distributed.preemption import PreemptionCallback, StopRequest
from nesso_tune.errors import Preempted, RecipeError, RunEnvironmentError
from nesso_tune.logs import logger
from nesso_tune.metric_registry import AnswerScore, own_metrics
from nesso_tune.model.adapters import adapt
from nesso_tune.model.lm_head import attach_supervised_head, forward_path
from nesso_tune.model.loading import compile_layers
from nesso_tune.planning.memory import CUDA_CONTEXT_BYTES, MEMORY_SAFE_SHARE
from nesso_tune.planning.plan import Plan
from nesso_tune.recipes.schema import CheckpointSection, DPORecipe, Recipe
from nesso_tune.runs.disk_space import DiskSpace
from nesso_tune.runs.metrics_log import MetricsLog
from nesso_tune.runs.provenance import RunFacts
from nesso_tune.runs.run_directory import RunDir
from nesso_tune.training.alarms import Alarms
from nesso_tune.training.callbacks import IntervalCallback, ProfilerCallback, ProgressCallback
from nesso_tune.training.checkpoint import Checkpointer
from nesso_tune.training.dataset import RunDataset
from nesso_tune.training.dpo import PairTrainer
from nesso_tune.training.evaluator import EARLY_STOPPED, Evaluator, best_checkpoint_for, load_best_weights
from nesso_tune.training.fsdp import check_sharded
from nesso_tune.training.grouped_metrics import GroupedMetrics, Groups
from nesso_tune.training.method import Method, method_of
from nesso_tune.training.numerical_checks import SpikeGuard
from nesso_tune.training.reference import prepare_reference
from nesso_tune.training.run_state import RunState
from nesso_tune.training.sft import ConversationTrainer
from nesso_tune.training.throughput import Throughput, TrainingFlops

Trainer = ConversationTrainer | PairTrainer

# Of a run with `checkpoint: null`
ONLY_ON_REQUEST = CheckpointSection(keep=1, asynchronous=False)


@dataclass(frozen=True)
class Extensions:
    """The user's own code in a run.

    Attributes:
        callbacks: called after the trainer's own.
        metrics: of the answers during training, by name.
        alarms: whether alarms are raised; not in a smoke run, whose model has random weights.
    """

    callbacks: tuple[TrainerCallback, ...] = ()
    metrics: Mapping[str, AnswerScore] = field(default_factory=dict)
    alarms: bool = True

    @classmethod
    def of(
        cls,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        metrics: Mapping[str, AnswerScore] | None = None,
        alarms: bool = True,
    ) -> Extensions:
        """What was passed to `train`, with the registered and installed metrics.

        Raises:
            RecipeError: for a callback that cannot work here, or a metric without a proper name.
        """
        if not isinstance(callbacks, Iterable):
            what = f"must be a list, not {type(callbacks).__name__}"
            raise RecipeError("callbacks", what, "write callbacks=[callback]")
        made = tuple(one() if isinstance(one, type) else one for one in callbacks)
        for one in made:
            if not isinstance(one, TrainerCallback):
                what = f"{type(one).__name__} is no TrainerCallback of transformers"
                raise RecipeError("callbacks", what, "derive its class from TrainerCallback")
            if isinstance(one, EarlyStoppingCallback):
                remedy = "set train.best_metric and train.early_stopping_patience in the recipe"
                raise RecipeError("callbacks", "EarlyStoppingCallback needs arguments that are not used here", remedy)
        return cls(made, own_metrics(metrics), alarms)


def fit(
    model: PreTrainedModel,
    data: PreparedData,
    recipe: Recipe,
    plan: Plan,
    run: RunDir,
    facts: RunFacts,
    flops: TrainingFlops,
    room: DiskSpace,
    request: StopRequest,
    extensions: Extensions = Extensions(),
) -> Trainer:
    """Trains `model` and writes metrics and checkpoints into the run directory.

    Args:
        model: float32 weights, with the recipe's adapter (`add_adapter`); trained in place.
        data: prepared rows.
        recipe: the settings.
        plan: steps, batch sizes and intervals.
        run: the open run directory; training resumes from its `checkpoint`.
        facts: provenance of the run, written into the manifest of every checkpoint.
        flops: of training, from `add_adapter`.
        room: checks the disk space before each checkpoint.
        request: records signals that ask the run to stop.
        extensions: callbacks and metrics of the user.

    Returns:
        The trainer. Its `model_wrapped` has the last weights, or the best ones with `train.best_metric`.

    Raises:
        NumericalError: if loss, gradient, weights or evaluation are not finite; for a spike with
            `train.on_spike: stop`; or if the DPO reference differs from the initial policy.
        Preempted: if the run was asked to stop; a checkpoint is saved.
        RecipeError, RunEnvironmentError: if `train.best_metric` is not measured, or the best checkpoint is damaged.
    """
    pad_id = model.config.pad_token_id
    trainer = _make_trainer(model, data, recipe, plan, run, facts, flops, room, extensions)
    trainer.add_callback(_StartCallback(trainer, data, run, facts, recipe))
    if recipe.train.profile:
        trainer.add_callback(ProfilerCallback(run.path, plan.steps, trainer.throughput))
    for callback in extensions.callbacks:
        trainer.add_callback(callback)
    trainer.stateful_callbacks = [one for one in extensions.callbacks if isinstance(one, ExportableState)]
    try:
        _train(trainer, plan, run, request)
    finally:
        trainer.pop_callback(ProgressCallback).close()
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
    flops: TrainingFlops,
    room: DiskSpace,
    extensions: Extensions,
) -> Trainer:
    """The trainer of the recipe's method, set up; arguments as of `fit`."""
    method, groups = method_of(recipe), Groups.of(data.stream.documents)
    length = recipe.data.sequence_len if plan.torch_compile else None  # compiled layers need a fixed shape
    collator = method.collator(forward_path(model), data.chat.pad_id, groups, length)
    best = best_checkpoint_for(recipe, method.metrics, data.validation)
    config = model.config.get_text_config()
    router_aux_loss_coef = getattr(config, "router_aux_loss_coef", None)
    trainer: Trainer = method.trainer(
        model=model,
        args=method.arguments(plan, model),
        data_collator=collator,
        # TRL's constructors inspect the first row; training uses `run_dataset`
        train_dataset=datasets.Dataset.from_list([data.train[0]]),
        processing_class=data.tokenizer,
        callbacks=[IntervalCallback(plan), ProgressCallback(Path(recipe.output_dir).name)],
    )
    if router_aux_loss_coef is not None:  # TRL overwrites it with the one of its arguments
        config.router_aux_loss_coef = router_aux_loss_coef
    trainer.remove_callback(PrinterCallback)  # replaced by `ProgressCallback`
    attach_supervised_head(model, compiled=plan.torch_compile and torch.cuda.is_available())
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
        alarms=Alarms(log, recipe.method, plan.steps, enabled=is_main and extensions.alarms),
        evaluator=_make_evaluator(model, recipe, data, plan, method, log, extensions.metrics),
        throughput=Throughput(flops, trainer.accelerator, state),
        checkpointer=Checkpointer(
            room, recipe.checkpoint or ONLY_ON_REQUEST, plan.sharded_checkpoints, facts, recipe.distributed.timeout_s
        ),
    )
    return trainer


def add_adapter(model: PreTrainedModel, recipe: Recipe, new_ids: list[int], facts: RunFacts) -> TrainingFlops:
    """Adds the recipe's adapter, if any, to the model, and returns the FLOPs of training."""
    flops = TrainingFlops.of(model)
    if recipe.model.adapter is None:
        return flops
    adapt(model, recipe.model, new_ids, recipe.seed, frozen=facts.frozen_weights)
    return flops.under_adapter(sum(p.numel() for p in model.parameters() if p.requires_grad))


def _make_evaluator(
    model: PreTrainedModel,
    recipe: Recipe,
    data: PreparedData,
    plan: Plan,
    method: Method,
    log: MetricsLog,
    metrics: Mapping[str, AnswerScore],
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
        metrics=metrics,
    )


def _shares_prompts(recipe: Recipe, plan: Plan) -> bool:
    """Whether each process has the whole weights while prompts are answered: if they fit beside the sharded state."""
    if plan.gpu is None or not plan.sharded:
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
    with trainer.checkpointer.finished_at_end():
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    best = trainer.run_state.best
    stopped_early = best is not None and best.out_of_patience  # possibly at the same step as the stop request
    if stop.stopped_at is not None and not stopped_early:
        trainer.metrics_log.write({"step": stop.stopped_at, "event": "preempted"})
        saved = f"asked to stop; saved at step {stop.stopped_at}"
        preempted = Preempted(str(run.path), saved, "the same command continues")
        preempted.on_all_ranks = True
        raise preempted
    step = trainer.state.global_step
    if step < plan.steps and not stopped_early:
        logger.info(f"stopped early at step {step:,} of {plan.steps:,}: by a callback")
        trainer.metrics_log.write({"step": step, "event": EARLY_STOPPED, "by": "callback"})
    if best is not None:
        load_best_weights(trainer, best, trainer.metrics_log)


class _StartCallback(TrainerCallback):
    """Prepares a session after the weights are loaded and before its first step.

    Checks the sharding, truncates the metrics to the checkpoint, prepares the DPO reference and the parent's metrics,
    replays the alarms, compiles the layers and starts the throughput measurement.
    """

    def __init__(self, trainer: Trainer, data: PreparedData, run: RunDir, facts: RunFacts, recipe: Recipe) -> None:
        self._trainer, self._data, self._run, self._facts, self._recipe = trainer, data, run, facts, recipe

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer."""
        trainer, recipe, run = self._trainer, self._recipe, self._run
        if trainer.plan.sharded:
            check_sharded(trainer.model_wrapped, trainer.plan.shards, trainer.plan.replicas)
        if run.checkpoint is not None:
            trainer.metrics_log.truncate_after(state.global_step)
            trainer.metrics_log.write({"step": state.global_step, "event": "resumed", **self._changes()})
        if isinstance(trainer, PairTrainer) and isinstance(recipe, DPORecipe):
            trainer.reference = prepare_reference(trainer, self._data, recipe, run, self._facts)
            if trainer.evaluator is not None:
                trainer.evaluator.load_parent_metrics(trainer, generate=run.checkpoint is None)
        trainer.alarms.replay(run.metrics)
        if trainer.plan.torch_compile and isinstance(trainer, ConversationTrainer):
            trainer.warm_up()
        trainer.throughput.start()

    def _changes(self) -> dict[str, Any]:
        """Changes of recipe and environment since the checkpoint."""
        changed = Privacy(self._recipe.data).shown_changes(self._run.changed)
        environment = self._run.environment
        return {**({"changed": changed} if changed else {}), **({"environment": environment} if environment else {})}
