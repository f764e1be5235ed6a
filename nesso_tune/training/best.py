"""The best weights of a run: which evaluation they are of, when to stop waiting for better ones, and taking them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nesso_tune.data.packing import Rows
from nesso_tune.data.privacy import Privacy
from nesso_tune.errors import NumericalError, RecipeError, RunEnvironmentError
from nesso_tune.recipes.metric_names import HELD_OUT, better, did_you_mean, whole_metric
from nesso_tune.recipes.paths import OF_SOURCE
from nesso_tune.recipes.schema import Recipe
from nesso_tune.training.checkpoint import PREFIX, read_manifest
from nesso_tune.training.metrics import read_metrics
from nesso_tune.training.processes import from_first, is_first
from nesso_tune.training.tally import Figures

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
            raise RecipeError(KEY, f"`{self.metric}` is not measured", did_you_mean(self.metric, sorted(metrics)))
        value = float(metrics[self.metric])
        sign = 1 if better(self.metric) == "higher" else -1
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
    whole = whole_metric(metric)
    if whole in HELD_OUT:
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
            raise RecipeError(KEY, f"`{metric}` is not measured by this run", did_you_mean(metric, measured))
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
    return "highest" if better(best.metric) == "higher" else "lowest"


def _why_unusable(checkpoint: Path) -> str | None:
    try:
        read_manifest(checkpoint)
    except ValueError as why:
        return str(why)
    return None
