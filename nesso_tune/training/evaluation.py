"""What is measured while a run trains: loss on the validation rows, and answers to prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from nesso_tune.data.packing import Rows
from nesso_tune.data.privacy import Privacy
from nesso_tune.distributed.process_group import from_first, is_first
from nesso_tune.errors import NumericalError, RecipeError, RunEnvironmentError
from nesso_tune.generation.answers import Answer, Prompt, answer, choose_prompts, length_ratios, measure
from nesso_tune.metrics import VALIDATION_METRICS, better_direction, overall_metric, suggest_metric
from nesso_tune.recipes.builtin import OF_SOURCE
from nesso_tune.recipes.schema import EvaluationSection, Recipe
from nesso_tune.runs.checkpoint import PREFIX, read_manifest
from nesso_tune.runs.metrics_log import MetricsLog, read_metrics
from nesso_tune.training.dataset import Collator, CountedBatch
from nesso_tune.training.grouped_metrics import Figures, Groups

LossOver = Callable[[Any, list[CountedBatch], Groups], dict[str, float]]
SHOWN = 8  # answers that are written out at each evaluation
PARENT = "parent"  # the event of the line with the figures of the parent's answers


@dataclass
class Evaluator:
    """Measures a trainer's model. Called by the trainer at its intervals and at the end.

    Attributes:
        section: what to measure.
        rows: validation rows.
        train_rows: rows of epoch 0, for prompts that were trained on.
        collate: rows to a batch.
        micro_batch: rows of a batch.
        loss_over: the method's loss and metrics over batches.
        tokenizer: chat-ready.
        log: where the answers are written.
        total_steps: the step at which the training prompts are answered.
        sources: names of the sources that `rows` come from (`train_rows`, where nothing is held out), for the figures
            by source; none if empty.
        parent: figures of the parent's answers to the same prompts, in DPO; see `meet_parent`.
    """

    section: EvaluationSection
    rows: Rows
    train_rows: Rows
    collate: Collator
    micro_batch: int
    loss_over: LossOver
    tokenizer: PreTrainedTokenizerBase
    log: MetricsLog
    total_steps: int
    sources: tuple[str, ...] = ()
    parent: Mapping[str, float] = field(default_factory=dict)
    prompts: list[Prompt] = field(init=False)

    def __post_init__(self) -> None:
        asked = self.rows if len(self.rows) else self.train_rows
        self.prompts = choose_prompts(asked, self.section.samples)

    def __call__(self, trainer: Any) -> dict[str, Any]:
        """Metrics by name, ready for a line of metrics.jsonl."""
        metrics: dict[str, Any] = {}
        if len(self.rows):
            metrics |= self.loss_over(trainer, self._batches(trainer), self.collate.groups)
        prefix = "" if len(self.rows) else "train_"  # without held-out rows the prompts are those of training
        answers = self._answers(trainer, self.prompts)
        self._show([one for one in answers if not one.prompt.private][:SHOWN], trainer.state.global_step)
        metrics |= measure(answers, prefix, self.sources)
        metrics |= length_ratios(metrics, self.parent, prefix)
        if trainer.state.global_step == self.total_steps and self.section.train_samples:
            known = choose_prompts(self.train_rows, self.section.train_samples)
            same = self.train_rows.documents is self.rows.documents or not len(self.rows)
            metrics |= measure(self._answers(trainer, known), "train_", self.sources if same else ())
        return metrics

    def meet_parent(self, trainer: Any, begins: bool) -> None:
        """Takes the figures of the parent, the model that training starts from; all processes call this.

        Where a run begins the parent is asked, and a line of metrics.jsonl keeps the figures; later they are read back.
        If other prompts were asked then, or other lengths allowed, there are none.
        """
        if begins:
            self._ask_parent(trainer)
        self.parent = from_first(self._noted() if trainer.is_world_process_zero() else {})

    def _ask_parent(self, trainer: Any) -> None:
        was_training = trainer.model.training
        trainer.model.eval()
        answers = self._answers(trainer, self.prompts)
        trainer.model.train(was_training)
        if answers:
            allowed = {"max_new_tokens": self.section.max_new_tokens}
            self.log.write({"step": 0, "event": PARENT, **allowed, **measure(answers, sources=self.sources)})

    def _noted(self) -> dict[str, Any]:
        asked = {"event": PARENT, "answers": len(self.prompts), "max_new_tokens": self.section.max_new_tokens}
        lines = read_metrics(self.log.path) if self.log.path.exists() else []
        return next((line for line in lines if asked.items() <= line.items()), {})

    def _batches(self, trainer: Any) -> list[CountedBatch]:
        """This process's share of the validation rows, filled up to what the others have."""
        size = self.micro_batch
        batches = [list(range(i, min(i + size, len(self.rows)))) for i in range(0, len(self.rows), size)]
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        mine = [(min(i + rank, len(batches) - 1), i + rank < len(batches)) for i in range(0, len(batches), world)]
        return [(self.collate([self.rows[row] for row in batches[i]]), counted) for i, counted in mine]

    def _answers(self, trainer: Any, prompts: list[Prompt]) -> list[Answer]:
        if not prompts:
            return []
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        autocast = trainer.compute_loss_context_manager()
        return answer(model, self.tokenizer, prompts, self.section.max_new_tokens, autocast)

    def _show(self, answers: list[Answer], step: int) -> None:
        """Writes answers to prompts that may be shown out, a line of metrics.jsonl each."""
        for one in answers:
            question = self.tokenizer.decode(one.prompt.ids, skip_special_tokens=True)
            line = {"language": one.prompt.language, "prompt": question, "answer": one.text}
            line |= {"expected": one.expected, "stopped": one.stopped}
            self.log.write({"step": step, "event": "answer", **line})


KEY = "train.best_metric"


@dataclass
class Best:
    """The best evaluation of a run so far. Every process holds the same: all are told the first one's metrics.

    Attributes:
        metric: name of the metric that decides.
        patience: evaluations without improvement after which the run ends; None for never.
        step: of the best evaluation; None before the first.
        value: of the metric there.
        waited: evaluations since then.
    """

    metric: str
    patience: int | None = None
    step: int | None = None
    value: float | None = None
    waited: int = 0

    @property
    def out_of_patience(self) -> bool:
        """Whether the run ends here, however many steps its plan has left."""
        return self.patience is not None and self.waited >= self.patience

    def note(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Takes an evaluation; whether it is better than all before. An equal one is not, nor is NaN or infinity.

        Raises:
            RecipeError: if the metric was not measured, with those that were.
        """
        if self.metric not in metrics:
            raise RecipeError(KEY, f"`{self.metric}` is not measured", suggest_metric(self.metric, sorted(metrics)))
        value = float(metrics[self.metric])
        sign = 1 if better_direction(self.metric) == "higher" else -1
        if not math.isfinite(value) or (self.value is not None and sign * value <= sign * self.value):
            self.waited += 1
            return False
        self.step, self.value, self.waited = step, value, 0
        return True

    def state(self) -> dict[str, Any]:
        """All of it as plain data, exact."""
        return asdict(self)

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Takes back what `state` gave; of another metric nothing, so that the search begins anew."""
        if state and state["metric"] == self.metric:
            self.step, self.value, self.waited = state["step"], state["value"], state["waited"]


def best_of(recipe: Recipe, figures: Figures, validation: Rows) -> Best | None:
    """What a recipe wants to be kept; None if it takes the last weights.

    Args:
        recipe: says the metric and the patience.
        figures: what is measured on held-out rows, without `eval_`.
        validation: the held-out rows.

    Raises:
        RecipeError: if the metric would be measured on held-out rows and will not be.
    """
    if recipe.train.best_metric is None:
        return None
    metric = Privacy(recipe.data).metric(recipe.train.best_metric)
    whole = overall_metric(metric)
    if whole in VALIDATION_METRICS:
        languages = sorted({validation.documents.language(int(entry)) for entry in np.unique(validation.entries)})
        if not languages:
            raise RecipeError(KEY, f"`{metric}` is not measured: no row is held out", "raise data.validation_size")
        parts = ["", *(f"/{code}" for code in languages)]
        measured = [
            f"eval_{name}{part}" for name in figures.names for part in (parts[:1] if name in figures.whole else parts)
        ]
        divided = whole.removeprefix("eval_") not in figures.whole
        of_source = divided and metric.startswith(f"{whole}{OF_SOURCE}")  # which there are shows the first evaluation
        if (whole if of_source else metric) not in measured:
            raise RecipeError(KEY, f"`{metric}` is not measured by this run", suggest_metric(metric, measured))
    return Best(metric, recipe.train.early_stopping_patience)


def take_best(trainer: Any) -> None:
    """Puts the weights of the best evaluation into the trained model and notes it in metrics.jsonl. All call this.

    Raises:
        NumericalError: if the metric never was a number.
        RunEnvironmentError: if the checkpoint that holds them is missing or damaged.
    """
    best, step = trainer.track.best, trainer.state.global_step
    if best.step is None:
        raise NumericalError(KEY, f"{best.metric} was not a number at any evaluation", "choose another metric")
    if best.step != step:
        folder = Path(trainer.args.output_dir) / f"{PREFIX}{best.step}"
        if (why := from_first(_why_unusable(folder) if is_first() else None)) is not None:
            raise RunEnvironmentError(
                str(folder), f"holds the best {best.metric} and cannot be used: {why}",
                f"restore it, or take the last weights: {KEY}: null with --allow-changes {KEY}",
            )  # fmt: skip
        trainer._load_from_checkpoint(str(folder))
    line = {"step": step, "event": "best", "metric": best.metric, "value": best.value, "taken": best.step}
    log = trainer.track.log
    if is_first() and line not in read_metrics(log.path):  # a session that was killed after it may have written it
        log.write(line)


def in_words(best: Best, step: int, steps: int) -> list[str]:
    """What a person should know at the end.

    Args:
        best: where the search ended.
        step, steps: where the run ended, and where its plan does.
    """
    early = (
        f"stopped early at step {step:,} of {steps:,}: no better {best.metric} in {best.waited} evaluation(s) "
        f"(train.early_stopping_patience)"
    )
    taken = f"final/ holds the weights of step {best.step:,}: {best.metric} {best.value:.4g} is the {_most(best)}"
    return [*([early] if step < steps else []), taken]


def _most(best: Best) -> str:
    return "highest" if better_direction(best.metric) == "higher" else "lowest"


def _why_unusable(checkpoint: Path) -> str | None:
    try:
        read_manifest(checkpoint)
    except ValueError as why:
        return str(why)
    return None
