"""Evaluation during training: loss on the validation rows, generated answers, the best checkpoint, early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, Trainer

from nesso_tune.data.packing import Rows
from nesso_tune.data.privacy import Privacy
from nesso_tune.distributed.process_group import broadcast_from_rank0, is_main_process
from nesso_tune.errors import NumericalError, RecipeError, RunEnvironmentError
from nesso_tune.generation.answers import (
    Answer,
    Prompt,
    answer_metrics,
    generate_answers,
    length_ratios,
    select_prompts,
)
from nesso_tune.metric_registry import VALIDATION_METRICS, AnswerScore, better_direction, overall_metric, suggest_metric
from nesso_tune.recipes.builtin import SOURCE_SEPARATOR
from nesso_tune.recipes.schema import EvaluationSection, Recipe
from nesso_tune.runs.checkpoint import checkpoint_path, read_manifest
from nesso_tune.runs.metrics_log import MetricsLog, read_metrics
from nesso_tune.training.dataset import Collator, CountedBatch
from nesso_tune.training.fsdp import gathered_weights
from nesso_tune.training.grouped_metrics import Groups, MetricSpec

EvaluateLoss = Callable[[Any, list[CountedBatch], Groups], dict[str, float]]  # of SFT or DPO; takes its trainer
LOGGED_ANSWERS = 8  # per evaluation
PARENT, EARLY_STOPPED = "parent", "early_stopped"  # events of metrics.jsonl
BEST_METRIC = "train.best_metric"


@dataclass
class Evaluator:
    """Evaluates the model of a trainer: loss on the validation rows, and metrics of generated answers.

    Attributes:
        section: the recipe's settings.
        rows: validation rows.
        train_rows: training rows of epoch 0, for training prompts.
        collate: rows to a batch.
        micro_batch: rows per batch.
        evaluate_loss: loss and metrics over batches, of the training method.
        tokenizer: decodes answers.
        log: gets the answers that may be shown.
        total_steps: the step at which training prompts are answered too.
        sources: names of the sources of `rows` (of `train_rows`, without validation rows) for metrics by source; empty
            for none.
        shares_prompts: each process answers a part of the prompts, with the whole weights; sharded ones are gathered
            once for all of them. Otherwise every process answers all, and gathers each layer for each token.
        metrics: own metrics of the answers, by name.
        parent: metrics of the parent's answers to the same prompts, in DPO; see `load_parent_metrics`.
        prompts: those that are answered at every evaluation.
    """

    section: EvaluationSection
    rows: Rows
    train_rows: Rows
    collate: Collator
    micro_batch: int
    evaluate_loss: EvaluateLoss
    tokenizer: PreTrainedTokenizerBase
    log: MetricsLog
    total_steps: int
    sources: tuple[str, ...] = ()
    shares_prompts: bool = True
    metrics: Mapping[str, AnswerScore] = field(default_factory=dict)
    parent: Mapping[str, float] = field(default_factory=dict)
    prompts: list[Prompt] = field(init=False)

    def __post_init__(self) -> None:
        rows = self.rows if len(self.rows) else self.train_rows
        self.prompts = select_prompts(rows, self.section.samples)

    def __call__(self, trainer: Trainer) -> dict[str, Any]:
        """The metrics of the current step, for a line of `metrics.jsonl`. Every process must call this."""
        metrics: dict[str, Any] = {}
        if len(self.rows):
            metrics |= self.evaluate_loss(trainer, self._batches(trainer), self.collate.groups)
        prefix = "" if len(self.rows) else "train_"  # without validation rows, the prompts are training prompts
        answers = self._generate(trainer, self.prompts)
        self._log_answers(answers, trainer.state.global_step)
        metrics |= answer_metrics(answers, prefix, self.sources, self.metrics)
        metrics |= length_ratios(metrics, self.parent, prefix)
        if trainer.state.global_step == self.total_steps and self.section.train_samples:
            prompts = select_prompts(self.train_rows, self.section.train_samples)
            same_sources = self.train_rows.documents is self.rows.documents or not len(self.rows)
            answers = self._generate(trainer, prompts)
            metrics |= answer_metrics(answers, "train_", self.sources if same_sources else (), self.metrics)
        return metrics

    def load_parent_metrics(self, trainer: Trainer, generate: bool) -> None:
        """Sets `parent`, the metrics of the model that training starts from. Every process must call this.

        `parent` stays empty if `metrics.jsonl` has no metrics of the same prompts and answer length.

        Args:
            trainer: its model is the parent if `generate` is set.
            generate: a new run: generate the parent's answers and write their metrics to `metrics.jsonl`.
        """
        if generate:
            self._evaluate_parent(trainer)
        self.parent = broadcast_from_rank0(self._read_parent_metrics() if trainer.is_world_process_zero() else {})

    def _evaluate_parent(self, trainer: Trainer) -> None:
        was_training = trainer.model.training
        trainer.model.eval()
        answers = self._generate(trainer, self.prompts)
        trainer.model.train(was_training)
        if answers:
            settings = {"max_new_tokens": self.section.max_new_tokens}
            metrics = answer_metrics(answers, sources=self.sources, own=self.metrics)
            self.log.write({"step": 0, "event": PARENT, **settings, **metrics})

    def _read_parent_metrics(self) -> dict[str, Any]:
        wanted = {"event": PARENT, "answers": len(self.prompts), "max_new_tokens": self.section.max_new_tokens}
        lines = read_metrics(self.log.path) if self.log.path.exists() else []
        return next((line for line in lines if wanted.items() <= line.items()), {})

    def _batches(self, trainer: Trainer) -> list[CountedBatch]:
        """This process's batches of the validation rows, as many on every process; repeated ones do not count."""
        size = self.micro_batch
        batches = [list(range(i, min(i + size, len(self.rows)))) for i in range(0, len(self.rows), size)]
        world_size, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        own = [(min(i + rank, len(batches) - 1), i + rank < len(batches)) for i in range(0, len(batches), world_size)]
        return [(self.collate([self.rows[row] for row in batches[i]]), counted) for i, counted in own]

    def _generate(self, trainer: Trainer, prompts: list[Prompt]) -> list[Answer]:
        if not prompts:
            return []
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        autocast, limit = trainer.compute_loss_context_manager(), self.section.max_new_tokens
        if not self.shares_prompts:
            return generate_answers(model, self.tokenizer, prompts, limit, autocast)
        part = trainer.accelerator.process_index, trainer.accelerator.num_processes
        with gathered_weights(model):
            return generate_answers(model, self.tokenizer, prompts, limit, autocast, *part)

    def _log_answers(self, answers: list[Answer], step: int) -> None:
        """Writes the first answers to prompts that are not private to `metrics.jsonl`."""
        public = [answer for answer in answers if not answer.prompt.private]
        for answer in public[:LOGGED_ANSWERS]:
            prompt = self.tokenizer.decode(answer.prompt.ids, skip_special_tokens=True)
            line = {"language": answer.prompt.language, "prompt": prompt, "answer": answer.text}
            line |= {"expected": answer.expected, "stopped": answer.stopped}
            self.log.write({"step": step, "event": "answer", **line})


@dataclass
class BestCheckpoint:
    """The best evaluation of a run so far, equal on every process.

    Attributes:
        metric: name of the metric to compare.
        patience: number of evaluations without improvement after which the run stops early; None for never.
        step: of the best evaluation; None before the first.
        value: of the metric at this step.
        waited: number of evaluations since then.
    """

    metric: str
    patience: int | None = None
    step: int | None = None
    value: float | None = None
    waited: int = 0

    @property
    def out_of_patience(self) -> bool:
        """Whether the run stops early."""
        return self.patience is not None and self.waited >= self.patience

    def update(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Adds an evaluation and returns whether it is the best so far. Ties, NaN and infinity are no improvement.

        Raises:
            RecipeError: if the evaluation has no such metric.
        """
        if self.metric not in metrics:
            remedy = suggest_metric(self.metric, sorted(metrics))
            raise RecipeError(BEST_METRIC, f"`{self.metric}` is not measured", remedy)
        value = float(metrics[self.metric])
        sign = 1 if better_direction(self.metric) == "higher" else -1
        if not math.isfinite(value) or (self.value is not None and sign * value <= sign * self.value):
            self.waited += 1
            return False
        self.step, self.value, self.waited = step, value, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """All attributes as plain data, exact."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restores what `state_dict` returned. The state of another metric is ignored."""
        if state and state["metric"] == self.metric:
            self.step, self.value, self.waited = state["step"], state["value"], state["waited"]


def best_checkpoint_for(recipe: Recipe, spec: MetricSpec, validation: Rows) -> BestCheckpoint | None:
    """The empty `BestCheckpoint` of a recipe; None if the run keeps its last weights.

    Args:
        recipe: has the metric and the patience.
        spec: metrics of the validation rows, without `eval_`.
        validation: the validation rows.

    Raises:
        RecipeError: if a metric of validation rows will not be measured.
    """
    if recipe.train.best_metric is None:
        return None
    metric = Privacy(recipe.data).metric_name(recipe.train.best_metric)
    whole = overall_metric(metric)
    if whole in VALIDATION_METRICS:
        languages = sorted({validation.documents.language(int(entry)) for entry in np.unique(validation.records)})
        if not languages:
            raise RecipeError(
                BEST_METRIC, f"`{metric}` is not measured: there are no validation rows", "raise data.validation_size"
            )
        suffixes = ["", *(f"/{code}" for code in languages)]
        measured = [
            f"eval_{name}{suffix}"
            for name in spec.names
            for suffix in (suffixes[:1] if name in spec.ungrouped else suffixes)
        ]
        grouped = whole.removeprefix("eval_") not in spec.ungrouped
        # whether this source has validation rows is known at the first evaluation
        of_source = grouped and metric.startswith(f"{whole}{SOURCE_SEPARATOR}")
        if (whole if of_source else metric) not in measured:
            raise RecipeError(BEST_METRIC, f"`{metric}` is not measured by this run", suggest_metric(metric, measured))
    return BestCheckpoint(metric, recipe.train.early_stopping_patience)


def load_best_weights(trainer: Trainer, best: BestCheckpoint, log: MetricsLog) -> None:
    """Loads the weights of the best evaluation into the model and logs its step. Every process must call this.

    Raises:
        NumericalError: if the metric was never finite.
        RunEnvironmentError: if the checkpoint is missing or damaged.
    """
    step = trainer.state.global_step
    if best.step is None:
        raise NumericalError(
            BEST_METRIC, f"{best.metric} was not finite at any evaluation", "choose another metric"
        )  # fmt: skip
    if best.step != step:
        folder = checkpoint_path(Path(trainer.args.output_dir), best.step)
        if (why := broadcast_from_rank0(_why_unusable(folder) if is_main_process() else None)) is not None:
            raise RunEnvironmentError(
                str(folder), f"has the best {best.metric} but cannot be used: {why}",
                f"restore it, or keep the last weights: {BEST_METRIC}: null with --allow-changes {BEST_METRIC}",
            )  # fmt: skip
        trainer._load_from_checkpoint(str(folder))
    line = {"step": step, "event": "best", "metric": best.metric, "value": best.value, "taken": best.step}
    if is_main_process() and line not in read_metrics(
        log.path
    ):  # an earlier session may have been killed after writing it
        log.write(line)


def best_summary(best: BestCheckpoint, step: int, total_steps: int) -> list[str]:
    """Lines for the end of a run: whether it stopped early, and which weights `final/` has.

    Args:
        best: the best evaluation.
        step: the last step of the run.
        total_steps: of its plan.
    """
    early = (
        f"stopped early at step {step:,} of {total_steps:,}: no better {best.metric} in {best.waited} evaluation(s) "
        f"(train.early_stopping_patience)"
    )
    extreme = "highest" if better_direction(best.metric) == "higher" else "lowest"
    taken = f"final/ holds the weights of step {best.step:,}: {best.metric} {best.value:.4g} is the {extreme}"
    return [*([early] if step < total_steps else []), taken]


def _why_unusable(checkpoint: Path) -> str | None:
    try:
        read_manifest(checkpoint)
    except ValueError as error:
        return str(error)
    return None
