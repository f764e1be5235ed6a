"""`report.html`: alarms, metric plots, data, sample answers and the recipe of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nesso_tune.data.privacy import Privacy
from nesso_tune.data.report import DataReport
from nesso_tune.metric_registry import charts
from nesso_tune.planning.plan import Plan
from nesso_tune.recipes.schema import Recipe, as_yaml
from nesso_tune.reports.html import render
from nesso_tune.reports.plots import line_plot
from nesso_tune.runs.metrics_log import read_metrics
from nesso_tune.training.alarms import alarm_events


def write_report(run: Path, recipe: Recipe, plan: Plan, data: DataReport) -> Path:
    """Writes report.html into a run directory and returns its path. Private sources are not named.

    Args:
        run: run directory with metrics.jsonl.
        recipe, plan: of the run.
        data: the report of `prepare_data`.
    """
    lines = read_metrics(run / "metrics.jsonl")
    plots = [line_plot(title, names, lines) for title, names in charts().items()]
    page = render(
        "report.html.j2",
        run_name=run.name,
        title=Path(recipe.output_dir).name,
        summary=_summary(recipe, plan, data),
        alarms=_cells(alarm_events(lines), ("step", "alarm", "said")),
        plots=[plot for plot in plots if plot],
        languages=[
            (code, f"{stats.rows:,}", f"{stats.tokens:,}", f"{stats.supervised_tokens:,}")
            for code, stats in data.languages.items()
        ],
        answers=_cells(_last_answers(lines), ("language", "prompt", "answer", "stopped")),
        recipe=as_yaml(Privacy(recipe.data).shown_recipe(recipe)),
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _summary(recipe: Recipe, plan: Plan, data: DataReport) -> str:
    schedule = plan.schedule.in_words() if plan.schedule else ""
    return (
        f"{recipe.method.upper()} from {recipe.model.base}: {plan.steps:,} steps of {plan.global_batch} rows, "
        f"{plan.epochs:.3g} epochs; "
        f"{schedule}; {data.rows_kept:,} of {data.rows_read:,} rows kept."
    )


def _last_answers(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Sample answers of the last evaluation."""
    answers = [line for line in lines if line.get("event") == "answer"]
    return [line for line in answers if line["step"] == answers[-1]["step"]]


def _cells(lines: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(str(line[key]) for key in keys) for line in lines]
