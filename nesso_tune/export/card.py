"""Model card of `final/`: usage, training, data and validation results, without private sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nesso_tune.data.privacy import Privacy
from nesso_tune.data.report import DataReport
from nesso_tune.logs import visible
from nesso_tune.planning.plan import Plan
from nesso_tune.recipes.schema import Recipe

METRICS = ("eval_loss", "stop_rate", "exact_match", "train_exact_match", "eval_rewards/accuracies", "closer_to_chosen")


def model_card(
    recipe: Recipe, plan: Plan, report: DataReport, metrics: Mapping[str, Any], chosen: Sequence[str] = ()
) -> str:
    """README.md of `final/`, in Markdown.

    Args:
        recipe, plan: of the run.
        report: the report of `prepare_data`.
        metrics: last value of each metric.
        chosen: sentences on which checkpoint was exported and why, unless it is the last one by default.
    """
    hidden = Privacy(recipe.data).hidden_sources()
    return _environment.get_template("card.md.j2").render(
        name=recipe.output_dir.rstrip("/").rsplit("/", 1)[-1],
        method=recipe.method,
        base=recipe.model.base,
        languages=[code for code in report.languages if code != "und"],
        steps=f"{plan.steps:,}",
        global_batch=plan.global_batch,
        epochs=f"{plan.epochs:.3g}",
        schedule=plan.schedule.in_words() if plan.schedule else "",
        checkpoint_choice=chosen,
        rows=f"{report.rows_kept:,}",
        supervised_tokens=f"{report.supervised_tokens:,}",
        sources=[source.path for i, source in enumerate(recipe.data.sources) if i not in hidden],
        has_private_source=bool(hidden),
        metrics=[(key, f"{metrics[key]:.4g}") for key in METRICS if isinstance(metrics.get(key), (int, float))],
    )


def _finalize(value: Any) -> Any:
    """Escapes control characters, line breaks too, in every printed value."""
    return visible(value) if isinstance(value, str) else value


_environment = Environment(
    loader=PackageLoader("nesso_tune.export"),
    autoescape=False,  # Markdown
    undefined=StrictUndefined,
    finalize=_finalize,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
