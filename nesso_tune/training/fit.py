"""From recipe and plan to the arguments of TRL's trainers. Nothing else sets one."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, SFTConfig

from nesso_tune.data.packing import in_order
from nesso_tune.data.prepare import PreparedData
from nesso_tune.data.privacy import Privacy
from nesso_tune.distributed.preemption import StopRequest, StopWhenAsked
from nesso_tune.distributed.process_group import from_first
from nesso_tune.errors import Preempted, RunEnvironmentError
from nesso_tune.logs import print_notes
from nesso_tune.model.adapters import adapt
from nesso_tune.model.lm_head import attach_supervised_head, forward_path
from nesso_tune.model.loading import compile_layers
from nesso_tune.planning.plan import Plan
from nesso_tune.recipes.schema import DPORecipe, Recipe, SFTRecipe
from nesso_tune.runs.disk_space import DiskSpace
from nesso_tune.runs.metrics_log import MetricsLog
from nesso_tune.runs.provenance import RunFacts
from nesso_tune.runs.run_directory import RunDir
from nesso_tune.training import dpo, sft
from nesso_tune.training.alarms import Alarms
from nesso_tune.training.callbacks import Pace, Profile, ProgressBar
from nesso_tune.training.dataset import Collator, ConversationCollator, PairCollator, RunOrder
from nesso_tune.training.evaluation import Evaluator, LossOver, best_of, take_best
from nesso_tune.training.fsdp import check_sharded, fsdp_arguments
from nesso_tune.training.grouped_metrics import Figures, Groups, Tally
from nesso_tune.training.numerical_checks import Guard
from nesso_tune.training.reference import (
    cache_reference,
    cached_reference,
    compute_reference,
    load_reference,
    reference_key,
    save_reference,
)
from nesso_tune.training.throughput import Operations, Throughput
from nesso_tune.training.trainer import Track


def sft_arguments(recipe: SFTRecipe, plan: Plan, model: PreTrainedModel) -> SFTConfig:
    """Arguments of SFT: rows come prepared and collated, so TRL neither tokenises nor packs nor truncates."""
    return _on_one_device(
        SFTConfig(
            **_shared(recipe, plan, model),
            dataset_kwargs={"skip_prepare_dataset": True},
            packing=False,
            padding_free=False,
            max_length=None,
        )
    )


def dpo_arguments(recipe: DPORecipe, plan: Plan, model: PreTrainedModel) -> DPOConfig:
    """Arguments of DPO: pairs come prepared, and the reference's log-probabilities come with them."""
    dpo = recipe.dpo
    return _on_one_device(
        DPOConfig(
            **_shared(recipe, plan, model),
            beta=dpo.beta,
            loss_type=list(dpo.loss),
            loss_weights=list(dpo.loss.values()),
            label_smoothing=dpo.label_smoothing,
            ld_alpha=dpo.ld_alpha,
            max_length=None,
            precompute_ref_log_probs=True,
        )
    )


Arguments = TypeVar("Arguments", SFTConfig, DPOConfig)


def _on_one_device(arguments: Arguments) -> Arguments:
    """One process, one GPU: on a machine with several, transformers would split its rows over all of them."""
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _shared(recipe: Recipe, plan: Plan, model: PreTrainedModel) -> dict[str, Any]:
    train, on_gpu = recipe.train, torch.cuda.is_available()
    checkpointing = bool(plan.gradient_checkpointing)
    sharded = recipe.distributed.shards(plan.processes)
    if recipe.model.dtype == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise RunEnvironmentError("model.dtype", "this GPU has no bfloat16", "set model.dtype: float32")
    return {
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "use_cpu": not on_gpu,
        "bf16": recipe.model.dtype == "bfloat16",
        "max_steps": plan.total_steps,
        "per_device_train_batch_size": plan.micro_batch,
        "per_device_eval_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": plan.learning_rate,
        "optim": train.optimizer,
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_epsilon": train.adam_epsilon,
        "weight_decay": train.weight_decay,
        # the norm is measured even where nothing is clipped
        "max_grad_norm": float("inf") if train.max_grad_norm is None else train.max_grad_norm,
        "activation_checkpointing": checkpointing and not sharded,
        "router_aux_loss_coef": 0.0,  # the loss is the language model's; a dense model has no router to balance
        "ddp_find_unused_parameters": False,  # every weight has a part in every loss
        "ddp_timeout": recipe.distributed.timeout_s,
        "report_to": list(recipe.logging.report_to) or "none",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        # when to log, evaluate and save is decided by the plan, see `pace.py`
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        **(fsdp_arguments(model, checkpointing) if sharded else {}),
    }


def check_trackers(recipe: Recipe) -> None:
    """Raises RunEnvironmentError if a tracker of `logging.report_to` is not installed."""
    for tracker in recipe.logging.report_to:
        if find_spec(tracker) is None:
            raise RunEnvironmentError("logging.report_to", f"{tracker} is not installed", f"pip install {tracker}")


Trainer = sft.ConversationTrainer | dpo.PairTrainer


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
    """Trains `model` by the plan, writing metrics and checkpoints into the run directory.

    Args:
        model: float32 weights; trained in place.
        data: prepared rows.
        recipe, plan: what to do.
        run: the open run directory; its `checkpoint` is continued from.
        facts: recorded in every checkpoint's manifest.
        room: on the run's disk.
        request: whether a signal asked to stop.

    Returns:
        The trainer, whose `model_wrapped` holds the last weights, or with `train.best_metric` the best ones.

    Raises:
        NumericalError: if loss, gradient, weights or evaluation are not finite, or the first two leap, or the DPO
            reference is not what it starts from.
        Preempted: if the run was asked to stop; a checkpoint is saved.
        RecipeError, RunEnvironmentError: if `train.best_metric` is not measured, or the best checkpoint is damaged.
    """
    pad_id = model.config.pad_token_id
    trainer = _trainer(model, data, recipe, plan, run, facts, room)
    trainer.add_callback(_Beginning(trainer, data, run, facts, recipe))
    if recipe.train.profile:
        trainer.add_callback(Profile(trainer, run.path, plan.steps))
    _train_until_asked(trainer, plan, run, request)
    model.config.pad_token_id = pad_id  # transformers had put the tokenizer's there, whatever the model does with it
    return trainer


def _trainer(
    model: PreTrainedModel,
    data: PreparedData,
    recipe: Recipe,
    plan: Plan,
    run: RunDir,
    facts: RunFacts,
    room: DiskSpace,
) -> Trainer:
    """The trainer of the method, with all that it keeps track of; arguments as in `fit`."""
    kind, figures, loss_over, arguments = _method(recipe)
    groups = Groups.of(data.stream.documents)
    collate = _collator(
        model, recipe, data.chat.pad_id, groups, recipe.data.sequence_len if plan.torch_compile else None
    )
    best, operations = best_of(recipe, figures, data.validation), _adapted(model, recipe, data.chat.new_ids)
    config = model.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None)
    trainer: Trainer = kind(
        model=model,
        args=arguments(recipe, plan, model),
        data_collator=collate,
        train_dataset=_sample(data),
        processing_class=data.tokenizer,
        callbacks=[Pace(plan), ProgressBar(Path(recipe.output_dir).name)],
    )
    if coefficient is not None:  # TRL writes the one of its arguments there
        config.router_aux_loss_coef = coefficient
    trainer.remove_callback(PrinterCallback)  # our own lines say it
    attach_supervised_head(model)
    if plan.torch_compile:
        compile_layers(model)
    log, order = MetricsLog(run.metrics, trainer.is_world_process_zero()), RunOrder(data.stream, plan.rows_seen)
    trainer.track = Track(
        plan=plan,
        order=order,
        tally=Tally(figures, groups, trainer.args.device),
        guard=Guard(recipe.train.on_spike, order, log),
        log=log,
        alarms=Alarms(log, recipe.method, plan.steps, looks=trainer.is_world_process_zero()),
        evaluate=_evaluator(model, recipe, data, plan, loss_over, log),
        best=best,
        throughput=Throughput(operations),
        room=room,
        keep=recipe.checkpoint.keep,
        in_shards=recipe.distributed.in_shards(plan.processes),
        facts=facts,
    )
    return trainer


def _adapted(model: PreTrainedModel, recipe: Recipe, new_ids: list[int]) -> Operations:
    """Puts the recipe's adapter, if it has one, into the model; the operations that training it takes."""
    operations = Operations.of(model)
    if recipe.model.adapter is None:
        return operations
    adapt(model, recipe.model, new_ids, recipe.seed)
    return operations.under_adapter(sum(p.numel() for p in model.parameters() if p.requires_grad))


def _method(recipe: Recipe) -> tuple[Any, Figures, Any, Any]:
    """Trainer, what is reported of its training, evaluation and arguments of SFT or DPO."""
    if isinstance(recipe, SFTRecipe):
        return sft.ConversationTrainer, sft.FIGURES, sft.evaluate_loss, sft_arguments
    return dpo.PairTrainer, dpo.pair_figures(recipe.dpo.loss), dpo.evaluate_pairs, dpo_arguments


def _collator(
    model: PreTrainedModel, recipe: Recipe, pad_id: int, groups: Groups, length: int | None = None
) -> Collator:
    """Rows to batches, without padding where the model attends by document.

    Compiled layers want rows of one `length`.
    """
    path = forward_path(model)
    if recipe.method == "dpo":
        return PairCollator(pad_id, groups, path.by_document)
    return ConversationCollator(pad_id, groups, path.by_document, length, path.packs)


def _evaluator(
    model: PreTrainedModel, recipe: Recipe, data: PreparedData, plan: Plan, loss_over: LossOver, log: MetricsLog
) -> Evaluator | None:
    if recipe.evaluation is None:
        return None
    asked = data.validation.documents if len(data.validation) else data.train.documents
    collate = _collator(model, recipe, data.chat.pad_id, Groups.of(asked))
    sources = asked.source_names if len(collate.groups.sources) > 1 else ()
    return Evaluator(
        recipe.evaluation, data.validation, data.train, collate, plan.micro_batch, loss_over, data.tokenizer, log,
        plan.steps, sources,
    )  # fmt: skip


def _train_until_asked(trainer: Trainer, plan: Plan, run: RunDir, request: StopRequest) -> None:
    """Trains to the end, and takes the best weights if they are wanted.

    Raises:
        Preempted: if a signal asked to stop; a checkpoint of that step is saved.
    """
    trainer.add_callback(stop := StopWhenAsked(trainer, request, plan.steps))
    request.wait_for_steps()
    trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    best = trainer.track.best
    ended = best is not None and best.out_of_patience  # maybe at the step at which it was asked to stop
    if stop.stopped_at is not None and not ended:
        trainer.track.log.write({"step": stop.stopped_at, "event": "preempted"})
        raise Preempted(str(run.path), f"asked to stop; saved at step {stop.stopped_at}", "the same command continues")
    if best is not None:
        take_best(trainer)


class _Beginning(TrainerCallback):
    """What happens when the weights are in place and the first step has not begun."""

    def __init__(self, trainer: Trainer, data: PreparedData, run: RunDir, facts: RunFacts, recipe: Recipe) -> None:
        self._trainer, self._data, self._run, self._facts, self._recipe = trainer, data, run, facts, recipe

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer."""
        trainer, track = self._trainer, self._trainer.track
        if self._recipe.distributed.shards(track.plan.processes):
            check_sharded(trainer.model_wrapped)
        if self._run.checkpoint is not None:
            track.log.truncate_after(state.global_step)
            changed = Privacy(self._recipe.data).changes(self._run.changed)
            facts: dict[str, Any] = {"changed": changed} if changed else {}
            facts |= {"environment": self._run.environment} if self._run.environment else {}
            track.log.write({"step": state.global_step, "event": "resumed", **facts})
        if isinstance(trainer, dpo.PairTrainer) and isinstance(self._recipe, DPORecipe):
            trainer.reference = self._reference(trainer, self._recipe)
            if isinstance(track.evaluate, Evaluator):
                track.evaluate.meet_parent(trainer, begins=self._run.checkpoint is None)
        track.alarms.recall(self._run.metrics)
        track.throughput.begin(trainer)

    def _reference(self, trainer: dpo.PairTrainer, recipe: DPORecipe) -> dpo.Reference:
        if self._run.checkpoint is not None:
            return load_reference(self._run.path, self._facts.start)
        began, data, first = time.monotonic(), self._data, trainer.is_world_process_zero()
        parts = [in_order(data.stream.documents, data.stream.entries, None), data.validation]
        parts = [part for part in parts if len(part)]
        key = reference_key(recipe, self._facts, parts) if first else ""
        reference: dpo.Reference | None = from_first(cached_reference(key) if first else None)
        cached, pairs = reference is not None, sum(map(len, parts))
        if first:
            said = f"{pairs:,} pairs are scored already" if cached else f"scoring {pairs:,} pairs, once"
            print_notes(f"reference: {said}")
        if reference is None:
            groups = Groups.of(*(part.documents for part in parts))
            collate = PairCollator(data.chat.pad_id, groups, trainer.data_collator.by_document)
            reference = compute_reference(trainer, parts, collate)
        if first:
            if not cached:
                cache_reference(key, reference)
            save_reference(self._run.path, reference, self._facts.start)
        seconds = round(time.monotonic() - began, 3)
        trainer.track.log.write({"step": 0, "event": "reference", "pairs": pairs, "cached": cached, "seconds": seconds})
        return reference


def _sample(data: PreparedData) -> datasets.Dataset:
    """One row, for what TRL's constructors look at; the rows themselves come from `RunOrder`."""
    return datasets.Dataset.from_list([data.train[0]])
